"""Plans of a 7B shape from headers alone: each pass has a peak, and a time at any machine's rates."""

from __future__ import annotations

import json

import pytest

import compress
from benchmarks import memory
from compress.work import TERMS, Rates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("large")
    memory.make(place / "in", memory.SHAPE, 2, weights=False)
    return place


@pytest.mark.parametrize(
    "entry",
    [
        {"cast": {"weights": "int4"}},
        {"cast": {"weights": "int4", "effort": "best"}},
        {"prune_unstructured": {"sparsity": 0.5}},
        {"prune_structured": {"mlp": "25%", "heads": "25%"}},
        {"factorize": {"keep_parameters": 0.7}},
        {"share": {"groups": 1}},
    ],
    ids=json.dumps,
)
def test_plan_of_a_7b_shape_has_a_peak_and_a_time(folder, entry):
    import torch
    from safetensors.torch import save_file

    ids = folder / "ids.safetensors"
    save_file({"ids": torch.zeros(8, 512, dtype=torch.int64)}, ids)
    plan = compress.plan({**memory.recipe(folder / "in", ids, entry), "store": "compact", "max_ram": "16GB"})
    (stage,) = plan.stages
    (planned,) = stage.passes
    assert planned.peak_memory > 2**30
    assert Rates({kind: (1e-12,) * len(terms) for kind, terms in TERMS.items()}).predict(planned.work) > 0
