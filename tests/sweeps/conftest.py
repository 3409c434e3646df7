from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.errors import CompressError
from compress.recipe import load_recipe


@pytest.fixture(scope="session")
def sweep(pico_llama: Path, texts: tuple[Path, Path]) -> Callable[..., dict[str, Any]]:
    """A sweep of three sparsities and three formats as a mapping, with a few keys of its section changed."""
    _, valid = texts

    def make(folder: Path, **changes: Any) -> dict[str, Any]:
        section = {"minimize": ["size", "kl"], **changes}
        return {
            "model": str(pico_llama),
            "output": str(folder / "out"),
            "store": "compact",
            "document_separator": "<|doc|>",
            "data": {"evaluation": {"files": [str(valid)], "window": 32, "max_documents": 8}},
            "passes": [
                {"prune_unstructured": {"method": "magnitude", "sparsity": {"search": ["30%", "50%", "70%"]}}},
                {"cast": {"method": "rtn", "weights": {"search": ["int8", "int4", "int3"]}}},
            ],
            "evaluate": ["kl"],
            "bootstrap": 100,
            "sweep": {key: value for key, value in section.items() if value is not None},
        }

    return make


def in_process(recipe: Path, *, shared: Path, log: Path, folder: Path, lock: int) -> int:
    """Run the recipe of a trial in this process."""
    from compress.pipeline.run import run

    try:
        return run(load_recipe(recipe), shared=shared).exit_status
    except CompressError as error:
        log.write_text(f"compress: {error}\n")
        return error.exit_status


@pytest.fixture(scope="session")
def real_report(tmp_path_factory: pytest.TempPathFactory, pico_llama: Path, texts: tuple[Path, Path]) -> dict[str, Any]:
    """The report of a small run."""
    folder = tmp_path_factory.mktemp("run")
    result = compress.run(
        {
            "model": str(pico_llama),
            "output": str(folder / "out"),
            "document_separator": "<|doc|>",
            "data": {"evaluation": {"files": [str(texts[1])], "window": 32, "max_documents": 40}},
            "passes": [{"cast": {"weights": "int8", "method": "rtn"}}],
            "evaluate": ["kl"],
            "bootstrap": 100,
        }
    )
    return dict(result.report)


@pytest.fixture(scope="session")
def imagined(real_report: dict[str, Any]) -> Callable[..., Any]:
    """A runner that computes nothing: it writes a report with the bytes and the divergence that functions of the recipe give."""

    class Imagined:
        def __init__(self, size: Callable[[dict[str, Any]], int], kl: Callable[[dict[str, Any]], float]) -> None:
            self.size, self.kl = size, kl
            self.recipes: list[dict[str, Any]] = []

        def __call__(self, recipe: Path, *, shared: Path, log: Path, folder: Path, lock: int) -> int:
            loaded = load_recipe(recipe)
            settings = {entry.name: entry.settings for entry in loaded.passes}
            given = {"sparsity": settings["prune_unstructured"].sparsity, "weights": settings["cast"].weights}
            self.recipes.append(given)
            report = copy.deepcopy(real_report)
            report["result"]["size"]["bytes"] = self.size(given)
            factor = self.kl(given) / report["result"]["evaluation"]["kl"]
            report["result"]["evaluation"]["kl"] *= factor
            for row in report["result"]["evaluation"]["documents"]:
                row["kl"] *= factor
            target = Path(f"{loaded.output}.run")
            target.mkdir(parents=True, exist_ok=True)
            Path(loaded.output).mkdir(exist_ok=True)
            (target / "report.json").write_text(json.dumps(report))
            return 0

    return Imagined
