"""`cast: {error_correction: […]}`: every combination works, does what it says alone, and wrong lists are refused."""

from __future__ import annotations

from itertools import chain, combinations
from pathlib import Path

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.errors import RecipeError
from compress.passes.cast.settings import CORRECTIONS, CastSettings
from compress.recipe import recipe_from_mapping, resolved
from tests import pico
from tests.toolbox import apply, plan

SUBSETS = list(chain.from_iterable(combinations(CORRECTIONS, n) for n in range(len(CORRECTIONS) + 1)))


def codes(folder: Path, work: Path, correction: tuple[str, ...]) -> dict[str, torch.Tensor]:
    data = Batches(torch.randint(2, 250, (8, 16), generator=torch.Generator().manual_seed(1)))
    settings = {"weights": "int3", "group_size": 16, "error_correction": [*correction], "reconstruction_epochs": 0}
    cast = apply(open_checkpoint(folder), "cast", data=data, work=work, **settings)
    return {t.name: cast.tensor(t.name).codes.codes for t in cast.spec.stored() if t.quant_format is not None}


@pytest.mark.slow
def test_error_correction_combinations_give_different_codes(tmp_path: Path) -> None:
    folder = pico.folder("llama", num_hidden_layers=2)
    by_subset = {subset: codes(folder, tmp_path / "-".join(subset or ["none"]), subset) for subset in SUBSETS}
    for first, second in combinations(SUBSETS, 2):
        assert any(not torch.equal(by_subset[first][n], by_subset[second][n]) for n in by_subset[first]), (
            first,
            second,
        )
    for subset in SUBSETS:
        assert (tmp_path / "-".join(subset or ["none"]) / "gradients").exists() == ("curvature" in subset)
    # nothing is quantised before the first matrices, so there is no error for `asymmetric` to correct
    first = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(by_subset[()][first], by_subset["asymmetric",][first])


def test_error_correction_has_one_order() -> None:
    assert CastSettings(weights="int4", error_correction=[*reversed(CORRECTIONS)]).error_correction == [*CORRECTIONS]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["gptq"], "passes.0.cast.error_correction.0: expected asymmetric, alternating or curvature, got 'gptq'"),
        (["curvature", "curvature"], "passes.0.cast.error_correction: `curvature` is named twice"),
        ("asymmetric", "passes.0.cast.error_correction: error_correction: expected a list, got 'asymmetric'\n   write [asymmetric]"),
        (True, "passes.0.cast.error_correction: error_correction: expected a list, got True"),
    ],
)  # fmt: skip
def test_error_correction_refuses_wrong_lists_in_place(value: object, message: str) -> None:
    passes = [{"cast": {"weights": "int4", "error_correction": value}}]
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({"model": "m", "output": "o", "passes": passes}, check_files=False)
    assert message in str(caught.value)


def test_error_correction_empty_list_stays_when_resolved() -> None:
    passes = [{"cast": {"weights": "int4", "error_correction": []}}]
    data = {"calibration": {"files": ["text.txt"]}}
    recipe = recipe_from_mapping({"model": "m", "output": "o", "data": data, "passes": passes}, check_files=False)
    assert resolved(recipe)["passes"][0]["cast"]["error_correction"] == []
    assert recipe_from_mapping(resolved(recipe), check_files=False) == recipe


def test_error_correction_memory_counts_measured_curvatures_only() -> None:
    from compress import passes

    instance, spec = passes.get("cast"), open_checkpoint(pico.folder("llama", num_hidden_layers=2)).spec
    needs = {
        s: instance.memory(spec, CastSettings(weights="int4", group_size=16, error_correction=[*s]), 4) for s in SUBSETS
    }
    assert needs["asymmetric", "alternating"] <= needs[CORRECTIONS]
    assert needs[()] <= needs["alternating",]
    assert plan(
        open_checkpoint(pico.folder("llama", num_hidden_layers=2)),
        "cast",
        weights="int4",
        group_size=16,
        error_correction=[],
    )
