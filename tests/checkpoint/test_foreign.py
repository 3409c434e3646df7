"""Files of other tools: what belongs to their schemes is read, evaluated as stock transformers does, kept and unpacked."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.storage.bits import unpack_codes
from compress.checkpoint.write import write_checkpoint
from compress.errors import CheckpointError, PassError
from compress.spec.formats import ACTIVATIONS
from tests import pico
from tests.toolbox import apply, write

FP8 = {"weights": "fp8", "activations": "fp8"}
INT8 = {"weights": "int8", "activations": "int8"}
NVFP4 = {"weights": "nvfp4"}


def make(root, name, settings, change, family="llama", dtype=torch.float32):
    """A cast checkpoint without the metadata that only we write, changed: ``change(group, quantization, state, modules)``."""
    base = pico.folder(family, with_tokenizer=False, dtype=dtype)
    folder = write(apply(open_checkpoint(base), "cast", method="rtn", **settings), root / name).folder
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    modules = [key.removesuffix(".weight_scale") for key in state if key.endswith(".weight_scale")]
    quantization = config["quantization_config"]
    change(quantization["config_groups"]["group_0"], quantization, state, modules)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def inputs(said, **arrays):
    """A change of what inputs are cast to, with arrays beside every module, each slightly its own."""

    def change(group, quantization, state, modules):
        group["input_activations"] = dict(said)
        for number, module in enumerate(modules):
            for end, (value, dtype) in arrays.items():
                state[f"{module}.{end}"] = torch.tensor([value * (1 + number / 100)]).to(dtype)

    return change


def by_tensor(change=lambda *a: None):
    """Weights with one scale for the whole matrix."""

    def both(group, quantization, state, modules):
        change(group, quantization, state, modules)
        group["weights"] |= {"strategy": "tensor"}
        for module in modules:
            codes, scale = state[f"{module}.weight"], state[f"{module}.weight_scale"]
            values = codes.to(scale.dtype) * scale
            high = 448 if codes.dtype == torch.float8_e4m3fn else 127
            one = (values.abs().max() / high).reshape(1)
            whole = values / one
            state[f"{module}.weight"] = (whole if high == 448 else whole.round()).to(codes.dtype)
            state[f"{module}.weight_scale"] = one

    return both


def as_bytes(group, quantization, state, modules):
    """Codes of four bits in a byte each, with rounded inputs, as llm-compressor writes W4A8."""
    for module in modules:
        rows, width = state.pop(f"{module}.weight_shape").tolist()
        state[f"{module}.weight"] = unpack_codes(state.pop(f"{module}.weight_packed"), 4, width).to(torch.int8)
        assert state[f"{module}.weight"].shape == (rows, width)
    group["format"] = quantization["format"] = "int-quantized"
    group["input_activations"] = dict(ACTIVATIONS["int8"])


SCALE, FLOAT64_MAX_WIDTH = (0.01, torch.float32), (0.01, torch.bfloat16)
CASES = {
    "int8-zero": (INT8, inputs(ACTIVATIONS["int8-zero"])),
    "int8-dynamic": (INT8, inputs(ACTIVATIONS["int8-dynamic"])),
    "int8-tensor": (INT8, inputs(ACTIVATIONS["int8-tensor"], input_scale=(0.03, torch.float32))),
    "int8-tensor-zero": (
        INT8,
        inputs(ACTIVATIONS["int8-tensor-zero"], input_scale=(0.03, torch.float32), input_zero_point=(-20, torch.int8)),
    ),
    "fp8-dynamic": (FP8, inputs(ACTIVATIONS["fp8-dynamic"])),
    "fp8-tensor": (FP8, inputs({"num_bits": 8, "type": "float"}, input_scale=SCALE)),
    "fp8-tensor bf16": (FP8, inputs(ACTIVATIONS["fp8-tensor"], input_scale=FLOAT64_MAX_WIDTH)),
    "fp8-tensor mixed": (FP8, inputs(ACTIVATIONS["fp8-tensor"], input_scale=FLOAT64_MAX_WIDTH)),
    "fp8 whole": (FP8, by_tensor()),
    "fp8 whole static": (FP8, by_tensor(inputs(ACTIVATIONS["fp8-tensor"], input_scale=SCALE))),
    "fp8 whole alone": (FP8, by_tensor(lambda group, *_: group.update(input_activations=None))),
    "int8 whole": (INT8, by_tensor()),
    "int4 bytes": ({"weights": "int4", "group_size": 32}, as_bytes),
    "nvfp4 bf16": (NVFP4, inputs(ACTIVATIONS["nvfp4"], input_global_scale=(700.0, torch.float32))),
    "nvfp4-wide bf16": (NVFP4, inputs(ACTIVATIONS["nvfp4-wide"], input_global_scale=(700.0, torch.float32))),
}
#: Those that stock transformers reads in `make test`.
QUICK = ["int8-tensor-zero", "int4 bytes", "fp8-tensor mixed", "fp8 whole alone", "nvfp4 bf16"]
OTHERS = [*(name for name in CASES if name not in QUICK), "gpt_neox"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    made = {
        name: make(root, name, settings, change, dtype=torch.bfloat16 if name.endswith("bf16") else torch.float32)
        for name, (settings, change) in CASES.items()
    }
    made["gpt_neox"] = make(root, "gpt_neox", *CASES["fp8 whole static"], family="gpt_neox")
    return made


@pytest.mark.parametrize("names", [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["quick", "others"])
def test_foreign_codes_match_stock_transformers(names, folders, stock_outputs, tmp_path):
    cases = {}
    for name in names:
        folder = folders[name]
        ours = compress.load(folder)
        pico.save_expected(ours, tmp_path / f"{name}.pt")
        cases[name] = (type(ours).__name__, folder, tmp_path / f"{name}.pt")
        if name != "fp8 whole alone":
            without = pico.logits(compress.load(folder, quantized_activations=False))
            assert (pico.logits(ours) - without).abs().max() > 1e-3 * without.abs().max(), name
    found = stock_outputs(cases, dtype="auto")
    assert {name: row["error"] for name, row in found.items() if "error" in row} == {}
    assert {name: row["difference"] for name, row in found.items() if not row["difference"] <= 1e-5} == {}


@pytest.mark.slow
def test_foreign_codes_are_written_again_unchanged(folders, tmp_path):
    for name, folder in folders.items():
        again = write(open_checkpoint(folder), tmp_path / name).folder
        if name == "int4 bytes":  # they are packed
            name = "model.layers.0.mlp.up_proj.weight"
            assert torch.equal(*(open_checkpoint(f).tensor(name).data for f in (folder, again)))
            continue
        before, after = (load_file(f / "model.safetensors") for f in (folder, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)
        said = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, again)]
        groups = [q["config_groups"]["group_0"] for q in said]
        for part in ("weights", "input_activations"):
            first, second = ({k: v for k, v in (g[part] or {}).items() if v not in (None, False)} for g in groups)
            if name == "fp8-tensor" and part == "input_activations":
                first |= {"symmetric": True, "strategy": "tensor"}  # defaults
            assert first == second, name
        assert torch.equal(pico.logits(compress.load(folder)), pico.logits(compress.load(again)))


@pytest.mark.slow
def test_unpack_of_foreign_codes_leaves_weights_only(folders, tmp_path):
    """FAULTS F5: 8 to 28 stray tensors, which nobody takes back."""
    for name, folder in folders.items():
        dense = compress.unpack(folder, tmp_path / name)
        family = "gpt_neox" if name == "gpt_neox" else "llama"
        assert (
            load_file(dense / "model.safetensors").keys()
            == load_file(pico.folder(family, with_tokenizer=False) / "model.safetensors").keys()
        )
        values = pico.logits(compress.load(folder, quantized_activations=False))
        assert torch.equal(pico.logits(compress.load(dense)), values)


def test_foreign_arrays_that_stock_ignores_are_left_out(tmp_path):
    """Scales of queries, zero points of symmetric schemes, caches of formats that are not known: left out with a note."""

    def change(group, quantization, state, modules):
        inputs(ACTIVATIONS["fp8-tensor"], input_scale=SCALE, input_zero_point=(0, torch.int8))(
            group, quantization, state, modules
        )
        scheme = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
        quantization["kv_cache_scheme"] = scheme
        for part in "qkv":
            state[f"model.layers.0.self_attn.{part}_scale"] = torch.ones(1)
            state[f"model.layers.0.self_attn.{part}_zero_point"] = torch.zeros(1, dtype=torch.int8)

    folder = make(tmp_path, "left", FP8, change)
    opened = open_checkpoint(folder)
    (note,) = opened.spec.notes
    assert re.match(r"34 arrays that stock transformers does not read are left out: input_zero_point, k_scale, ", note)
    stock = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(pico.logits(compress.load(folder)), pico.logits(stock), rtol=1e-5, atol=1e-5)
    dense = compress.unpack(folder, tmp_path / "dense")
    assert not any(name.endswith(("_scale", "_point")) for name in load_file(dense / "model.safetensors"))


def test_foreign_kv_cache_scales_are_kept(tmp_path):
    def change(group, quantization, state, modules):
        quantization["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
        for block in range(4):
            for part in "qkv":
                state[f"model.layers.{block}.self_attn.{part}_scale"] = torch.full((1,), 0.02)

    opened = open_checkpoint(make(tmp_path, "cache", FP8, change))
    assert opened.spec.structure.kv_cache == "fp8-tensor"
    assert sum(tensor.is_cache_scale for tensor in opened.spec.stored()) == 8
    assert opened.spec.notes == ("4 arrays that stock transformers does not read are left out: q_scale",)


def test_int8_weights_alone_are_read_as_plain_bytes(tmp_path):
    """Other tools store them by ``int-quantized``; written again they are packed."""
    folder = make(tmp_path, "alone", INT8, lambda group, *_: group.update(input_activations=None))
    opened, state = open_checkpoint(folder), load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert opened.spec.tensors[name].storage == ("int-quantized",)
    expected = state[name].to(state[f"{name}_scale"].dtype) * state[f"{name}_scale"]
    assert torch.equal(opened.tensor(name).data, expected)
    again = open_checkpoint(write_checkpoint(opened, tmp_path / "again").folder)
    assert again.spec.tensors[name].storage == ("pack-quantized",)
    assert torch.equal(again.tensor(name).data, expected)


def test_zero_points_of_fp8_are_read(tmp_path):
    def change(group, quantization, state, modules):
        group["weights"] |= {"symmetric": False}
        for module in modules:
            state[f"{module}.weight_zero_point"] = torch.full_like(state[f"{module}.weight_scale"], 2).to(torch.int8)

    folder = make(tmp_path, "zero", FP8, change)
    opened, state = open_checkpoint(folder), load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    scale = state[f"{name}_scale"]
    assert torch.equal(opened.tensor(name).data, (state[name].to(scale.dtype) - 2) * scale)


def refused(group, said, **weights):
    group["input_activations"] = said
    group["weights"] |= weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, *_: refused(g, {"num_bits": 4, "type": "float", "strategy": "token", "dynamic": True}),
         r"quantises the inputs of model.layers.0.mlp.down_proj to dynamic 4-bit float by token, which is not supported"),
        (lambda g, *_: refused(g, {"num_bits": 8, "type": "float", "dynamic": False}),
         r"array model.layers.0.mlp.down_proj.input_scale does not match the quantization_config"),
        (inputs(ACTIVATIONS["fp8"], input_scale=SCALE),
         r"has model.layers.0.mlp.down_proj.input_scale, which no group of its quantization_config uses"),
        (lambda g, *_: g.update(output_activations={"num_bits": 8, "dynamic": True}), r"quantises the outputs of"),
        (lambda g, *_: refused(g, None, num_bits=4), r"as float-quantized, 4-bit float by channel, which this version"),
        (lambda g, *_: refused(g, None, strategy="block", block_structure=[64, 128]), r"8-bit float by block, which this"),
        (lambda g, q, *_: q.update(config_groups={"group_0": None}), r"config_groups.group_0` is empty"),
        (lambda g, q, *_: g.update(weights=None), r"stores model.layers.0.mlp.down_proj as float-quantized, 8-bit int by"),
    ],
)  # fmt: skip
def test_foreign_schemes_are_refused_by_name(change, message, tmp_path):
    folder = make(tmp_path, "in", FP8, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["cast", "prune_unstructured"])
def test_foreign_fp8_without_scales_is_refused(name, tmp_path):
    """FAULTS F6: "every weight is bf16 already; leave the pass out"."""
    folder = pico.save(tmp_path / "in", dtype=torch.bfloat16, with_tokenizer=False)
    state = load_file(folder / "model.safetensors")
    state = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"weights": "bf16"} if name == "cast" else {"method": "magnitude", "sparsity": 0.5}
    said = r"holds 8-bit floats \(F8_E4M3\), and neither scales nor a config give their values; start from"
    with pytest.raises(PassError, match=said):
        compress.apply(name, folder, tmp_path / "out", **settings)
