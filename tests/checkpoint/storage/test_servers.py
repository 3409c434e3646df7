"""Rules of servers: which of the configs that `cast` writes vLLM and SGLang open. The rules were run in their sources too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.patterns import Matcher
from compress.checkpoint.storage.compressed_tensors.servers import SERVERS, refusals, servers_note
from compress.checkpoint.storage.compressed_tensors.write import render
from compress.passes.cast.schemes import SCHEMES
from compress.passes.cast.settings import _INPUTS
from compress.spec.formats import FIXED_GROUPS, INTEGERS, QuantFormat
from tests import pico
from tests.passes.cast.test_schemes import SIZES
from tests.toolbox import plan

#: Scheme ▶ where vLLM and SGLang compute with it.
SERVED = {
    **dict.fromkeys(("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "NVFP4A16", "NVFP4"), ("Turing", "Turing")),
    **dict.fromkeys(("FP8", "FP8_DYNAMIC", "FP8_BLOCK"), ("Ada", "Ada")),
    **dict.fromkeys(("MXFP4A16", "MXFP4", "MXFP4XFP8"), ("Ampere", None)),
    **dict.fromkeys(("MXFP8A16", "MXFP8"), ("Turing", None)),
    "W4AFP8": ("Hopper", None),
}


@pytest.fixture(scope="module")
def llama():
    return open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))


def test_schemes_open_where_the_table_says(llama):
    for name in SCHEMES:
        spec = plan(llama, "cast", scheme=name)
        for server, place in zip(SERVERS, SERVED.get(name, ("humming", None)), strict=True):
            formats = {t.quant_format for t in spec.stored() if t.quant_format is not None}
            assert [place in str(server.kernel(f)) if place else server.kernel(f) is None for f in formats] == [True], (
                name
            )
            assert bool(refusals(spec, server)) == (place is None), name
    spec = plan(llama, "cast", scheme="W3A16")
    assert servers_note(spec) == (
        "vLLM 0.32 opens it on GPUs with the package humming; SGLang 0.5.23 does not open it: no scheme for int3 in groups of "
        "128 (model.layers.0.mlp.down_proj.weight)"
    )


def test_every_format_that_cast_writes_has_a_scheme_in_vllm():
    """With groups of their kernels; fp8 in groups of a number is refused, and so is what the group size of W4AFP8 is not."""
    vllm, sglang = SERVERS
    for format_, inputs in _INPUTS.items():
        bits, block = INTEGERS.get(format_), format_ == "fp8 in blocks"
        groups = (0, 32, 64, 128) if bits and bits < 8 else (128 if block else FIXED_GROUPS.get(format_, 0),)
        for group in groups:
            for activations in (None, *inputs):
                f = QuantFormat("fp8" if block else format_, group, activations=activations, block=block)
                assert (vllm.kernel(f) is None) == (activations == "fp8" and format_ == "int4" and group != 128), f
                assert sglang.kernel(f) is None or vllm.kernel(f) is not None
    assert vllm.kernel(QuantFormat("fp8", 64)) is sglang.kernel(QuantFormat("fp8", 64)) is None
    assert vllm.kernel(QuantFormat("int8", symmetric=False, activations="int8")) is None


def test_joined_matrices_of_two_formats_are_refused(llama):
    same = plan(llama, "cast", weights="int4", method="rtn", overrides={"*o_proj": "int8", "*down_proj": "int8"})
    other = plan(llama, "cast", weights="int4", method="rtn", overrides={"*v_proj": "int8"})
    for server in SERVERS:
        assert refusals(same, server) == []
        assert refusals(other, server) == [
            "model.layers.0.self_attn.q_proj and model.layers.0.self_attn.v_proj have different formats, and it joins them"
        ]


def test_blocks_cut_by_joining_are_refused(llama):
    """All but the last joined matrix have whole blocks."""
    blocks, narrow = QuantFormat("fp8", 128, block=True, activations="fp8-group"), {**SIZES, "num_key_value_heads": 2}
    base = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **narrow)).spec
    spec = base.map(lambda t: replace(t, quant_format=blocks) if "_proj" in t.name else t)
    for server in SERVERS:
        assert refusals(spec, server) == [
            "model.layers.0.self_attn.k_proj has 64 outputs, which are not a whole number of blocks"
        ]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("changes", [{}, {"overrides": {"*layers.0.*": "bf16"}}, {"skip": ["*layers.1.*"]}])
def test_dense_layers_are_all_in_the_list_of_ignored_ones(family, changes):
    """SGLang raises for a linear layer in no list. No quantised one is there, and each is a target of one group."""
    before = open_checkpoint(pico.folder(family, dtype=torch.bfloat16, with_tokenizer=False, num_hidden_layers=2))
    spec = plan(before, "cast", weights="int4", method="rtn", group_size=8, **changes)
    said, matcher, mapped = render(spec), Matcher("here"), model_map(spec)
    for tensor in spec.stored():
        if len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
            continue
        name = mapped.in_memory(tensor.module)
        assert (name in said["ignore"]) == (tensor.quant_format is None), name
        groups = [
            g for g in said["config_groups"].values() if matcher.any([t for t in g["targets"] if t != "Linear"], name)
        ]
        whole = [g for g in said["config_groups"].values() if g["targets"] == ["Linear"]]
        assert tensor.quant_format is None or len(groups) + len(whole) == 1


def test_caches_that_a_server_ignores_are_told(llama):
    note = servers_note(plan(llama, "cast", scheme="W8A8", method="rtn", kv_cache="fp8", kv_cache_scales="none"))
    assert note == (
        "vLLM 0.32 opens it on GPUs from Turing on; SGLang 0.5.23 opens it on GPUs from Turing on (it ignores the fp8 cache)"
    )
