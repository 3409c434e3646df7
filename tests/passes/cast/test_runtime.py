"""`cast: {runtime: vllm}`: codes that vLLM reads and stock transformers does not, in the stock store."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization.quant_scheme import QuantizationScheme
from safetensors.torch import load_file

import compress
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.running import loading_notes
from compress.checkpoint.storage.compressed_tensors.loaders import stock_holds
from compress.checkpoint.storage.compressed_tensors.servers import VLLM, refusals
from compress.checkpoint.storage.compressed_tensors.write import KEY, render
from compress.errors import CompressError
from compress.planning import planned_size, size_on_disk
from tests import pico, processes
from tests.passes.cast.test_schemes import SIZES
from tests.toolbox import apply, our_logits, plan, stock_logits, write

TABLE = "model.embed_tokens"


def written_as_planned(before, folder, **settings):
    """The checkpoint that `cast` writes; its bytes, runtime and config are those of the plan."""
    planned = plan(before, "cast", method="rtn", **settings)
    written = write(apply(before, "cast", method="rtn", **settings), folder)
    assert size_on_disk(written).bytes == planned_size(planned, "stock", 1 << 40).bytes
    assert written.spec.structure == planned.structure
    assert written.spec.structure.runtime == "vllm"
    assert not written.spec.structure.compact
    assert refusals(written.spec, VLLM) == []
    return written


def decompressed(folder, module, group):
    """The values of a module's codes as compressed-tensors computes them."""
    scheme = QuantizationScheme.model_validate(
        json.loads((folder / "config.json").read_text())[KEY]["config_groups"][group]
    )
    state = load_file(folder / "model.safetensors")
    parts = {key.removeprefix(f"{module}."): value for key, value in state.items() if key.startswith(f"{module}.")}
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]


def test_zero_points_are_those_of_compressed_tensors(tmp_path):
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))
    written = written_as_planned(before, tmp_path / "out", scheme="W4A16_ASYM", runtime="vllm")
    for name in (t.name for t in written.spec.stored() if t.quant_format is not None):
        values = decompressed(written.folder, name.removesuffix(".weight"), "group_0")
        assert torch.equal(values, written.tensor(name).data), name
    assert loading_notes(written.spec)[0].startswith("stock transformers does not load it")


def test_a_shared_table_and_its_head_get_codes_of_their_own(tmp_path):
    """vLLM knows the table by its class alone, and the head by its name alone."""
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, tie_word_embeddings=True, **SIZES))
    formats = {TABLE: "int4", "lm_head": "int8"}
    written = written_as_planned(before, tmp_path / "out", weights="int4", overrides=formats, runtime="vllm")
    assert written.spec.structure.config["tie_word_embeddings"] is False
    groups = json.loads((written.folder / "config.json").read_text())[KEY]["config_groups"]
    (table,) = (group for group, scheme in groups.items() if "Embedding" in scheme["targets"])
    (head,) = (group for group, scheme in groups.items() if scheme["targets"] == ["re:.*lm_head$"])
    model = compress.load(written.folder)
    assert torch.equal(model.lm_head.weight, decompressed(written.folder, "lm_head", head))
    assert torch.equal(model.model.embed_tokens.weight, decompressed(written.folder, TABLE, table))


def test_a_head_has_the_codes_of_the_table_that_it_shared():
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, tie_word_embeddings=True, **SIZES))
    cast = plan(before, "cast", weights="int8", overrides={TABLE: "int4"}, runtime="vllm")
    assert cast.tensors["lm_head.weight"].quant_format == cast.tensors[f"{TABLE}.weight"].quant_format
    assert cast.tensors["lm_head.weight"].alias_of is None
    other = plan(before, "cast", weights="int8", runtime="vllm")
    assert other.tensors["lm_head.weight"].alias_of == f"{TABLE}.weight"


def test_a_table_has_no_zero_points():
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))
    cast = plan(before, "cast", scheme="W4A16_ASYM", overrides={TABLE: "int4"}, runtime="vllm")
    zeros = {t.quant_format.symmetric for t in cast.stored() if t.quant_format and t.module != TABLE}
    assert (cast.tensors[f"{TABLE}.weight"].quant_format.symmetric, zeros) == (True, {False})


def test_a_table_has_no_inputs_to_round():
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))
    cast = plan(before, "cast", scheme="W8A8", overrides={TABLE: "int8", "lm_head": "int8"}, runtime="vllm")
    formats = {name: cast.tensors[f"{name}.weight"].quant_format.activations for name in (TABLE, "lm_head")}
    assert formats == {TABLE: None, "lm_head": "int8"}
    assert refusals(cast, VLLM) == []


