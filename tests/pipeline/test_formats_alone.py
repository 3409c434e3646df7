"""Runs that change number formats alone build no model, and are checked all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import compress
from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.storage.compressed_tensors.write import KEY
from compress.errors import CheckpointError
from compress.pipeline.formats_alone import check_codes_config, formats_alone
from tests import pico
from tests.toolbox import apply, plan, write


@pytest.fixture(scope="module")
def llama():
    return open_checkpoint(pico.folder("llama", dtype=torch.bfloat16))


def test_other_number_formats_are_formats_alone(llama):
    assert formats_alone(llama.spec, plan(llama, "cast", scheme="FP8_DYNAMIC", method="rtn"))
    assert formats_alone(llama.spec, plan(llama, "cast", weights="fp32"))


def test_another_structure_or_a_missing_tensor_is_not(llama):
    spec = llama.spec
    assert not formats_alone(spec, plan(llama, "prune_structured", mlp="50%"))
    assert not formats_alone(spec, plan(llama, "cast", weights="int8", kv_cache="fp8", kv_cache_scales="tensor"))
    norm = next(t.name for t in model_map(spec).outside if len(t.shape) == 1)
    part = next(t.name for t in spec.stored() if model_map(spec).block_of(t.name) == 1)
    for name in (norm, part):
        short = replace(spec, tensors={n: t for n, t in spec.tensors.items() if n != name})
        assert not formats_alone(short, short), name
    experts = open_checkpoint(pico.folder("qwen3_moe")).spec
    assert not formats_alone(experts, experts)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"ignore": []}, {"weights": "int8", "skip": ["*down_proj"]}),
        ({"ignore": ["lm_head", "re:.*up_proj"]}, {"weights": "int8"}),
        ({"format": "int-quantized"}, {"weights": "int8"}),
    ],
)
def test_a_config_that_says_something_else_is_refused(llama, change, settings, tmp_path):
    written = write(apply(llama, "cast", method="rtn", **settings), tmp_path / "out")
    check_codes_config(open_checkpoint(written.folder))
    config = json.loads((written.folder / "config.json").read_text())
    config[KEY] |= change
    for group in config[KEY]["config_groups"].values():
        group["format"] = config[KEY]["format"]
    (written.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        check_codes_config(open_checkpoint(written.folder))


@pytest.mark.slow
def test_such_a_run_imports_no_transformers_and_writes_the_same_bytes(llama, tmp_path):
    """As one that is checked by the model's class."""
    recipe = {
        "model": str(llama.folder),
        "output": str(tmp_path / "out"),
        "passes": [{"cast": {"scheme": "FP8_DYNAMIC"}}],
    }
    recipe["passes"][0]["cast"]["method"] = "rtn"
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    code = (
        "import sys; from compress.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "run", tmp_path / "r.json", "--quiet"], check=True)
    other = compress.apply("cast", llama.folder, tmp_path / "other", scheme="FP8_DYNAMIC", method="rtn")
    read = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", other)]
    assert read[0] == read[1]
