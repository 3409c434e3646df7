from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress.evaluation.latency_settings import LatencySettings
from compress.recipe import load_recipe, read_metrics, recipe_from_mapping, recipe_schema, resolved
from compress.recipe.metric_entries import MetricEntry

TEXT = """\
model: m
output: o
passes:
  - cast: {weights: fp16}
evaluate:
  - kl
  - latency:
      lengths: [2048, 512]
"""


def loaded(*sets: str, text: str = TEXT) -> Any:
    Path("r.yaml").write_text(text + "data: {evaluation: {files: [text/valid.txt]}}\n")
    return load_recipe(Path("r.yaml"), sets, check_files=False)


def test_evaluate_takes_names_and_settings(work: Path) -> None:
    recipe = loaded()
    assert recipe.evaluate == (MetricEntry("kl"), MetricEntry("latency", LatencySettings(lengths=(512, 2048))))
    assert recipe.metrics == ("kl", "latency")
    assert recipe.settings_of("latency") == LatencySettings(lengths=(512, 2048), generated=32)
    assert recipe.settings_of("kl") is None
    values = resolved(recipe)
    assert values["evaluate"] == ["kl", {"latency": {"lengths": [512, 2048], "rounds": None, "generated": 32}}]
    assert recipe_from_mapping(values, check_files=False) == recipe


@pytest.mark.parametrize("entry", ["latency", "{latency: }", "{latency: {}}"])
def test_metric_without_settings_is_its_name(entry: str, work: Path) -> None:
    recipe = loaded(f"evaluate=[{entry}, {{kl: }}]")
    assert resolved(recipe)["evaluate"] == ["latency", "kl"]
    assert recipe.settings_of("latency") == LatencySettings()


def test_set_changes_settings_of_a_metric(work: Path) -> None:
    assert loaded("evaluate.1.latency.generated=4").settings_of("latency").generated == 4
    assert loaded("evaluate=[latency]", "evaluate.0.latency.lengths=[64]").settings_of("latency").lengths == (64,)


