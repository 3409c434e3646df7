"""Damaged run folders: after a finished run, a stopped one, or a training stopped half-way, some of its files are broken."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.campaigns import damage
from tests.campaigns.command import call, changed, contents
from tests.campaigns.trial import Trial

_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "num_key_value_heads": 1,
}
_DATA = {
    "calibration": {"files": ["train.txt"], "samples": 2, "length": 16},
    "evaluation": {"files": ["valid.txt"], "window": 32, "max_documents": 3},
}
_GATES = {"size": {"max_ratio": 0.9}, "bits_per_byte": {"max_increase": "500%"}}
RECIPES: dict[str, dict[str, Any]] = {
    "chain": {
        "model": "model", "output": "out", "document_separator": "<|doc|>", "data": _DATA, "gates": _GATES, "evaluate": ["bits_per_byte"],
        "passes": [{"prune_structured": {"layers": 1, "compensation": "none"}}, {"prune_unstructured": {"method": "magnitude", "sparsity": "60%"}}, {"cast": {"weights": "bf16"}}],
    },
    "other": {
        "model": "model", "output": "out", "document_separator": "<|doc|>", "data": _DATA, "evaluate": [],
        "passes": [{"prune_structured": {"layers": 1, "compensation": "none"}}, {"cast": {"weights": "fp16"}}],
    },
    "training": {
        "model": "model", "output": "out", "document_separator": "<|doc|>", "evaluate": [],
        "data": {**_DATA, "training": {"files": ["train.txt"], "length": 16}},
        "passes": [{"prune_structured": {"layers": 1, "compensation": "none"}}, {"distill": {"steps": 6, "batch_size": 2, "validation_samples": 2, "learning_rate": 1e-3, "evaluate_every": 2}}],
    },
}  # fmt: skip


def prepare(folder: Path) -> None:
    """A folder for each state that a run can be in, and what every recipe's result is, file by file."""
    import transformers

    from tests import pico

    transformers.utils.logging.disable_progress_bar()
    start = folder / "begun"
    pico.save(start / "model", "llama", **_SMALL)
    for name, letters in (("train", "abcdefghij"), ("valid", "klmnopqrst")):
        words = random.Random(name)
        texts = [" ".join("".join(words.choices(letters, k=5)) for _ in range(40)) for _ in range(6)]
        (start / f"{name}.txt").write_text("\n<|doc|>\n".join(texts))
    for name, recipe in RECIPES.items():
        (start / f"{name}.yaml").write_text(json.dumps(recipe))
    right = {}
    for name in RECIPES:
        shutil.copytree(start, folder / name)
        with _inside(folder / name):
            if name == "training":
                _stop_training(folder / name)
                shutil.copytree(folder / name, folder / "stopped training")
            done = call(["run", f"{name}.yaml", "-q"])
            assert done.status == 0, (name, done.err, done.trace)
            right[name] = _weights(Path("out"))
            if name == "chain":
                (folder / "assessed.json").write_text(
                    call(
                        [
                            "eval",
                            "out",
                            "--data",
                            "valid.txt",
                            "--separator",
                            "<|doc|>",
                            "--window",
                            "32",
                            "-q",
                            "--json",
                        ]
                    ).out
                )
    shutil.copytree(folder / "chain", folder / "stopped")
    shutil.rmtree(folder / "stopped/out")
    for path in [*(folder / "stopped/out.run").glob("report*"), *(folder / "stopped/out.run").glob("*.xml")]:
        path.unlink()
    last = max((folder / "stopped/out.run/stages").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
    last.unlink()
    (folder / "right.json").write_text(json.dumps(right))


def _stop_training(folder: Path) -> None:
    """Run the recipe up to its second state."""
    from compress.cli.guard import Terminated
    from compress.training.state import RunState

    save, count = RunState.save, [0]

    def stopping(self: RunState, name: str, *arguments: Any, **options: Any) -> None:
        save(self, name, *arguments, **options)
        count[0] += name.startswith("step")
        if count[0] == 2:
            raise Terminated

    RunState.save = stopping  # type: ignore[method-assign]
    try:
        done = call(["run", "training.yaml", "-q"], allowed=(130,))
        assert done.status == 130, (done.status, done.err, done.trace)
    finally:
        RunState.save = save  # type: ignore[method-assign]


def _weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a result is made of."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.glob("*"))
        if p.suffix == ".safetensors" or p.name == "config.json"
    }


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def case(trial: Trial) -> None:
    """Damage one to three files of a run folder, and do what a user does next."""
    rng = trial.rng
    states = {"chain": 5, "stopped": 3, "training": 1, "stopped training": 1.5}
    state = rng.choices(list(states), list(states.values()))[0]
    place = trial.work / "place"
    shutil.copytree(trial.sound / state, place)
    trial.notes.append(f"{state}: {', '.join(break_some(rng, place))}")
    recipe = "training" if "training" in state else "chain"
    operations = {_again: 9, _changed_recipe: 2, _clean: 3, _runs: 2, _gate: 4}
    operation = rng.choices(list(operations), list(operations.values()))[0]
    with _inside(place):
        operation(trial, recipe)


