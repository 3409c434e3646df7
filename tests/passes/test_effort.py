"""`effort` chooses the defaults of other settings, and nothing else."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from pydantic import Field

from compress import passes
from compress.errors import RecipeError
from compress.passes.base import PassSettings, chosen_by_effort
from compress.passes.describe import describe
from compress.passes.effort import EFFORTS, Effort, EffortDefaults
from compress.recipe import recipe_from_mapping, resolved

#: Passes with the setting ▶ settings that they need.
NEEDED: dict[str, dict[str, Any]] = {
    "carve_experts": {},
    "cast": {"weights": "int4"},
    "factorize": {"keep_parameters": "60%"},
    "latent_attention": {"max_cache": "75%"},
    "prune_structured": {"mlp": "25%"},
    "prune_unstructured": {"sparsity": "50%"},
    "share": {"groups": 2},
}


def settings_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe of one pass, resolved."""
    recipe = recipe_from_mapping(
        {
            "model": "m",
            "output": "o",
            "data": {"calibration": {"files": ["a.txt"]}},
            "passes": [{name: NEEDED[name] | given}],
        },
        check_files=False,
    )
    settings: dict[str, Any] = resolved(recipe)["passes"][0][name]
    return settings


def test_every_pass_with_efforts_is_tested() -> None:
    assert {name for name in passes.names() if passes.get(name).settings.efforts is not None} == NEEDED.keys()


@pytest.mark.parametrize("name", NEEDED)
def test_effort_chooses_defaults_and_what_is_given_wins(name: str) -> None:
    efforts = passes.get(name).settings.efforts
    for effort in EFFORTS:
        defaults = dict(efforts.table[effort])
        by_hand = settings_of(name, defaults)
        assert settings_of(name, {"effort": effort}) == by_hand | {"effort": effort}
        given = efforts.table["fast" if effort == "best" else "best"]
        for key in efforts.keys:
            assert settings_of(name, {"effort": effort, key: given[key]})[key] == given[key]
    assert settings_of(name, {}) == settings_of(name, {"effort": "balanced"})


@pytest.mark.parametrize("name", NEEDED)
def test_effort_is_described_with_the_defaults_of_each(name: str) -> None:
    rows = {row["name"]: row for row in describe(name)["settings"]}
    efforts = passes.get(name).settings.efforts
    for effort in EFFORTS:
        assert f"`{effort}`: {efforts.shown(effort)}" in rows["effort"]["description"]
    assert {key: rows[key]["default"] for key in efforts.keys} == dict(efforts.table["balanced"])


def test_plan_says_what_the_effort_chose() -> None:
    instance = passes.get("prune_unstructured")

    def note(**given: Any) -> list[str]:
        return chosen_by_effort(instance, instance.settings(sparsity=0.5, effort="best", **given))

    rest = "`reconstruction_epochs: 15`, `reconstruction_lr: 0.015`, `allocation: auto`"
    assert note() == [f"effort best chooses `method: alps`, {rest}"]
    assert note(method="wanda") == [f"effort best chooses {rest}"]
    assert note(method="wanda", reconstruction_epochs=1, reconstruction_lr=0.1, allocation="owl") == []
    assert note(method="magnitude") == []  # reads no data
    structured = passes.get("prune_structured")
    assert len(chosen_by_effort(structured, structured.settings(mlp=0.25))) == 1
    assert chosen_by_effort(structured, structured.settings(mlp=0.25, compensation="none")) == []
    cast = passes.get("cast")
    assert chosen_by_effort(cast, cast.settings(weights="int3")) != []
    assert chosen_by_effort(cast, cast.settings(weights="int8")) == []
    assert chosen_by_effort(cast, cast.settings(weights="int3", method="mse", kv_cache="fp8")) == []


def _model(efforts: EffortDefaults, key: str, field: Any) -> None:
    namespace = {
        "__module__": __name__,
        "__annotations__": {"efforts": ClassVar[EffortDefaults | None], "effort": Effort, key: int},
        "efforts": efforts,
        "effort": efforts.setting(),
        key: field,
    }
    type(PassSettings)("Wrong", (PassSettings,), namespace)


def test_wrong_tables_are_refused_when_their_class_is_made() -> None:
    good = EffortDefaults(fast={"epochs": 0}, balanced={"epochs": 1}, best={"epochs": 2})
    field = Field(default_factory=good.of("epochs"), ge=0)
    _model(good, "epochs", field)
    with pytest.raises(TypeError, match="no field after `effort`"):
        _model(good, "rounds", field)
    with pytest.raises(TypeError, match="does not take its default"):
        _model(good, "epochs", Field(default=1))
    uneven = EffortDefaults(fast={}, balanced={"epochs": 1}, best={"epochs": 2})
    with pytest.raises(TypeError, match="effort fast does not set epochs"):
        _model(uneven, "epochs", field)
    negative = EffortDefaults(fast={"epochs": -1}, balanced={"epochs": 1}, best={"epochs": 2})
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        _model(negative, "epochs", Field(default_factory=negative.of("epochs"), ge=0))


def test_unknown_effort_is_one_error_at_its_place() -> None:
    with pytest.raises(RecipeError) as caught:
        settings_of("cast", {"effort": "slow"})
    assert str(caught.value).count("expected") == 1
    assert "passes.0.cast.effort: effort: expected fast, balanced or best" in str(caught.value)
