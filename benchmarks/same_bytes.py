"""Show that a change of the code changes no byte of any output: `make same-bytes BEFORE=commit`.

Runs every shipped recipe, and those of same_bytes.yaml, with the code of two trees: a commit, and the working tree. Compares
SHA-256 of each tensor's data and of each safetensors header, the JSON files of the checkpoint, the report, and the tensors
of the dense twin (`compress unpack`). Each difference is one line; the exit status is then 1. same_bytes_worker.py lists
what is left out, and why.

Recipes are written in the keys of the commit. A tree that has renamed keys translates them, by its function
`compress.recipe.renamed.translated`. The digests of the commit are kept, so the next comparison runs the working tree alone.
They hold for one kind of CPU and one version of torch and transformers, and are made anew for another.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks/same_bytes.yaml"
WORKER = ROOT / "benchmarks/same_bytes_worker.py"
#: The commit before the re-organisation.
BEFORE = "6c328db"
#: What is not asked for: times. Two runs of one commit differ in them.
TIMES = {"latency", "memory", "prefill", "decode"}
#: A shipped recipe reads this much, unless it is run as a whole.
LITTLE = {"samples": 8, "length": 64, "max_documents": 4, "tokens": 4096}
#: Lines that one recipe may print.
MOST = 12


def main() -> None:
    """Compare; status 1 where anything differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with")
    parser.add_argument("--after", help="commit in place of the working tree; give that of --before to test the test")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="recipes by name; globs")
    parser.add_argument("--whole", action="store_true", help="shipped recipes on all of their data")
    parser.add_argument("--jobs", type=int, default=1, help="recipes at a time, each on one thread")
    parser.add_argument("--kept", type=Path, default=ROOT / "out/same_bytes", help="folder of kept digests")
    args = parser.parse_args()
    before = _git("rev-parse", "--short=7", args.before).strip()
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch:
        originals = shipped(before, args.whole)
        recipes = {name: timeless(row["recipe"], args.whole) for name, row in originals.items()}
        recipes |= table(Path(scratch))
        recipes = {n: r for n, r in recipes.items() if any(fnmatch.fnmatch(n, glob) for glob in args.only)}
        old = known(args.kept.resolve() / before, recipes)
        if missing := {name: recipe for name, recipe in recipes.items() if name not in old}:
            with tree_of(before, Path(scratch)) as tree:
                old |= side(tree, missing, Path(scratch), args.jobs)
            keep(args.kept / before, recipes, {name: old[name] for name in missing})
        with tree_of(args.after, Path(scratch)) as tree:
            new = side(tree, recipes, Path(scratch), args.jobs, originals)
    sys.exit(report(old, new))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def tree_of(commit: str | None, scratch: Path) -> Iterator[Path]:
    """A folder with the files of a commit; the working tree for None."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
        yield Path(folder)


# The recipes


def shipped(commit: str, whole: bool) -> dict[str, dict[str, Any]]:
    """The recipes of a commit by name, each with its path."""
    found = {}
    for path in _git("ls-tree", "--name-only", commit, "recipes/").split():
        name = ("whole/" if whole else "shipped/") + Path(path).stem
        found[name] = {"path": path, "recipe": YAML(typ="safe").load(_git("show", f"{commit}:{path}"))}
    return found


def timeless(recipe: Mapping[str, Any], whole: bool) -> dict[str, Any]:
    """A shipped recipe without what measures times; on a little of its data, or on the whole."""
    found = copy.deepcopy(dict(recipe))
    found["evaluate"] = [
        m for m in found.get("evaluate", ()) if next(iter([m] if isinstance(m, str) else m)) not in TIMES
    ] or None
    found["gates"] = {name: gate for name, gate in found.get("gates", {}).items() if name not in TIMES}
    if not whole:
        _shorten(found)
    return {key: value for key, value in found.items() if value is not None}


def _shorten(recipe: dict[str, Any]) -> None:
    data = recipe["data"]
    for name in {"training", "calibration"}.intersection(data):
        data[name]["length"] = min(data[name]["length"], LITTLE["length"])
    if "calibration" in data:
        data["calibration"]["samples"] = LITTLE["samples"]
    if "label" not in data["evaluation"]:
        data["evaluation"]["max_documents"] = LITTLE["max_documents"]
    for settings in (next(iter(entry.values())) for entry in recipe["passes"]):
        if "tokens" in settings:
            settings |= {"tokens": LITTLE["tokens"], "allow_noop": True}


def table(scratch: Path) -> dict[str, dict[str, Any]]:
    """The recipes of same_bytes.yaml by name; their models and images are made in a folder."""
    import torch

    torch.set_num_threads(1)
    said = YAML(typ="safe").load(TABLE.read_text(encoding="utf-8"))
    images = make_images(scratch)
    for name, model in said["models"].items():
        make_model(scratch / name, **model)
    found = {}
    for name, recipe in said["recipes"].items():
        like = said["models"][recipe["model"]]["like"]
        data = {**_data(like, images), **recipe.pop("data", {})}
        common = {} if like == "images" else {"document_separator": "<|doc|>"}
        data = {key: section for key, section in data.items() if section is not None}
        found[name] = {**common, **recipe, "model": str(scratch / recipe["model"]), "data": data}
    return found


def _data(like: str, images: Path) -> dict[str, Any]:
    if like == "images":
        return {"training": {"images": str(images / "train")}, "evaluation": {"images": str(images / "test")}}
    train = {"files": ["examples/text/test.txt"], "length": 48}
    test = {"files": ["examples/text/valid.txt"], "window": 64, "max_documents": 4}
    return {"training": train, "calibration": {**train, "samples": 24}, "evaluation": test}


def make_model(folder: Path, like: str, config: Mapping[str, Any], dtype: str = "float32", **named: str) -> None:
    """A checkpoint of a class of transformers: random weights, of which those of matrices are large enough to matter."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model_class = getattr(transformers, named["class"])
    model = model_class(model_class.config_class(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if like == "images":
        transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "examples" / like / file, folder)


def make_images(scratch: Path) -> Path:
    """Folders `train` and `test` of images of two classes."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in ("train/red", "train/green", "test/red", "test/green"):
        folder = scratch / "images" / name
        folder.mkdir(parents=True)
        for number in range(12):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return scratch / "images"


# One side


def side(
    tree: Path, recipes: Mapping[str, Any], scratch: Path, jobs: int, originals: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The record of each recipe, run in a process of its own with the code of a tree.

    A record of one of ``originals`` says so where the tree's own file differs from its translation.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        tasks = Path(folder) / "tasks.json"
        known = {"tree": str(tree), "recipes": recipes, "folder": folder, "jobs": jobs, "originals": originals or {}}
        tasks.write_text(json.dumps(known))
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        # -P: this folder has files called as modules of the standard library and of ours
        command = [sys.executable, "-P", str(WORKER), str(tasks)]
        subprocess.run(command, cwd=tree, env={**os.environ, **quiet, "PYTHONPATH": str(tree)}, check=True)
        texts = {name: (Path(folder) / f"{name.replace('/', '-')}.json").read_text() for name in recipes}
        return {name: json.loads(text.replace(str(scratch), "")) for name, text in texts.items()}


# Two sides


def _key(recipe: Mapping[str, Any]) -> str:
    """What a kept record holds for: the recipe, its model's content, and what computes."""
    import torch
    import transformers

    model = ROOT / recipe["model"]
    content = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(model.iterdir())]
    text = json.dumps({**recipe, "model": model.name}, sort_keys=True).replace(str(model.parent), "")
    computes = (torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability())
    return hashlib.sha256(repr([text, content, computes]).encode()).hexdigest()


