"""docs/methods.md names what there is: every function in the source, every setting of a pass, every solver."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from compress import passes
from compress.recipe.data import Data

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "compress"
PAGE = ROOT / "docs" / "methods.md"
TEXT = PAGE.read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", TEXT)
ROOMS = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}


def dotted_names() -> list[str]:
    """Names of functions and classes by their module, such as `solvers.gptq.gptq`."""
    found = {text for text in CODE if re.fullmatch(r"[a-z_0-9]+(\.\w+)+", text)}
    return sorted(n for n in found if n.partition(".")[0] in ROOMS and not is_recipe_key(n))


def is_recipe_key(name: str) -> bool:
    """Whether it is a key under ``data`` of a recipe, which is also a package."""
    return name.split(".")[:2] in [["data", key] for key in Data.model_fields]


def rows() -> list[list[str]]:
    """Cells of the index: method, paper, function, setting."""
    _, _, index = TEXT.partition("## Index")
    lines = [line for line in index.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@cache
def defined(path: Path) -> dict[str, Any]:
    """Names that a module or class defines, with what a class defines in turn."""

    def names(body: list[ast.stmt]) -> Iterator[tuple[str, Any]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield node.name, dict(names(node.body))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.name, {}

    return dict(names(ast.parse(path.read_text(encoding="utf-8")).body))


def exists(name: str) -> bool:
    """Whether ``a.b.c`` is defined: the longest path that is a module, then its classes and functions."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        path = PACKAGE.joinpath(*parts[:split]).with_suffix(".py")
        if path.is_file():
            found: dict[str, Any] | None = defined(path)
            for part in parts[split:]:
                found = None if found is None else found.get(part)
            return found is not None
    return False


def test_methods_index_has_rows() -> None:
    assert len(rows()) > 30
    assert len(dotted_names()) > 60


@pytest.mark.parametrize("name", dotted_names())
def test_methods_name_existing_functions(name: str) -> None:
    assert exists(name), f"docs/methods.md names `{name}`, which compress does not define"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_methods_index_row_names_function_and_setting(row: list[str]) -> None:
    _, papers, function, setting = row
    assert papers == "–" or re.search(r"\b\d{4}\.\d{5}\b", papers), papers
    assert exists(function)
    if is_recipe_key(setting):
        return
    ((name, settings),) = YAML(typ="safe").load(StringIO(setting)).items()
    fields = passes.get(name).settings.model_fields
    for key, value in settings.items():
        assert key in fields, f"{name} has no setting `{key}`"
        field = fields[key]
        TypeAdapter(Any if field.annotation is None else field.rebuild_annotation()).validate_python(value)


def test_methods_name_existing_settings() -> None:
    fields = {key for name in passes.TABLE for key in passes.get(name).settings.model_fields}
    keys = {match[1] for text in CODE if (match := re.fullmatch(r"(\w+): \w+", text))}
    assert keys
    assert keys <= fields


def test_methods_describe_every_solver() -> None:
    modules = {path.stem for path in (PACKAGE / "solvers").rglob("*.py")} - {"__init__", "memory"}
    described = {part for name in dotted_names() for part in name.split(".")}
    assert modules <= described, f"docs/methods.md does not describe {sorted(modules - described)}"


@pytest.mark.parametrize("name", ["solvers.gptq.gptc", "solvers.gptq", "blockwise.runner.Nothing"])
def test_methods_check_finds_missing_names(name: str) -> None:
    assert not exists(name)


def test_methods_links_lead_to_files() -> None:
    pages = [PAGE, *sorted((ROOT / "docs" / "decisions").glob("0*.md"))]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