def break_some(rng: random.Random, place: Path) -> list[str]:
    """Damage files below ``out.run``, now and then the provenance or the weights of the output; says which, and how."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = [
            p for p in sorted(place.glob("out.run/**/*")) if p.is_file() and not p.is_symlink() and p.stat().st_size
        ]
        chosen = [p for p in files if p.suffix == ".json"] if rng.random() < 0.7 else files
        if rng.random() < 0.12 and (place / "out/compress.json").is_file():
            chosen = [place / "out/compress.json"]
        elif rng.random() < 0.05 and (place / "out/model.safetensors").is_file():
            chosen = [place / "out/model.safetensors"]
        if not chosen:
            break
        path = rng.choice(chosen)
        kind = rng.choice(("tree", "tree", "tree", "bytes", "place", "swap", "rot"))
        done.append(f"{path.relative_to(place)}: {kind}")
        if kind == "tree" and path.suffix == ".json":
            _write(path, damage.damage_json(rng, path.read_bytes()))
        elif kind == "place":
            damage.damage_place(rng, path)
        elif kind == "swap":
            other = rng.choice(files)
            first, second = path.read_bytes(), other.read_bytes()
            _write(path, second)
            _write(other, first)
        elif kind == "rot":
            _rot(rng, path)
        else:
            _write(path, damage.damage_bytes(rng, path.read_bytes()))
    return done


def _write(path: Path, data: bytes) -> None:
    """Replace a file, so that its other hard links keep what they have."""
    path.unlink()
    path.write_bytes(data)


def _rot(rng: random.Random, path: Path) -> None:
    """One bit turns, and nothing else about the file tells."""
    info = path.stat()
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    _write(path, bytes(data))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def _right(trial: Trial, recipe: str, status: int | str) -> None:
    """After a run that ended well the output is that of the recipe."""
    expected = json.loads((trial.sound / "right.json").read_text())[recipe]
    if status == 0 and (found := _weights(Path("out"))) != expected:
        wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        trial.failures.append(f"run ended with 0, and {wrong[0]} of the output is not what the recipe gives")


def _again(trial: Trial, recipe: str) -> None:
    options = trial.rng.choice(((), (), (), ("--fresh",), ("--json",)))
    _run(trial, recipe, *options)
    if trial.rng.random() < 0.15:
        _run(trial, recipe)


def _run(trial: Trial, recipe: str, *options: str) -> None:
    before = contents(Path("out")) if Path("out").exists() else None
    done = trial.run("run", f"{recipe}.yaml", "-q", *options, keep=[Path("model")], cpu=60)
    if done.status == 2 and before is not None and (names := changed(before, Path("out"))):
        trial.failures.append(f"run ended with 2 and changed {names[0]} of the output")
    _right(trial, recipe, done.status)


def _changed_recipe(trial: Trial, recipe: str) -> None:
    _run(trial, "other")


def _clean(trial: Trial, recipe: str) -> None:
    options = trial.rng.choice(((), ("--dry-run",), ("--all",), ("--dry-run", "--all")))
    keep = [Path("model"), *([Path("out")] if Path("out").exists() else [])]
    if "--dry-run" in options:
        Path("out.run/lock").unlink(missing_ok=True)
        keep.append(Path("out.run"))
    trial.run("clean", trial.rng.choice(("out", "out.run")), *options, keep=keep)
    if trial.rng.random() < 0.3 and "--dry-run" not in options:
        _run(trial, recipe)


def _runs(trial: Trial, recipe: str) -> None:
    trial.run("runs", ".", *trial.rng.choice(((), ("--json",))), keep=[Path("out.run"), Path("model")])


def _gate(trial: Trial, recipe: str) -> None:
    """Judge the report, damaged by this very case, or compare with a damaged baseline."""
    rng = trial.rng
    if rng.random() < 0.35:
        baseline = Path("baseline.json")
        baseline.write_bytes(damage.damage_json(rng, (trial.sound / "assessed.json").read_bytes()))
        common = ["--baseline", str(baseline), "-q"]
        if rng.random() < 0.5:
            trial.run(
                "gate",
                "model",
                *common,
                "--gate",
                "bits_per_byte.max_increase=50%",
                allowed=(0, 1, 2, 3),
                keep=[Path("model")],
            )
        else:
            trial.run(
                "eval",
                "model",
                "--data",
                "valid.txt",
                "--separator",
                "<|doc|>",
                "--window",
                "32",
                *common,
                keep=[Path("model")],
            )
        return
    report = Path("out.run/report.json")
    if report.is_file() and rng.random() < 0.7:
        _write(report, damage.damage_json(rng, report.read_bytes()))
    options = rng.choice(
        (
            (),
            ("--gate", "size.max_ratio=0.5"),
            ("--gate", "bits_per_byte.max_increase=5%", "--json"),
            ("--confidence", "0.9"),
        )
    )
    trial.run("gate", str(report), *options, "--junit", "junit.xml", allowed=(0, 1, 2, 3), keep=[Path("model")])
