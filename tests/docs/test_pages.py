"""Recipes and links in Markdown: recipes have keys and values that exist, and the checker of links finds what is broken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from compress import passes
from compress.errors import RecipeError
from compress.passes.describe import describe
from compress.recipe import recipe_from_mapping
from compress.recipe.bound import load_bound
from compress.recipe.search import load_search
from tools.docs import check

ROOT = Path(__file__).resolve().parents[2]
#: What a fragment of a recipe leaves to the reader.
REST = {"model": "some-model", "output": "some-output"}
DATA = {name: {"files": [f"{name}.txt"]} for name in ("training", "calibration", "evaluation")}


def recipes() -> list[object]:
    """Every YAML block with passes or a bound, completed to a recipe."""
    blocks_with_passes = []
    for page in check.tracked():
        blocks = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for number, block in enumerate(block for block in blocks if re.search(r"^(passes|fit):", block, re.MULTILINE)):
            recipe = YAML(typ="safe").load(block)
            recipe = {**REST, **recipe, "data": {**DATA, **recipe.get("data", {})}}
            blocks_with_passes.append(pytest.param(recipe, id=f"{page.relative_to(ROOT).as_posix()} {number}"))
    return blocks_with_passes


def inline_passes() -> list[str]:
    """Every pass with settings in code within a line, such as `cast: {weights: int4}`; pages of the past may have old keys."""
    named = re.compile(rf"`((?:{'|'.join(passes.TABLE)}): \{{[^`]*\}})`")
    pages = [page for page in check.tracked() if not page.relative_to(ROOT).as_posix().startswith(check.HISTORY)]
    return sorted({code for page in pages for code in named.findall(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("code", inline_passes())
def test_pass_named_in_a_line_has_settings_that_exist(code: str) -> None:
    entry = YAML(typ="safe").load(code)
    recipe = {**REST, "store": "compact", "data": DATA, "passes": [entry]}
    (settings,) = entry.values()
    searched = isinstance(settings, dict) and (
        "optional" in settings or any("search" in value for value in settings.values() if isinstance(value, dict))
    )
    try:
        if searched:
            rest = {"passes": [entry, {"cast": {"weights": "bf16"}}], "sweep": {"minimize": ["size"]}}
            load_search({**recipe, **rest}, check_files=False)
        else:
            recipe_from_mapping(recipe, check_files=False)
        mistake = None
    except RecipeError as error:
        mistake = str(error)

    # a mistake of the pass as a whole is a setting that an excerpt leaves out
    assert mistake is None or mistake.startswith("passes.0: ")


@pytest.mark.parametrize("recipe", recipes())
def test_recipe_on_a_page_is_valid(recipe: dict[str, Any]) -> None:
    if "sweep" in recipe:
        assert load_search(recipe, check_files=False).space
    elif "fit" in recipe:
        assert load_bound(recipe, check_files=False).fit
    else:
        assert recipe_from_mapping(recipe, check_files=False).passes


@pytest.mark.parametrize("name", passes.TABLE)
def test_docstring_of_a_pass_has_a_sample_recipe_of_it(name: str) -> None:
    described = describe(name)

    assert f"- {name}:" in described["sample"]
    assert "Sample" not in described["details"]


def page(folder: Path, text: str) -> list[str]:
    """Return the mistakes of a page, without the place."""
    (folder / "other.md").write_text("# Other\n\n## A heading: `here`\n")
    (folder / "page.md").write_text(text)
    return [mistake.split(": ", 1)[1] for mistake in check.mistakes(folder / "page.md", folder)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](gone.md)", ["links to gone.md, which does not exist"]),
        ("[a](other.md#gone)", ["links to other.md#gone, but other.md has no heading #gone"]),
        ("![a](gone.svg)", ["links to gone.svg, which does not exist"]),
        ("[a](#gone)", ["links to #gone, but this page has no heading #gone"]),
        ("[a](../other.md)", ["links to ../other.md, which does not exist"]),
        ("`compress/gone.py`", ["names compress/gone.py, which does not exist"]),
        ("# A\n\n## A", ["a second heading 'A'; give it another title"]),
        ("a " * 61, ["122 characters; break the line at 120"]),
        ("[a](other.md#a-heading-here) [b](https://example.com/x) `[c](gone.md)`", []),
        ("```\n[a](gone.md)\n# A\n# A\n```\n| " + "a " * 61 + "|", []),
        ("<!-- begin x -->\n" + "a " * 61 + "\n<!-- end x -->", []),
    ],
)
def test_check_reports_what_is_wrong_on_a_page(text: str, expected: list[str], tmp_path: Path) -> None:
    assert page(tmp_path, text) == expected


def test_tracked_pages_include_the_tree() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in check.tracked()}

    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/passes/cast.md"} <= names
    assert not any(name.startswith(check.CARDS) for name in names)


def test_recipe_in_the_readme_is_the_quickstart() -> None:
    block = re.search(r"```yaml\n(model: .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    yaml = YAML(typ="safe")

    assert block is not None
    assert yaml.load(block[1]) == yaml.load(ROOT / "recipes/quickstart.yaml")
