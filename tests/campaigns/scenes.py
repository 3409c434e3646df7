"""What campaigns run: pico checkpoints, texts, and recipes of one chain, one distillation, and one exchange.

All of it lies in memory (``/dev/shm``) where there is one: files are small, and syncing them to a disk tells nothing here.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import pico
from tests.campaigns.forked import Outcome, command

PRUNE = {"prune_structured": {"mlp": "50%", "compensation": "none", "importance": "magnitude"}}
SPARSE = {"prune_unstructured": {"method": "sparsegpt", "sparsity": "50%", "reconstruction_epochs": 1}}
INT4 = {"cast": {"weights": "int4", "group_size": 32, "method": "gptq"}}
DISTILL = {
    "distill": {"steps": 4, "batch_size": 2, "validation_samples": 2, "learning_rate": 1e-3, "evaluate_every": 1}
}
#: Recipes by name: the passes that run, and those of an earlier result that the run is to replace.
RECIPES: dict[str, tuple[list[Any], list[Any] | None]] = {
    "chain": ([PRUNE, SPARSE, INT4], None),
    "distillation": ([PRUNE, DISTILL], None),
    "exchange": ([PRUNE, INT4], [PRUNE, {"cast": {"weights": "int8", "method": "rtn"}}]),
}


@dataclass(frozen=True)
class Scene:
    """A folder that a case works in. ``inputs`` must never change; ``case`` is the case's own.

    Attributes:
        expected: digests of the output by files' names, of a run that nothing disturbed.
        earlier: digests of the earlier result, None where there is none.
        changes: how many changes of the file system that run made.
    """

    name: str
    inputs: Path
    case: Path
    expected: dict[str, str]
    earlier: dict[str, str] | None
    changes: int

    @property
    def recipe(self) -> Path:
        """The recipe that the case runs."""
        return self.inputs / f"{self.name}.json"

    @property
    def output(self) -> Path:
        """Where its result goes."""
        return self.case / "out"

    def run(self, **options: Any) -> Outcome:
        """``compress run`` of the recipe; options are those of `forked.command`."""
        return command(["run", str(self.recipe), "--quiet"], self.case, **options)

    def reset(self) -> None:
        """Bring the case's folder to what it was before the run."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        if self.earlier is not None:
            shutil.copytree(self.inputs / "earlier", self.case, dirs_exist_ok=True, symlinks=True)

    def found(self) -> dict[str, str] | None:
        """Digests of the output now, None where there is none."""
        return digests(self.output) if self.output.exists() else None


def build(name: str, folder: Path) -> Scene:
    """Make the inputs of a scene, and run it once without trouble."""
    inputs, case = folder / f"{name}-inputs", folder / name
    case.mkdir(parents=True)
    pico.save(inputs / "model", "llama", num_hidden_layers=2)
    _texts(inputs)
    passes, before = RECIPES[name]
    base = {
        "model": str(inputs / "model"),
        "output": str(case / "out"),
        "store": "compact",
        "document_separator": "<|doc|>",
        "data": {
            "calibration": {"files": [str(inputs / "train.txt")], "samples": 4, "length": 16},
            "training": {"files": [str(inputs / "train.txt")], "length": 16},
            "evaluation": {"files": [str(inputs / "valid.txt")], "window": 16, "max_documents": 3},
        },
        "evaluate": ["bits_per_byte"],
        "gates": {"size": {"max_ratio": 0.95}},
    }
    (inputs / f"{name}.json").write_text(json.dumps({**base, "passes": passes}))
    scene = Scene(name, inputs, case, {}, None, 0)
    earlier = None
    if before is not None:
        (inputs / "before.json").write_text(json.dumps({**base, "passes": before}))
        _done(command(["run", str(inputs / "before.json"), "--quiet"], case))
        earlier = digests(scene.output)
        case.rename(inputs / "earlier")
    scene = Scene(name, inputs, case, {}, earlier, 0)
    scene.reset()
    changes = _done(scene.run()).changes
    return Scene(name, inputs, case, digests(scene.output), earlier, changes)


def place() -> Path:
    """A new folder, in memory where possible."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="campaign-", dir=memory if os.access(memory, os.W_OK) else None))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that a result consists of: weights, config, tokenizer, code (times stand in the card alone)."""
    told = {"README.md", "compress.json"}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in told
    }


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, with its size and times, which a mere read leaves alone."""
    return {
        str(path.relative_to(folder)): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(scene: Scene) -> list[str]:
    """Names of temporary files and folders that a finished run must not leave."""
    hidden = [str(p.relative_to(scene.case)) for p in scene.case.rglob("*") if p.name.startswith(".")]
    work = scene.case / "out.run" / "work"
    return hidden + ([str(p.relative_to(scene.case)) for p in work.iterdir()] if work.is_dir() else [])


def finish(scene: Scene) -> str | None:
    """Run the recipe again, undisturbed. Returns what is wrong with the end: status, bytes, leftovers."""
    again = scene.run()
    if again.status != 0 or again.traceback:
        return f"run again: status {again.status}: {again.output[-2000:]}"
    if scene.found() != scene.expected:
        return "run again: other bytes"
    if left := leftovers(scene):
        return f"left behind: {left}"
    return None


def _texts(folder: Path) -> None:
    words = random.Random(0)

    def document(letters: str) -> str:
        return " ".join("".join(words.choices(letters, k=words.randint(2, 7))) for _ in range(20))

    (folder / "train.txt").write_text("\n<|doc|>\n".join(document("abcdefghij") for _ in range(30)))
    (folder / "valid.txt").write_text("\n<|doc|>\n".join(document("klmnopqrst") for _ in range(5)))


def _done(outcome: Outcome) -> Outcome:
    if outcome.status != 0:
        raise RuntimeError(f"a run without trouble ended with {outcome.status}:\n{outcome.output}")
    return outcome
