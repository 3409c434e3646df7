"""Older names of config fields are written beside the newer ones, and are dropped on opening."""

from __future__ import annotations

import json

import pytest
import transformers

from compress.checkpoint.older_keys import with_older_keys, without_older_keys
from compress.checkpoint.open import open_checkpoint
from tests import pico
from tests.toolbox import apply, plan, write

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_theta": 1e4}),
        (
            {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
            {
                "rope_theta": 5000.0,
                "rope_scaling": {key: value for key, value in YARN.items() if key != "rope_theta"},
                "partial_rotary_factor": 0.5,
            },
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {}),
        ({"torch_dtype": "float16", "rope_theta": 1e6}, {}),
    ],
)
def test_older_keys_repeat_the_newer_ones(newer, older):
    config = {"model_type": "llama", **newer}
    assert with_older_keys(config) == {**config, **older}
    assert without_older_keys(with_older_keys(config)) == config


def test_fields_that_say_something_else_stay():
    config = {"dtype": "float32", "torch_dtype": "bfloat16", "rope_parameters": {"rope_theta": 1.0}, "rope_theta": 2.0}
    assert with_older_keys(config) == without_older_keys(config) == config


@pytest.mark.parametrize("parameters", [YARN, {"rope_type": "default", "rope_theta": 5000.0}])
def test_transformers_reads_the_same_config(parameters):
    config = {"model_type": "llama", "dtype": "bfloat16", "rope_parameters": parameters}
    one, other = (transformers.AutoConfig.for_model(**c) for c in (config, with_older_keys(config)))
    assert one.rope_parameters == other.rope_parameters
    assert one.dtype == other.dtype


def test_the_config_that_is_read_is_the_planned_one(tmp_path):
    before = open_checkpoint(pico.folder("llama"))
    planned = plan(before, "cast", weights="bf16")
    written = write(apply(before, "cast", weights="bf16"), tmp_path / "out")
    assert written.spec.structure == planned.structure
    config = json.loads((written.folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
