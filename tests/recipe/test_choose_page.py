"""docs/choose.md: its recipes plan, its figures stand where they were measured, its settings and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import compress
from compress.errors import CompressError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/choose.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SOURCES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def recipe(data, monkeypatch):
    """The recipe with a model, and text that is there."""
    monkeypatch.chdir(ROOT)
    text = {"train.txt": "examples/text/train.txt"}
    for section in data.get("data", {}).values():
        section["files"] = [text[name] for name in section["files"]]
    if "gates" in data:
        data["data"]["evaluation"] = {"files": ["examples/text/valid.txt"]}
    return {"model": "examples/tiny-lm", "output": "out/x", "document_separator": "<|doc|>", **data}


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_recipe_on_the_choose_page_plans(number, monkeypatch):
    data = recipe(YAML(typ="safe").load(RECIPES[number]), monkeypatch)
    compress.plan(data)


def test_settings_on_the_choose_page_exist(monkeypatch):
    """`name: {setting: value}` in the text and tables is what a recipe takes."""
    found = set(re.findall(r"`((?:cast|prune_\w+|share|factorize|distill): \{[^`]*\})`", PAGE))
    assert len(found) > 10
    for line in sorted(found):
        entry = YAML(typ="safe").load(line)
        data = {
            "calibration": {"files": ["train.txt"], "samples": 8, "length": 64},
            "training": {"files": ["train.txt"], "length": 64},
        }
        store = "stock" if "activations" in line or "kv_cache" in line else "compact"
        try:
            compress.plan(recipe({"store": store, "data": data, "passes": [entry]}, monkeypatch))
        except CompressError as error:
            if "tied already" in str(error):  # the example model's; the setting is known
                continue
            raise AssertionError(f"{line}: {error}") from error


def test_figures_on_the_choose_page_match_benchmarks():
    measured = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES if path.name != "choose.md")
    known = {number.lstrip("0") for number in re.findall(r"\d[\d,]*\.?\d*|\.\d+", measured)}
    figures = re.findall(r"[+−-](0\.\d+)|(0?\.\d{2,}) ×|(?<![\d.])(\d\.\d{2}) ×|(\d\d\.\d+)%|(\d[\d,]{6,})", PAGE)
    numbers = [next(filter(None, groups)) for groups in figures]
    assert len(numbers) > 50
    assert [number for number in numbers if number.lstrip("0").rstrip(",") not in known] == []
