"""The sample recipe in each pass's docstring parses and plans on the example model."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

import compress
from compress import passes
from compress.architectures.cache import cache_bytes
from compress.passes.describe import describe

ROOT = Path(__file__).resolve().parents[2]
REST = {"model": "examples/tiny-lm", "output": "out/sample", "document_separator": "<|doc|>"}

#: Passes that take encoders alone, and a model for them.
OF_ENCODERS, ENCODER = {"low_rank_attention"}, "examples/tiny-classifier"


@pytest.mark.parametrize("name", passes.TABLE)
def test_sample_recipe_plans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sample = YAML(typ="safe").load(describe(name)["sample"])
    text = {"files": ["examples/text/train.txt"]}
    data = {
        key: {**section, **text}
        for key, section in {"training": {}, "calibration": {}, **sample.get("data", {})}.items()
    }

    rest = {**REST, "model": ENCODER} if name in OF_ENCODERS else REST

    planned = compress.plan({**rest, **sample, "data": data})

    steps = [step for stage in planned.stages for step in stage.passes]
    assert name in [step.name for step in steps]
    if name in OF_ENCODERS:  # saves arithmetic, not bytes
        return
    cached = [cache_bytes(spec, 1024) for spec in (planned.original_spec, steps[-1].spec)]
    before, after = planned.original, steps[-1].size
    assert after.bytes < before.bytes or after.active_parameters < before.active_parameters or cached[1] < cached[0]
