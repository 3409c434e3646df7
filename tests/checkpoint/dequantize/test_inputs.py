"""Checkpoints that other tools have quantised, as inputs: opened, inspected, planned, compressed, and loaded by stock code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compress
from compress import architectures
from compress.checkpoint.dequantize import parse
from compress.checkpoint.headers import TensorEntry
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.errors import CheckpointError
from compress.inspection import inspect
from compress.models.pico import dummy_inputs
from tests import pico
from tests.checkpoint.dequantize.small import MAKERS, wrapped
from tests.toolbox import write


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return {name: make(root / name) for name, make in MAKERS.items()}


def test_spec_is_that_of_the_floats(folders):
    for name, folder in folders.items():
        spec, _ = open_headers(folder)
        assert "quantization_config" not in spec.structure.config
        assert spec.structure.config["dtype"] == ("float16" if name in ("gptq", "awq") else "bfloat16")
        assert all(tensor.is_float for tensor in spec.tensors.values())
        assert "sizes are compared with the files as they are" in spec.notes[0]


def test_inspect_shows_the_stored_format_and_bytes(folders):
    expected = {
        "fp8": "fp8 in blocks of 16 × 16",
        "mxfp4": "mxfp4",
        "gptq": "gptq int4 in groups of 16",
        "awq": "awq int4 in groups of 16",
        "nf4": "bitsandbytes NF4 in blocks of 64",
    }
    for name, folder in folders.items():
        facts = inspect(folder)
        state = load_file(folder / "model.safetensors")
        data = sum(a.numel() * a.element_size() for a in state.values())
        assert facts["size"]["bytes"] == (folder / "model.safetensors").stat().st_size
        assert sum(row["bytes"] for row in facts["tensors"]) == data == sum(row["bytes"] for row in facts["modules"])
        assert facts["size"]["bits_per_weight"] == round(8 * data / facts["size"]["parameters"], 4)
        assert {row["storage"] for row in facts["tensors"]} == {"dense", expected[name]}


@pytest.mark.slow
def test_headers_are_read_without_torch(folders):
    code = (
        "import sys\n"
        "from compress.inspection import inspect\n"
        "from compress.checkpoint.open import open_headers\n"
        "for folder in sys.argv[1:]: open_headers(folder)\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    written = [str(folder) for name, folder in folders.items() if name != "mxfp4"]  # whose record is inferred
    out = subprocess.run([sys.executable, "-c", code, *written], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_stock_transformers_dequantises_to_the_same_outputs(folders, stock_outputs, tmp_path):
    """It reads fp8 and mxfp4 without a GPU, and needs packages for the others."""
    cases = {}
    for name in ("fp8", "mxfp4"):
        model = compress.load(folders[name])
        pico.save_expected(model, tmp_path / f"{name}.pt")
        cases[name] = (type(model).__name__, folders[name], tmp_path / f"{name}.pt")
    outputs = stock_outputs(cases, dtype="auto")
    assert {name: row.get("difference", row) for name, row in outputs.items()} == {"fp8": 0, "mxfp4": 0}


def test_unpack_writes_floats_that_stock_loads(folders, stock_outputs, tmp_path):
    cases = {}
    for name, folder in folders.items():
        dense = compress.unpack(folder, tmp_path / name)
        assert not (dense / "quantize_config.json").exists()
        assert "quantization_config" not in json.loads((dense / "config.json").read_text())
        model = compress.load(folder)
        pico.save_expected(model, tmp_path / f"{name}.pt")
        cases[name] = (type(model).__name__, dense, tmp_path / f"{name}.pt")
    outputs = stock_outputs(cases, dtype="auto")
    assert {name: row.get("difference", row) for name, row in outputs.items()} == dict.fromkeys(folders, 0)


RECIPES = {
    "fp8": [{"cast": {"effort": "fast", "weights": "int4", "group_size": "channel"}}],
    "mxfp4": [{"prune_unstructured": {"method": "sparsegpt", "sparsity": "50%", "reconstruction_epochs": 1}}],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
def test_recipe_from_small_files_to_stock_reload(name, folders, texts, stock_outputs, tmp_path):
    recipe = {
        "model": str(folders[name]),
        "output": str(tmp_path / "out"),
        "document_separator": "<|doc|>",
        "data": {"calibration": {"files": [str(texts[0])], "samples": 4, "length": 32}},
        "passes": RECIPES[name],
        "evaluate": [],
    }
    result = compress.run(recipe)
    before = result.report["original"]["size"]
    assert before["bytes"] == (folders[name] / "model.safetensors").stat().st_size
    assert any("sizes are compared with the files as they are" in note for note in result.report["notes"])
    (stage,) = result.report["stages"]
    assert stage["passes"][-1]["planned"]["bytes"] == stage["size"]["bytes"]
    model = compress.load(result.checkpoint)
    pico.save_expected(model, tmp_path / "expected.pt")
    outputs = stock_outputs({name: (type(model).__name__, result.checkpoint, tmp_path / "expected.pt")}, dtype="auto")
    assert outputs[name].get("difference", outputs[name]) <= 1e-5
    assert (pico.logits(model) - pico.logits(compress.load(folders[name]))).abs().max() > 0


WRAPPED = [
    ("LlavaForConditionalGeneration", "fp8"),
    ("BartForConditionalGeneration", "gptq"),
    ("LlavaForConditionalGeneration", "gptq"),
    ("Gemma3ForConditionalGeneration", "fp8"),
    ("Gemma3ForConditionalGeneration", "gptq"),
    ("Qwen2_5_VLForConditionalGeneration", "fp8"),
    ("Qwen2_5_VLForConditionalGeneration", "gptq"),
    ("WhisperForConditionalGeneration", "fp8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("class_name", "method"), WRAPPED)
def test_small_wrappers_and_encoder_decoders_reload_in_stock(class_name, method, tmp_path):
    folder = wrapped(tmp_path / "in", class_name, method)
    before, model = open_checkpoint(folder), compress.load(folder)
    inputs = dummy_inputs(model.float(), 12)
    data = {name: value.repeat(4, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
    data = data if "input_features" in data else data["input_ids"]
    coded = {"effort": "fast", "weights": "int4", "group_size": "channel", "data": data}
    for name, settings in {"prune_unstructured": {"method": "magnitude", "sparsity": 0.5}, "cast": coded}.items():
        out = compress.apply(name, folder, tmp_path / name, **settings)
        assert {t.name for t in open_checkpoint(out).spec.stored()} == {t.name for t in before.spec.stored()}
        stock, info = getattr(transformers, class_name).from_pretrained(out, dtype="auto", output_loading_info=True)
        assert not any(info.values())
        ours = compress.load(out)
        assert ours.dtype == stock.dtype
        typed = {n: v.to(ours.dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        with torch.no_grad():
            a, b, c = (m.eval()(**typed).logits.float() for m in (stock, ours, model.to(ours.dtype)))
        assert torch.equal(a, b)
        assert not torch.equal(b, c)


def test_scales_may_be_in_another_shard(folders, tmp_path):
    """As in the large checkpoints, where a shard may end between a weight and its scales."""
    folder = damaged(folders["fp8"], tmp_path / "in", lambda *_: None)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {
        file: {k: v for k, v in state.items() if k.endswith("_inv") == (file == "b.safetensors")}
        for file in ("a.safetensors", "b.safetensors")
    }
    for file, half in halves.items():
        save_file(half, folder / file, metadata={"format": "pt"})
    names = {key: file for file, half in halves.items() for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    before, after = open_checkpoint(folders["fp8"]), open_checkpoint(folder)
    assert before.spec.tensors == after.spec.tensors
    assert torch.equal(before.tensor(FP8).data, after.tensor(FP8).data)


def test_codes_without_a_config_are_named(folders, tmp_path):
    """Older GPTQ checkpoints keep it in quantize_config.json, which stock transformers does not read."""
    folder = damaged(folders["gptq"], tmp_path / "in", lambda *_: None)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"has codes \(.*\.qweight\), and config.json has no `quantization_config`"
    ):
        open_headers(folder)


def damaged(folder, to, change):
    """A copy with changed arrays or config: ``change(state, quantization)``."""
    to.mkdir()
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(state, config["quantization_config"])
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


FP8, PROJECTION = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def put(key, change):
    """A change of one array."""

    def both(state, _):
        state[key] = change(state[key]).contiguous()

    return both


def without(*keys):
    return lambda state, _: [state.pop(key) for key in keys]


def said(**more):
    return lambda _, quantization: quantization.update(more)


HEADERS = [
    ("fp8", without(f"{FP8}_scale_inv"), rf"has {FP8} \(F8_E4M3\), and nothing beside it that tells its values"),
    ("fp8", without(FP8), rf"has {FP8}_scale_inv \(F32\), and nothing beside it"),
    ("fp8", put(f"{FP8}_scale_inv", lambda s: s[:, :1].repeat(1, 5)), "fits .* by no block of 16 × 16"),
    ("fp8", put(f"{FP8}_scale_inv", lambda s: s.int()), "is I32, not F32 or"),
    ("mxfp4", without(f"{EXPERTS}_scales"), f"but not {EXPERTS}_scales, which its values need"),
    ("mxfp4", put(f"{EXPERTS}_scales", lambda s: s[:, 1:]), "has the shape .* needs"),
    ("mxfp4", put(f"{EXPERTS}_blocks", lambda s: s.flatten(2)), r"not \[experts, outputs, groups, 16\]"),
    ("gptq", without(f"{PROJECTION}.scales"), f"but not {PROJECTION}.scales"),
    ("gptq", without(f"{PROJECTION}.g_idx"), r"in the order of its activations \(desc_act\), but not"),
    ("gptq", put(f"{PROJECTION}.qzeros", lambda s: s[:, 1:]), "has the shape .* needs"),
    ("gptq", said(bits=5), r"`quantization_config.bits`: '5', which this version cannot read"),
    ("gptq", said(bits=4.0), r"`quantization_config.bits`: '4.0'"),
    ("gptq", said(checkpoint_format="marlin"), "checkpoint_format`: 'marlin'"),
    ("gptq", said(dynamic={"down": {"bits": 8}}), "dynamic`: .*down"),
    ("gptq", said(dynamic=3), "dynamic`: '3'"),
    ("gptq", said(quant_method=["gptq"]), "which this version cannot read"),
    ("gptq", said(group_size=0), "group_size`: '0'"),
    ("awq", said(version="gemv"), "version`: 'gemv'"),
    ("awq", said(version=None, format="gemv"), "format`: 'gemv'"),
    ("awq", said(backend="llm-awq"), "backend`: 'llm-awq'"),
    ("gptq", said(format="marlin"), "checkpoint_format`: 'marlin'"),
    ("fp8", said(weight_block_size=[32, 32]), "fits .* by no block of 32 × 32"),
    ("awq", said(group_size=32), "array .*scales has the shape"),
    ("awq", said(bits=3), "bits`: '3'"),
    ("awq", without(f"{PROJECTION}.qweight"), "and nothing beside it"),
    ("awq", said(quant_method="aqlm"), "'aqlm', which this version cannot read"),
    ("awq", said(quant_method="fp8"), "no array is stored so|nothing beside it"),
]


STATE = f"{PROJECTION}.weight.quant_state.bitsandbytes__nf4"
HEADERS += [
    ("nf4", without(STATE), "and nothing beside it that tells its values"),
    ("nf4", put(STATE, lambda s: s[3:]), f"array {STATE} is no quantisation state of nf4"),
    ("nf4", put(f"{PROJECTION}.weight.absmax", lambda s: s[1:]), "has the shape .* needs"),
    ("nf4", put(f"{PROJECTION}.weight", lambda s: s[1:]), "codes of 4 bits need 512"),
    ("nf4", without(f"{PROJECTION}.weight.quant_map"), "but not .*quant_map"),
]


@pytest.mark.parametrize(("name", "change", "message"), HEADERS, ids=[f"{i}-{row[0]}" for i, row in enumerate(HEADERS)])
def test_wrong_headers_are_refused_on_opening(name, change, message, folders, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        open_headers(damaged(folders[name], tmp_path / "bad", change))


VALUES = [
    ("fp8", FP8, put(f"{FP8}_scale_inv", lambda s: s * float("nan")), "its scales are NaN or infinite"),
    (
        "fp8",
        FP8,
        put(f"{FP8}_scale_inv", lambda s: s / s.max() * 3e37),
        "its values are .* beyond the range of bfloat16",
    ),
    ("mxfp4", EXPERTS, put(f"{EXPERTS}_scales", lambda s: s | 255), r"its scales are NaN \(255\)"),
    (
        "gptq",
        f"{PROJECTION}.weight",
        put(f"{PROJECTION}.g_idx", lambda s: s + 9),
        "its g_idx names group 10, and there are 2",
    ),
    (
        "nf4",
        f"{PROJECTION}.weight",
        put(f"{PROJECTION}.weight.absmax", lambda s: s / 0),
        "its scales are NaN or infinite",
    ),
    ("awq", f"{PROJECTION}.weight", put(f"{PROJECTION}.scales", lambda s: s / 0), "its scales are NaN or infinite"),
]


@pytest.mark.parametrize(("name", "tensor", "change", "message"), VALUES, ids=[row[0] for row in VALUES])
def test_wrong_values_are_refused_on_reading(name, tensor, change, message, folders, tmp_path):
    checkpoint = open_checkpoint(damaged(folders[name], tmp_path / "bad", change))
    with pytest.raises(CheckpointError, match=f"tensor {tensor}: {message}") as error:
        checkpoint.tensor(tensor)
    assert "\n" not in str(error.value)


def test_format_of_gptq_is_read_under_its_newer_name(folders, tmp_path):
    """transformers 5 calls it `format`, and prefers `checkpoint_format` where both are said."""
    values = [
        open_checkpoint(damaged(folders["gptq"], tmp_path / str(i), said(**more))).tensor(f"{PROJECTION}.weight").data
        for i, more in enumerate(
            (
                {},
                {"format": "gptq_v2"},
                {"checkpoint_format": "gptq_v2"},
                {"checkpoint_format": "gptq", "format": "gptq_v2"},
            )
        )
    ]
    assert torch.equal(values[1], values[2])
    assert torch.equal(values[0], values[3])
    assert not torch.equal(values[0], values[1])


def test_zero_points_of_gptq_hold_every_output():
    """Of 48 outputs of 3 bits, four words hold 42: the last would be read as if their zero points were zero."""
    shapes = {"m.qweight": ("I32", (3, 48)), "m.scales": ("F16", (1, 48)), "m.qzeros": ("I32", (1, 4))}
    entries = {key: TensorEntry(dtype, shape, 0, 0) for key, (dtype, shape) in shapes.items()}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": -1}}
    with pytest.raises(CheckpointError, match=r"m.qzeros has the shape \[1, 4\], and m.weight needs \[1, 5\]"):
        parse(config, entries, lambda _: b"", "here")


@pytest.mark.parametrize("shape", [(192, 130), (100, 300), (200, 576), (128, 1), (24, 40)])
def test_blocks_of_fp8_without_a_size_in_the_config(shape, tmp_path):
    """The last block of an axis may be smaller: 192 rows with two scales are 128 and 64, not twice 96."""
    block = 128 if max(shape) > 100 else 8
    rows, columns = (-(-n // block) for n in shape)
    codes, scale = torch.randn(shape).to(torch.float8_e4m3fn), torch.rand(rows, columns) + 0.1
    wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]
    entries = {
        "w": TensorEntry("F8_E4M3", shape, 0, codes.numel()),
        "w_scale_inv": TensorEntry("F32", (rows, columns), 0, 4 * scale.numel()),
    }
    _, sources, *_ = parse({"quantization_config": {"quant_method": "fp8"}}, entries, lambda _: b"", "here")
    values = sources["w"].decode({"codes": codes, "scale": scale}, torch.float32)
    assert torch.equal(values, codes.float() * wide)


def test_written_again_gives_the_same_values(folders, tmp_path):
    for name, folder in folders.items():
        before, after = open_checkpoint(folder), write(open_checkpoint(folder), tmp_path / name)
        assert before.spec.tensors == after.spec.tensors
        assert not after.spec.sources
        for tensor in before.spec.stored():
            assert torch.equal(before.tensor(tensor.name).data, after.tensor(tensor.name).data)


def test_block_of_further_tokens_is_left_out():
    """DeepSeek-V3 ships a block 61 for speculative decoding, which its class does not read."""
    record = architectures.of({"model_type": "deepseek_v3"})
    assert record.is_leftover("model.layers.61.eh_proj.weight", "DeepseekV3ForCausalLM")
    assert not record.is_leftover("model.layers.6.mlp.up_proj.weight", "DeepseekV3ForCausalLM")
