"""Old spellings of keys and values: refused at their place with the new one, and translated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress import passes
from compress.errors import RecipeError
from compress.recipe import load_recipe, recipe_from_mapping
from compress.recipe.renamed import TABLE, Renamed, find, translated
from compress.settings import defaults

#: What a pass needs besides the key in question.
NEEDED: dict[str, dict[str, Any]] = {
    "cast": {"weights": "int4"},
    "prune_unstructured": {"sparsity": 0.5},
    "prune_structured": {"mlp": 0.25},
    "factorize": {"keep_parameters": 0.5},
    "distill": {},
}
#: Values for keys whose values stay.
VALUES = {"warmup": 0.1, "average": 0.9, "rate": 0.001, "tune_rate": 0.1}
DATA = {name: {"files": ["text.txt"]} for name in ("training", "calibration")}


def cases() -> list[Any]:
    """Every key, and every old value of one, with a value it had."""
    found = []
    for entry in TABLE:
        for value in [*entry.values] or [VALUES.get(entry.old, 2)]:
            found.append(pytest.param(entry, value, id=f"{entry.section or 'recipe'}.{entry.old}-{value}"))
    return found


def old_recipe(entry: Renamed, value: Any) -> dict[str, Any]:
    first, _, rest = entry.old.partition(".")
    key = {first: {"folder": "cache", rest: value} if rest else value}
    passes_ = [{entry.section: {**NEEDED[entry.section], **key}}] if entry.section else [{"cast": NEEDED["cast"]}]
    return {"model": "m", "output": "o", "data": DATA, "passes": passes_, **({} if entry.section else key)}


@pytest.mark.parametrize(("entry", "value"), cases())
def test_renamed_key_is_refused_with_the_new_one(entry: Renamed, value: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(old_recipe(entry, value), check_files=False)
    (problem,) = caught.value.problems
    where, new = ("passes.0." if entry.section else ""), entry.value(value)
    assert problem.startswith(f"{where}{f'{entry.section}.' if entry.section else ''}{entry.old}: ")
    assert (f"is called `{entry.new.rpartition('.')[2]}` now" if entry.old != entry.new else f"`{new}` now") in problem
    text = (
        str(new) if isinstance(new, str) else "[asymmetric, alternating, curvature]" if new and new is not value else ""
    )
    assert text in problem


@pytest.mark.parametrize(("entry", "value"), cases())
def test_translated_recipe_is_valid_and_stays(entry: Renamed, value: Any) -> None:
    old = old_recipe(entry, value)
    new = translated(old)
    assert old == old_recipe(entry, value)
    assert translated(new) == new
    recipe = recipe_from_mapping(new, check_files=False)
    owner = recipe.passes[0].settings if entry.section else recipe
    for part in entry.new.split("."):
        owner = getattr(owner, part)
    assert owner == entry.value(value)


def test_renamed_defaults_are_unchanged() -> None:
    for section, old, value in [
        ("factorize", "allocation", "loss"),
        ("prune_structured", "widths", "even"),
        ("prune_structured", "score", "loss"),
        ("prune_structured", "layer_score", "loss"),
        ("prune_structured", "repair", "tune"),
    ]:
        entry = find(section, old)
        assert entry is not None
        assert defaults(passes.get(section).settings)[entry.new] == entry.value(value)


def test_renamed_refine_is_what_the_best_effort_does() -> None:
    entry = find("cast", "refine")
    assert entry is not None
    best = passes.get("cast").settings(weights="int4", effort="best")
    assert best.error_correction == entry.value(True)


def test_renamed_key_is_located_in_line_and_in_set(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\noutput: o\npasses:\n  - cast: {weights: bf16, refine: false}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["passes.0.cast.tune_epochs=0"], check_files=False)
    first, second = caught.value.problems
    assert first == (
        f"{path}:4:27: `refine` in cast is called `error_correction` now\n"
        "    4 |   - cast: {weights: bf16, refine: false}\n"
        "      |                           ^^^^^^\n"
        "   write `error_correction: []`"
    )
    assert second == (
        "--set passes.0.cast.tune_epochs=0: `tune_epochs` in cast is called `reconstruction_epochs` now\n"
        "   write `reconstruction_epochs: 0`"
    )


def test_renamed_keys_are_not_reused() -> None:
    for entry in TABLE:
        if entry.section and entry.old != entry.new:
            assert (
                entry.old.partition(".")[0] not in passes.get(entry.section).settings.model_fields or "." in entry.old
            )