def test_one_group_names_the_head_beside_the_classes():
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))
    cast = plan(before, "cast", weights="int8", overrides={TABLE: "int8", "lm_head": "int8"}, runtime="vllm")
    (group,) = render(cast)["config_groups"].values()
    assert group["targets"] == ["re:.*lm_head$", "Linear", "Embedding"]


EXPERTS = ["W8A8", "FP8", "FP8_BLOCK", "FP8_DYNAMIC", "NVFP4A16", "NVFP4", "MXFP8", "W4A16_ASYM", "W4A8", "W4AFP8"]


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_every_scheme_with_a_kernel_are_stored_one_by_one(name):
    before = open_checkpoint(
        pico.folder("qwen3_moe", dtype=torch.bfloat16, with_tokenizer=False, moe_intermediate_size=256, **SIZES)
    )
    spec = plan(before, "cast", scheme=name, runtime="vllm")
    holds = stock_holds(spec)
    assert all(holds(t) for t in spec.stored())
    assert refusals(spec, VLLM) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["W8A8", "FP8", "FP8_BLOCK", "NVFP4", "W4A16_ASYM"])
def test_experts_are_written_as_planned_and_read_back(name, tmp_path):
    base = pico.folder("qwen3_moe", dtype=torch.bfloat16, with_tokenizer=False, moe_intermediate_size=256, **SIZES)
    ids = torch.randint(2, 250, (4, 16), generator=torch.Generator().manual_seed(1))
    settings = {"scheme": name, "method": "rtn", "runtime": "vllm"}
    compress.apply("cast", base, tmp_path / "out", data=ids, dtype="float32", **settings)
    written = open_checkpoint(tmp_path / "out")
    assert written.spec.structure.runtime == "vllm"
    assert (
        size_on_disk(written).bytes
        == planned_size(plan(open_checkpoint(base), "cast", **settings), "stock", 1 << 40).bytes
    )
    state = load_file(tmp_path / "out" / "model.safetensors")
    experts = [key for key in state if ".experts.3.down_proj." in key]
    assert any(key.endswith((".weight", ".weight_packed")) for key in experts)
    assert any(key.endswith((".input_scale", ".input_global_scale")) for key in experts) == (name in ("FP8", "NVFP4"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int4", "symmetric": False}, "use `store: compact`, or `runtime: vllm` in `cast`"),
        ({"weights": "int4", "overrides": {TABLE: "int4"}}, "or `runtime: vllm` in `cast`"),
        (
            {"weights": "int4", "overrides": {TABLE: "int6"}, "runtime": "vllm"},
            f"vLLM 0.32 does not open it: no scheme for int6 in groups of 64 ({TABLE}.weight)",
        ),
        ({"weights": "int4", "runtime": "vllm", "store": "compact"}, "vLLM opens no compact checkpoint"),
    ],
)
def test_what_the_runtime_does_not_read_is_refused(settings, message, tmp_path):
    with pytest.raises(CompressError) as caught:
        compress.apply(
            "cast", pico.folder("llama", dtype=torch.bfloat16, **SIZES), tmp_path / "out", method="rtn", **settings
        )
    assert message in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe", "gpt2"])
def test_stock_transformers_reads_codes_of_a_head(family, tmp_path):
    """Of one that shares no table; in a process without the package, beside linear layers of another format."""
    untied = {"tie_word_embeddings": False}
    before = open_checkpoint(pico.folder(family, dtype=torch.bfloat16, with_tokenizer=False, **untied))
    head = next(t.module for t in before.spec.stored() if t.module in ("lm_head", "embed_out"))
    settings = {"only": [head]} if family == "gpt2" else {"overrides": {head: "int8"}}  # of a Conv1D it reads no codes
    written = write(apply(before, "cast", weights="int4", method="rtn", **settings), tmp_path / "out")
    assert written.spec.structure.runtime == "transformers"
    assert torch.equal(stock_logits(tmp_path / "out", tmp_path), our_logits(tmp_path / "out"))


_DEQUANTISED = """
import sys, torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
asked = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", quantization_config=asked)
with torch.no_grad():
    torch.save(model(torch.arange(20)[None] + 5).logits.float(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"scheme": "W4A16_ASYM"}, {"scheme": "W4A16", "overrides": {TABLE: "int4", "lm_head": "int4"}}],
)
def test_transformers_reads_codes_of_one_format_when_it_dequantises(settings, tmp_path):
    """In a process without the package."""
    before = open_checkpoint(pico.folder("llama", dtype=torch.bfloat16, **SIZES))
    written_as_planned(before, tmp_path / "out", runtime="vllm", **settings)
    done = processes.run(_DEQUANTISED, tmp_path / "out", tmp_path / "logits.pt", foreign=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), our_logits(tmp_path / "out"))
