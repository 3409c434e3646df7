"""Words of other tools, schemes and percentages get a did-you-mean with the right spelling, at their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compress
from compress import passes
from compress.errors import CompressError, RecipeError
from compress.recipe import recipe_from_mapping
from compress.recipe.messages import _fields
from compress.recipe.suggest import SYNONYMS, VALUES, scheme
from compress.settings import parse_level, parse_share


def problems(**changes: Any) -> list[str]:
    recipe = {"model": "m", "output": "o", "passes": [{"cast": {"weights": "bf16"}}], **changes}
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(recipe, check_files=False)
    return caught.value.problems


@pytest.mark.parametrize(
    ("changes", "where", "hint"),
    [
        ({"passes": ["quantize"]}, "passes.0: unknown pass `quantize`", "; did you mean `cast`?"),
        ({"passes": [{"prune": {"sparsity": 0.5}}]}, "passes.0: unknown pass `prune`", "; did you mean `prune_unstructured` or `prune_structured`?"),
        ({"passes": [{"wanda": None}]}, "passes.0: unknown pass `wanda`", "; did you mean `prune_unstructured`?"),
        ({"evaluate": ["bpb"]}, "evaluate.0: expected bits_per_byte", "did you mean `bits_per_byte`?"),
        ({"gates": {"bpb": {"max": 1}}}, "gates.bpb: unknown key `bpb` in gates", "did you mean `bits_per_byte`?"),
        ({"gates": {"accuracy": {"min": 95}}}, "gates.accuracy.min: min: expected a share from 0 to 1", "did you mean `95%`?"),
        ({"device": "gpu"}, "device: device: expected auto, cpu", "did you mean `cuda`?"),
        ({"device": "gpu:1"}, "device: device: expected auto, cpu", "did you mean `cuda:1`?"),
        ({"dtype": "bf16"}, "dtype: dtype: expected float32", "did you mean `bfloat16`?"),
        ({"data": {"train": {"files": ["x.txt"]}}}, "data.train: unknown key `train` in data", "; did you mean `training`?"),
        ({"passes": [{"prune_unstructured": {"sparsity": 50}}]}, "passes.0.prune_unstructured.sparsity: sparsity: expected a share", "did you mean `50%`?"),
        ({"passes": [{"prune_unstructured": {"sparsity": "50"}}]}, "passes.0.prune_unstructured.sparsity: sparsity: expected a share", "did you mean `50%`?"),
        ({"passes": [{"prune_structured": {"keep_parameters": 60}}]}, "passes.0.prune_structured.keep_parameters: keep_parameters: expected a share", "did you mean `60%`?"),
        ({"passes": [{"distill": {"lr": 1e-3}}]}, "passes.0.distill.lr: unknown key `lr` in distill", "did you mean `learning_rate`? (all: `compress passes distill`)"),
        ({"passes": [{"cast": {"weights": "int4", "ignore": ["x"]}}]}, "passes.0.cast.ignore: unknown key `ignore` in cast", "did you mean `skip`? (all: `compress passes cast`)"),
        ({"evaluate": {"kl": None}}, "evaluate: evaluate: expected a list", "write a list: `- kl`"),
        ({"gates": ["size"]}, "gates: gates: expected a mapping", "write a mapping: `size: {max_ratio: 0.5}`"),
        ({"gates": {"size": "30MB"}}, "gates.size: size: expected a mapping", "write `size: {max: 30MB}`"),
        ({"gates": {"size": "40%"}}, "gates.size: size: expected a mapping", "write `size: {max_ratio: 40%}`"),
        ({"gates": {"bits_per_byte": "3%"}}, "gates.bits_per_byte: bits_per_byte: expected", "write `bits_per_byte: {max_increase: 3%}`"),
        ({"data": {"calibration": "text.txt"}}, "data.calibration: calibration: expected a mapping", "write a mapping, `{files: [FILE]}`, or `default`"),
        ({"passes": [{"prune_unstructured": {"pattern": "4:2"}}]}, "passes.0.prune_unstructured.pattern: pattern: expected an N:M", "did you mean `2:4`?"),
        ({"passes": [{"cast": {"weights": "W4A16"}}]}, "passes.0.cast.weights: weights: expected bf16", "did you mean `scheme: W4A16`?"),
        ({"passes": [{"cast": {"weights": "q4_k_m"}}]}, "passes.0.cast.weights: weights: expected bf16", "q4_k_m is a type of llama.cpp, whose files are not written: the nearest is `weights: int4`"),
        ({"passes": [{"cast": {"weights": "int4", "overrides": {"*": "FP8"}}}]}, "passes.0.cast.overrides.*: *: expected bf16", "did you mean `fp8`?"),
        ({"passes": [{"cast": {"scheme": "int8"}}]}, "passes.0.cast.scheme: scheme: expected W4A16", "write `weights: int8`"),
        ({"passes": [{"cast": {"scheme": "w8a8"}}]}, "passes.0.cast.scheme: scheme: expected W4A16", "did you mean `scheme: W8A8`?"),
        ({"passes": [{"cast": {"scheme": "MXFP6A16"}}]}, "passes.0.cast.scheme: scheme: expected W4A16", "MXFP6A16 has weights in mxfp6, which `cast` cannot write yet: use `scheme: W6A16`"),
        ({"passes": [{"cast": {"format": "W8A8"}}]}, "passes.0.cast.format: unknown key `format` in cast", "did you mean `scheme: W8A8`?"),
        ({"passes": [{"cast": {"weights": "int4", "format": "int4"}}]}, "passes.0.cast.format: unknown key `format` in cast", "did you mean `weights`? (all: `compress passes cast`)"),
        ({"passes": [{"cast": {"weights": 4}}]}, "passes.0.cast.weights: weights: expected bf16", "did you mean `int4`?"),
        ({"passes": [{"cast": {"weights": "int4", "overrides": {"*": "W8A16"}}}]}, "passes.0.cast.overrides.*: *: expected bf16", "did you mean `int8`?"),
        ({"passes": [{"cast": {"weights": "int4", "error_correction": ["gptaq"]}}]}, "passes.0.cast.error_correction.0: expected asymmetric", "did you mean `asymmetric`?"),
    ],
)  # fmt: skip
def test_suggest_answers_a_word_of_another_tool(changes: dict[str, Any], where: str, hint: str) -> None:
    (problem,) = [p for p in problems(**changes) if "needs" not in p and "is measured on" not in p]
    head, *lines = problem.splitlines()
    assert head.startswith(where)
    assert len(lines) == 1
    assert lines[0].endswith(hint)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("W4A16", "did you mean `scheme: W4A16`?"),
        ("w4a16_asym", "did you mean `scheme: W4A16_ASYM`?"),
        ("W8A8-INT", "did you mean `scheme: W8A8`?"),
        ("W8AFP8", "did you mean `scheme: FP8_DYNAMIC`?"),
        ("FP8", "did you mean `scheme: FP8`?"),
        ("FP8_DYNAMIC", "did you mean `scheme: FP8_DYNAMIC`?"),
        ("NVFP4", "did you mean `scheme: NVFP4`?"),
        ("INT4", "write `weights: int4`"),
        ("BF16", "write `weights: bf16`"),
        ("W4A8", "did you mean `scheme: W4A8`?"),
        ("W7A16", "W7A16 has 7-bit weights, which `cast` cannot write yet: use `scheme: W8A16`"),
        ("Q4_K_M", "Q4_K_M is a type of llama.cpp, whose files are not written: the nearest is `weights: int4`"),
        ("W1A16", None),
        ("int5", None),
    ],
)  # fmt: skip
def test_scheme_is_answered_with_the_setting(name: str, answer: str | None) -> None:
    assert scheme(name) == answer


def test_suggest_says_once_that_a_key_has_another_name() -> None:
    """A key that is missing because another was written in its place is no second mistake."""
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping({"model": "m", "output": "o", "steps": [{"cast": {"weights": "bf16"}}]}, check_files=False)
    assert caught.value.problems == ["steps: unknown key `steps`\n   did you mean `passes`?"]
    assert str(caught.value) == caught.value.problems[0]  # one mistake needs no count


def test_suggest_refuses_a_bound_that_nothing_exceeds() -> None:
    (problem,) = problems(gates={"size": {"max_ratio": "300%"}})
    assert (
        problem
        == "gates.size.max_ratio: max_ratio: expected a ratio above 0 and up to 2, such as 0.4 or 40%, got '300%'"
    )


def test_suggest_names_a_method_that_reads_no_data() -> None:
    (problem,) = problems(passes=[{"cast": {"weights": "int8"}}])
    assert problem.endswith("or `calibration: default`; `method: rtn` reads none")


def test_synonyms_name_existing_keys() -> None:
    for section, words in SYNONYMS.items():
        if section == "passes":
            known = set(passes.names())
        elif section == "evaluate":
            known = {"latency", *_fields(("gates",))} - {"prefill", "decode", "size", "parameters", "cache"}
        elif section in passes.names():
            known = set(_fields(("passes", 0, section)))
        else:
            known = set(_fields(tuple(section.split(".")) if section else ()))
        assert not known & words.keys(), section
        assert {right for meant in words.values() for right in meant} <= known, section


def test_synonyms_name_accepted_values() -> None:
    for key, words in VALUES.items():
        for wrong, meant in words.items():
            assert wrong not in meant, key


@pytest.mark.parametrize("parse", [parse_share, parse_level])
def test_suggest_answers_a_fraction_with_a_percentage(parse: Any) -> None:
    assert parse("50%") == 0.5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("quantize", {}, "no pass is called `quantize`; did you mean `cast`?"),
        ("cast", {"weights": "int4", "refine": False}, "cast.refine: `refine` in cast is called `error_correction` now; write `error_correction: []`"),
        ("cast", {"weights": "FP8"}, "cast.weights: expected bf16, fp16, fp32, int8, int6, int5, int4, int3, int2, fp8, mxfp8, mxfp4, nvfp4, trellis4, trellis3 or trellis2, got 'FP8'; did you mean `scheme: FP8`?"),
        ("prune_unstructured", {"sparsity": 50}, "prune_unstructured.sparsity: expected a share between 0 and 1, such as 50% or 0.5, got 50; did you mean `50%`?"),
        ("cast", {}, "cast: give one of `scheme`, `weights`, `bits` and `max_bytes`"),
    ],
)  # fmt: skip
def test_suggest_answers_settings_given_in_python(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressError) as caught:
        compress.apply(name, tmp_path / "model", tmp_path / "out", **settings)
    assert str(caught.value) == message
