"""A recipe written out with every default reads back as the same recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_load import FULL

from compress.recipe import load_recipe, recipe_from_mapping, resolved, to_yaml
from compress.settings import Increase, Pattern


def test_resolved_full_recipe_round_trips(work: Path) -> None:
    Path("r.yaml").write_text(FULL)
    recipe = load_recipe(Path("r.yaml"))
    values = resolved(recipe)
    assert json.loads(json.dumps(values)) == values
    Path("again.yaml").write_text(to_yaml(values))
    again = load_recipe(Path("again.yaml"))
    assert again == recipe
    assert resolved(again) == values
    assert recipe_from_mapping(values) == recipe


def test_resolved_amounts_are_canonical(work: Path) -> None:
    Path("r.yaml").write_text(FULL)
    values = resolved(load_recipe(Path("r.yaml")))
    assert values["max_ram"] == 8 * 2**30
    assert values["passes"][0]["prune_structured"]["layers"] == [1, 3]
    assert values["passes"][1]["prune_unstructured"]["pattern"] == "2:4"
    assert values["gates"] == {
        "size": {"max": 1_000_000, "max_ratio": 0.4},
        "parameters": {"max": 1000},
        "bits_per_byte": {"max_increase": "5%"},
        "perplexity": {"max": 20.0, "max_increase": 0.5},
        "agreement": {"min": 0.95, "max_drop": 2.0},
        "memory": {"max_ratio": 0.9},
    }


def test_resolved_writes_out_defaults(work: Path) -> None:
    values = resolved(recipe_from_mapping({"model": "m", "output": "o", "passes": [{"cast": {"weights": "fp16"}}]}))
    assert values == {
        "model": "m",
        "output": "o",
        "store": "stock",
        "seed": 0,
        "device": "auto",
        "dtype": "float32",
        "max_ram": None,
        "max_vram": None,
        "threads": None,
        "evaluate_at": "stage",
        "document_separator": None,
        "max_shard_size": 5_000_000_000,
        "trust_remote_code": False,
        "ignore_auto_map": False,
        "allow_links": False,
        "offline": False,
        "data": {},
        "passes": [
            {
                "cast": {
                    "only": [],
                    "skip": [],
                    "allow_noop": False,
                    "effort": "balanced",
                    "scheme": None,
                    "weights": "fp16",
                    "bits": None,
                    "max_bytes": None,
                    "formats": ["int8", "int6", "int5", "int4", "int3", "int2"],
                    "overrides": {},
                    "group_size": None,
                    "fused_experts": None,
                    "convolutions": None,
                    "symmetric": True,
                    "method": "gptq",
                    "error_correction": ["asymmetric", "curvature"],
                    "curvature_tokens": 1024,
                    "reconstruction_epochs": 0,
                    "reconstruction_lr": 0.006,
                    "activations": None,
                    "kv_cache": None,
                    "kv_cache_scales": None,
                    "runtime": "transformers",
                    "smoothing": None,
                    "rotations": [],
                }
            }
        ],
        "evaluate": None,
        "gates": {},
        "confidence": 0.95,
        "bootstrap": 10_000,
        "export": [],
    }


names = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=12)
shares = (
    st.floats(0.001, 0.999) | st.integers(1, 99).map(lambda n: f"{n}%") | st.floats(0.01, 99.9).map(lambda x: f"{x:f}%")
)
patterns = st.tuples(st.integers(1, 7), st.integers(1, 8)).map(lambda t: f"{t[0]}:{t[0] + t[1]}")
entries = st.one_of(
    st.fixed_dictionaries(
        {"weights": st.sampled_from(["bf16", "fp16", "fp32"])}, optional={"skip": st.lists(names, max_size=2)}
    ).map(lambda s: {"cast": s}),
    shares.map(lambda s: {"prune_unstructured": {"method": "magnitude", "sparsity": s}}),
    patterns.map(lambda p: {"prune_unstructured": {"method": "magnitude", "pattern": p}}),
    st.lists(st.integers(0, 30), min_size=1, unique=True).map(
        lambda x: {"prune_structured": {"layers": x, "compensation": "none"}}
    ),
)
increases = st.floats(-10, 10) | st.decimals(-50, 500, places=3).map(lambda d: f"{d}%")
recipes = st.fixed_dictionaries(
    {
        "model": names,
        "output": names,
        "passes": st.lists(entries, min_size=1, max_size=4),
        "data": st.just({"evaluation": {"files": ["v.txt"]}}),
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "max_ram": st.integers(1, 10**15) | st.integers(1, 999).map(lambda n: f"{n}.5GiB"),
        "document_separator": names,
        "confidence": st.floats(0.51, 0.99),
        "gates": st.fixed_dictionaries(
            {},
            optional={
                "bits_per_byte": increases.map(lambda x: {"max_increase": x}),
                "size": shares.map(lambda s: {"max_ratio": s}),
                "agreement": st.fixed_dictionaries({"min": st.floats(0, 1), "max_drop": st.floats(0, 100)}),
            },
        ),
    },
)


@given(recipes)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_resolved_any_recipe_round_trips(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = recipe_from_mapping(values, check_files=False)
    file = tmp_path / "r.yaml"
    file.write_text(to_yaml(resolved(recipe)), encoding="utf-8")
    assert load_recipe(file, check_files=False) == recipe


@pytest.mark.parametrize("value", [0.05, 0.07, 0.29, 1 / 3, 1e-9, 0.1 + 0.2, -0.05])
def test_resolved_relative_increases_are_exact(work: Path, value: float) -> None:
    values: dict[str, Any] = {
        "model": "m",
        "output": "o",
        "data": {"evaluation": {"files": ["text/valid.txt"]}},
        "passes": [{"prune_unstructured": {"method": "magnitude", "pattern": Pattern(2, 4)}}],
        "gates": {"bits_per_byte": {"max_increase": Increase(value=value, relative=True)}},
    }
    (gate,) = recipe_from_mapping(values).gates.bits_per_byte
    assert gate.max_increase == Increase(value=value, relative=True)