def known(folder: Path, recipes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The records that are kept of a commit and hold for these recipes."""
    found = {}
    for name, recipe in recipes.items():
        path = folder / f"{name.replace('/', '-')}.json"
        if path.is_file() and (row := json.loads(path.read_text()))["key"] == _key(recipe):
            found[name] = row["values"]
    return found


def keep(folder: Path, recipes: Mapping[str, Any], records: Mapping[str, dict[str, Any]]) -> None:
    """Keep records for the next comparison; failures are not kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in records.items():
        if "failed" not in values:
            text = json.dumps({"key": _key(recipes[name]), "values": values}, indent=0)
            (folder / f"{name.replace('/', '-')}.json").write_text(text)


def report(old: Mapping[str, dict[str, Any]], new: Mapping[str, dict[str, Any]]) -> int:
    """Print what differs; the exit status."""
    wrong, compared = 0, 0
    for name, values in new.items():
        lines = differences(old[name], values)
        compared += len(values)
        wrong += bool(lines)
        for line in lines[:MOST]:
            print(f"{name}: {line}")
        if len(lines) > MOST:
            print(f"{name}: and {len(lines) - MOST} more")
    tensors = sum(" tensor " in key for values in new.values() for key in values)
    print(f"{len(new)} recipes, {compared} values, of which {tensors} digests of tensors: {wrong} recipes differ")
    return int(wrong > 0)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each place where two records differ, and for each failure."""
    both = {"before": old, "after": new}
    if failed := [f"{name} failed: {row['failed']}" for name, row in both.items() if "failed" in row]:
        return failed
    pairs = {place: (old.get(place, "nothing"), new.get(place, "nothing")) for place in {**old, **new}}
    return [f"{place}: {was} ▶ {now}" for place, (was, now) in pairs.items() if was != now]


if __name__ == "__main__":
    main()
