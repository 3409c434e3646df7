"""``--set KEY=VALUE``: what it changes, and how its mistakes read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.passes.cast.settings import CastSettings
from compress.recipe import Recipe, load_recipe
from compress.settings import Pattern

Heads = Callable[..., list[str]]

TEXT = """\
model: m
output: o
data: {evaluation: {files: [text/valid.txt]}, calibration: {files: [text/train.txt]}}
passes:
  - prune_unstructured: {sparsity: 50%}
  - cast: &cast {weights: fp16}
  - cast: *cast
"""


def loaded(*sets: str) -> Recipe:
    Path("r.yaml").write_text(TEXT)
    return load_recipe(Path("r.yaml"), sets)


def test_set_values_are_yaml(work: Path) -> None:
    recipe = loaded(
        "seed=7", "offline=true", "evaluate=[kl]", "confidence=9e-1", "document_separator='3'", "output=a=b"
    )
    assert (recipe.seed, recipe.offline, recipe.metrics, recipe.confidence) == (7, True, ("kl",), 0.9)
    assert (recipe.document_separator, recipe.output) == ("3", "a=b")


def test_set_makes_new_keys_on_the_way(work: Path) -> None:
    gate = loaded("gates.size.max_ratio=40%", "gates.size.max=1MB").gates.size
    assert gate is not None
    assert (gate.max_ratio, gate.max) == (0.4, 1_000_000)


def test_set_changes_settings_of_a_pass(work: Path) -> None:
    settings = loaded("passes.0.prune_unstructured={pattern: 2:4}").passes[0].settings
    assert getattr(settings, "pattern", None) == Pattern(2, 4)


def test_set_replaces_a_whole_entry(work: Path) -> None:
    assert loaded("passes.0={cast: {weights: bf16}}").passes[0].settings == CastSettings(weights="bf16")


def test_set_gives_settings_to_bare_and_empty_entries(work: Path) -> None:
    assert loaded("passes.1=cast", "passes.1.cast.weights=bf16").passes[1].settings == CastSettings(weights="bf16")
    assert loaded("passes.1={cast: }", "passes.1.cast.weights=bf16").passes[1].settings == CastSettings(weights="bf16")


def test_set_changes_one_use_of_an_alias(work: Path) -> None:
    first, second = loaded("passes.1.cast.weights=bf16").passes[1:]
    assert (first.settings, second.settings) == (CastSettings(weights="bf16"), CastSettings(weights="fp16"))


def test_set_takes_quoted_keys_with_dots(work: Path) -> None:
    settings = loaded('passes.1.cast.overrides."model.layers.0.*"=fp32').passes[1].settings
    assert settings == CastSettings(weights="fp16", overrides={"model.layers.0.*": "fp32"})


def test_set_of_the_same_key_last_wins(work: Path) -> None:
    assert loaded("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seed", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("a..b=3", "expected KEY=VALUE"),
        ("seed=abc", "seed: expected an integer, got 'abc'"),
        ("seed=", "seed: expected an integer, got nothing"),
        ("sede=1", "unknown key `sede`"),
        ("gtaes.size.max=1", "unknown key `gtaes`"),
        ("gates.sise.max=1", "unknown key `sise` in gates"),
        ("model.name=x", "`model` is a single value, there is no `name` in it"),
        ("passes.3.cast.weights=fp16", "there is no `3` in `passes`, which has 3 entries, 0 to 2"),
        ("passes.-1.cast.weights=fp16", "there is no `-1` in `passes`, which has 3 entries, 0 to 2"),
        ("passes.99999999999=1", "there is no `99999999999` in `passes`, which has 3 entries, 0 to 2"),
        ("passes.0.cast.weights=fp16", "`passes.0` is prune_unstructured, not `cast`"),
        ("passes.1.cast.wieghts=fp16", "unknown key `wieghts` in cast"),
        (
            "passes.1.cast.weights=fp17",
            "weights: expected bf16, fp16, fp32, int8, int6, int5, int4, int3, int2, fp8, mxfp8, mxfp4, nvfp4, trellis4, trellis3 or trellis2, got 'fp17'",
        ),
        ("seed=[1", "not valid YAML: while parsing a flow sequence, expected ',' or ']', but got the end of the file"),
        ("data.evaluation={files: [gone.txt]}", "gone.txt: there is no such file"),
        ("data.evaluation.files.0=gone.txt", "gone.txt: there is no such file"),
        ("seed={a: 1, a: 2}", "duplicate key `a`"),
        ("extends=x.yaml", "`extends` cannot be set"),
        ("model=./gone", "./gone: there is no such folder"),
    ],
)
def test_set_tells_mistakes(heads: Heads, option: str, message: str) -> None:
    assert heads(TEXT, option)[0] == f"--set {option}: {message}"


def test_set_suggests_known_keys(problems: Heads) -> None:
    assert problems(TEXT, "passes.0.prune_unstructred.sparsity=0.6") == [
        "--set passes.0.prune_unstructred.sparsity=0.6: `passes.0` is prune_unstructured, not `prune_unstructred`\n"
        "   did you mean `passes.0.prune_unstructured.sparsity`?"
    ]
    assert problems(TEXT, "passes.cast.weights=bf16")[0].endswith("did you mean `passes.1.cast.weights`?")
    assert problems(TEXT, "gaets.size.max=1")[0].endswith("did you mean `gates`?")


def test_set_mistakes_follow_those_of_files_in_order(heads: Heads) -> None:
    assert heads(TEXT + "sede: 1\n", "threads=x", "bootstrap=x") == [
        "r.yaml:8:1: unknown key `sede`",
        "--set threads=x: threads: expected an integer, got 'x'",
        "--set bootstrap=x: bootstrap: expected an integer, got 'x'",
    ]
