"""One side of same_bytes.py: run recipes with the code of one tree, and write down all that is compared of each result.

Called as `python -P same_bytes_worker.py TASKS` with the tree as its folder and in PYTHONPATH. TASKS is JSON: the tree,
recipes by name, a folder for the records, and how many recipes run at a time.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import importlib.util
import json
import os
import pkgutil
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: Keys of a report that are not compared, at any depth ▶ why.
LEFT_OUT = {
    **dict.fromkeys(
        ("seconds", "predicted_seconds", "started", "tokens_per_second", "peak_memory", "latency"), "times and memory"
    ),
    **dict.fromkeys(("versions", "machine"), "not of the result"),
    **dict.fromkeys(("output", "folder", "run_folder", "checkpoint", "path"), "paths"),
    **dict.fromkeys(("resolved", "settings"), "keys of recipes, which may be renamed"),
    **dict.fromkeys(("fingerprint", "recipe"), "digests of versions and of keys of recipes"),
    **dict.fromkeys(("notes", "text"), "prose"),
}
#: The same for compress.json.
OF_PROVENANCE = {**LEFT_OUT, **dict.fromkeys(("files", "sha256"), "digests of files, prose among them")}
#: Files of a result that are not compared: prose, and code, whose results the figures of the report are.
UNREAD = ("README.md", "*.py")


def work(tasks: Mapping[str, Any]) -> None:
    """Run recipes in forks of this process, which has imported what takes long; CPU seconds of each go to stderr."""
    _import_all(Path(tasks["tree"]))
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # nothing here outlives a power cut
    running: dict[int, str] = {}
    for name, recipe in tasks["recipes"].items():
        if (process := os.fork()) == 0:
            _child(Path(tasks["folder"]), name.replace("/", "-"), recipe, tasks["originals"].get(name))
        running[process] = name
        if len(running) == tasks["jobs"]:
            _wait(running)
    while running:
        _wait(running)


def _import_all(tree: Path) -> None:
    import torch
    import transformers  # noqa: F401

    import compress

    torch.set_num_threads(1)
    assert compress.__file__ is not None
    assert Path(compress.__file__).is_relative_to(tree), f"{compress.__file__} is not of {tree}"
    for module in pkgutil.walk_packages(compress.__path__, "compress."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _wait(running: dict[int, str]) -> None:
    process, _, used = os.wait4(-1, 0)
    print(f"{used.ru_utime + used.ru_stime:6.1f} s  {running.pop(process)}", file=sys.stderr, flush=True)


def _child(folder: Path, name: str, recipe: dict[str, Any], original: Mapping[str, Any] | None) -> None:
    """Run one recipe and write its record; ``original``: what the tree's file is to say. Never returns."""
    import torch

    # torch's pool of threads is made anew after a fork, by whoever asks first: two threads at once end in an assertion
    torch.set_num_threads(1)
    out = folder / name
    out.mkdir()
    with (folder / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        here = json.loads(json.dumps(recipe).replace("{out}", str(out)))
        values = record(out, translated({**here, "output": str(out / "result"), "device": "cpu"}))
        if original is not None and not says(Path(original["path"]), original["recipe"]):
            values[original["path"]] = "is no translation of the earlier one"
    except BaseException as error:
        traceback.print_exc()
        values = {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
    (folder / f"{name}.json").write_text(json.dumps(values))
    shutil.rmtree(out)
    os._exit(0)


def translated(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe in the keys of the tree that runs."""
    if importlib.util.find_spec("compress.recipe.renamed") is None:
        return recipe
    renamed: dict[str, Any] = importlib.import_module("compress.recipe.renamed").translated(recipe)
    return renamed


def says(path: Path, recipe: dict[str, Any]) -> bool:
    """Whether a recipe's file says the same as a recipe in the earlier keys, with all defaults written out."""
    from compress.recipe import load_recipe, recipe_from_mapping, resolved

    return path.is_file() and resolved(load_recipe(path)) == resolved(recipe_from_mapping(translated(recipe)))


def record(out: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Run a recipe; all that is compared of its result, by place."""
    import compress
    from compress.errors import CompressError

    result = compress.run(recipe)
    found = dict(flat(json.loads((out / "result.run/report.json").read_text()), "report", LEFT_OUT))
    found |= of_folder(result.checkpoint, "result")
    try:
        compress.unpack(result.checkpoint, out / "twin")
    except CompressError:
        return {**found, "twin": "refused"}
    return found | {key: value for key, value in of_folder(out / "twin", "twin").items() if "tensor" in key}


def of_folder(folder: Path, place: str) -> dict[str, Any]:
    """What is compared of a checkpoint, by place."""
    found: dict[str, Any] = {}
    for file in sorted(p for p in folder.iterdir() if not any(fnmatch.fnmatch(p.name, u) for u in UNREAD)):
        at = f"{place}/{file.name}"
        if file.suffix == ".safetensors":
            found |= of_weights(file, at)
        elif file.suffix == ".json" and file.stat().st_size < 50_000:
            left = OF_PROVENANCE if file.name == "compress.json" else ()
            found |= dict(flat(json.loads(file.read_text(encoding="utf-8")), at, left))
        else:
            found[at] = _sha256(file.read_bytes())
    return found


def of_weights(file: Path, at: str) -> dict[str, Any]:
    """Digests of the header and of each tensor's bytes."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {f"{at} header": _sha256(data[:start])}
    for name, row in json.loads(data[8:start]).items():
        if name == "__metadata__":
            found |= {f"{at} metadata {key}": _sha256(text.encode()) for key, text in row.items()}
            continue
        first, last = row["data_offsets"]
        digest = _sha256(data[start + first : start + last])
        found[f"{at} tensor {name}"] = f"{row['dtype']} {row['shape']} {digest}"
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flat(value: Any, at: str, left_out: Any = ()) -> Iterator[tuple[str, Any]]:
    """Leaves of nested JSON by place, without some keys."""
    if isinstance(value, dict) and value:
        for key in sorted(value.keys() - set(left_out)):
            yield from flat(value[key], f"{at}.{key}", left_out)
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from flat(item, f"{at}[{i}]", left_out)
    else:
        yield at, value


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