@pytest.mark.parametrize(
    ("entries", "message", "line"),
    [
        ("[{latency: {length: [512]}}]", "r.yaml:5:23: unknown key `length` in latency", "did you mean `lengths`?"),
        ("[{latency: {lengths: 512}}]", "r.yaml:5:32: lengths: expected a list, got 512", "write [512]"),
        ("[{latency: {lengths: [0]}}]", "r.yaml:5:33: expected 1 or more, got 0", ""),
        ("[{latency: {lengths: []}}]", "r.yaml:5:32: lengths: expected at least 1 entry, got an empty list", ""),
        ("[{latency: {lengths: [9, 9]}}]", "r.yaml:5:32: the length 9 is named twice", ""),
        ("[{latncy: {lengths: [9]}}]", "r.yaml:5:13: unknown metric `latncy`", "did you mean `latency`?"),
        ("[{kl: {lengths: [9]}}]", "r.yaml:5:13: kl has no settings", "write `kl`"),
        ("[{kl: 3}]", "r.yaml:5:13: kl: expected a mapping of settings, got 3", "write `kl`"),
        ("[{kl: , latency: }]", "r.yaml:5:12: expected one metric, got `kl`, `latency`", "an entry is `- name`"),
        ("[bpb]", "r.yaml:5:12: expected bits_per_byte, perplexity", "did you mean `bits_per_byte`?"),
        ("[3]", "r.yaml:5:12: expected a metric, as `name` or `name: {settings}`", ""),
        ("[kl, {kl: }]", "r.yaml:5:11: `kl` is named twice", ""),
    ],
)
def test_mistakes_in_evaluate_are_located(entries: str, message: str, line: str, work: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(text=TEXT.partition("evaluate:")[0] + f"evaluate: {entries}\n")
    assert message in str(caught.value)
    assert line in str(caught.value)


def test_metric_with_settings_needs_data_like_its_name(work: Path) -> None:
    mapping = {"model": "m", "output": "o", "passes": [{"cast": {"weights": "fp16"}}], "evaluate": [{"kl": None}]}
    with pytest.raises(RecipeError, match=r"evaluate.0: kl needs evaluation text"):
        recipe_from_mapping(mapping, check_files=False)


GATED = TEXT + "gates:\n  prefill: {at: 512, max_ratio: 80%}\n"


def test_gates_take_a_length_and_a_list(work: Path) -> None:
    recipe = loaded(
        "gates.decode=[{max_ratio: 0.9}, {at: 2048, max_ratio: 0.7}]", "gates.cache={at: 99, max: 1MB}", text=GATED
    )
    values = resolved(recipe)["gates"]
    assert values == {
        "prefill": {"at": 512, "max_ratio": 0.8},
        "decode": [{"max_ratio": 0.9}, {"at": 2048, "max_ratio": 0.7}],
        "cache": {"at": 99, "max": 1_000_000},
    }
    assert recipe.metrics == ("kl", "latency")
    assert recipe_from_mapping(resolved(recipe), check_files=False) == recipe


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ("gates.prefill.at=4096", "the gate prefill needs a prompt of 4096 tokens, which is not measured", "lengths: [512, 2048, 4096]"),
        ("gates.memory=[{max_ratio: 1}, {at: 64, max_ratio: 1}]", "the gate memory needs a prompt of 64 tokens", "lengths: [64, 512, 2048]"),
        ("evaluate=[kl]", "r.yaml:10:17: the gate prefill needs a prompt of 512 tokens", "`- latency: {lengths: [512]}`"),
        ("gates.prefill={at: 512}", "a gate needs a bound: `max_ratio`", ""),
        ("gates.cache={max: 3}", "`at` is missing in gates.cache", "Tokens of the text"),
        ("gates.cache={at: 3}", "a gate needs a bound: `max` or `max_ratio`", ""),
        ("gates.cache=[]", "expected a gate or a list of gates, got an empty list", ""),
        ("gates.cache=3", "cache: expected a mapping, got 3", ""),
        ("gates.cache={at: 3, max_rato: 1}", "unknown key `max_rato` in gates.cache", "did you mean `max_ratio`?"),
        ("gates.decode={at: x, max_ratio: 1}", "at: expected an integer, got 'x'", ""),
        ("gates.decode=[{at: 512, max_ratio: -1}]", "max_ratio: expected a ratio above 0", ""),
    ],
)  # fmt: skip
def test_mistakes_in_gates_at_a_length_are_located(change: str, message: str, hint: str, work: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(change, text=GATED)
    assert message in str(caught.value)
    assert hint in str(caught.value)


def test_read_metrics_reads_options_of_the_command_line() -> None:
    entries = read_metrics(["kl", "latency.lengths=[64, 16]", "latency.generated=4", "memory"])
    assert [entry.name for entry in entries] == ["kl", "latency", "memory"]
    assert entries[1].settings == LatencySettings(lengths=(16, 64), generated=4)
    assert read_metrics(["latency"])[0].plain
    for option, message in (
        ("latency.length=[3]", "--metric latency.length=\\[3\\]: unknown key `length` in latency"),
        ("latency=3", "takes settings"),
        ("latency.lengths=[x]", "expected an integer"),
        ("bleu", "--metric bleu: expected bits_per_byte"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_metrics([option])


def test_schema_knows_settings_of_metrics() -> None:
    schema = recipe_schema()
    names, *entries = schema["properties"]["evaluate"]["anyOf"][0]["items"]["oneOf"]
    assert "latency" in names["enum"]
    assert {name for entry in entries for name in entry["properties"]} >= {"latency"}
    cache = schema["$defs"]["Gates"]["properties"]["cache"]["anyOf"]
    assert {"$ref": "#/$defs/CacheGate"} in cache
    assert "lengths" in schema["$defs"]["LatencySettings"]["properties"]
