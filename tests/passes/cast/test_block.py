"""`cast` to codes: what is planned is written, stock transformers computes what we compute, masks stay, bad input is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.architectures.model_map import model_map
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.write import stored_form, write_checkpoint
from compress.data.batches import Batches
from compress.errors import CheckpointError, CompressError, PassError
from compress.models.loading import load_model
from compress.solvers.gptq import act_order_factor, gptq
from compress.solvers.quant_format import dequantize, fit, to_codes
from compress.spec.formats import QuantFormat
from tests import pico
from tests.toolbox import GROUPS, apply, our_logits, plan, stock_logits, write

QUICK_SETTINGS = [
    {"weights": "int3", "group_size": 8},
    {"weights": "int8", "activations": "int8"},
    {"weights": "fp8"},
    {"weights": "int4", "group_size": 16, "overrides": {"*down_proj": "int8", "*.0.*q_proj": "bf16"}},
]
SLOW_SETTINGS = [
    {"weights": "int4", "group_size": 16},
    {"weights": "int5", "group_size": "channel"},
    {"weights": "int2", "group_size": 32},
    {"weights": "int8"},
]


def without_metadata(out: Stored, bare: Path) -> Path:
    """A copy without the metadata that only we write, as compressed-tensors writes it; it is read with the same formats."""
    shutil.copytree(out.folder, bare)
    save_file(load_file(bare / "model.safetensors"), bare / "model.safetensors", metadata={"format": "pt"})
    formats = {t.name: t.quant_format for t in out.spec.stored()}
    assert {t.name: t.quant_format for t in open_checkpoint(bare).spec.stored()} == formats
    return bare


@pytest.mark.parametrize(
    "settings", [*QUICK_SETTINGS, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW_SETTINGS)], ids=str
)
def test_cast_codes_match_stock_transformers(settings, folders, tmp_path):
    checkpoint = open_checkpoint(folders["llama"])
    settings = {"method": "rtn", **settings}
    _, layout = stored_form(plan(checkpoint, "cast", **settings), "stock", 10**9, checkpoint.metadata)
    out = write(apply(checkpoint, "cast", **settings), tmp_path / "out")
    assert sum((out.folder / f).stat().st_size for f in out.files) == layout.bytes
    assert "quantization_config" not in out.spec.structure.config
    logits = our_logits(out.folder)
    assert torch.equal(stock_logits(out.folder, tmp_path), logits)
    assert torch.equal(our_logits(without_metadata(out, tmp_path / "bare")), logits)


@pytest.mark.parametrize("family", pico.families(["llama", "qwen3_moe", "deepseek_v3"], tier=("llama",)))
def test_cast_falls_back_to_groups_that_divide(family, tmp_path):
    """Widths that 64 does not divide: groups of 32, else a channel, of any width; fused experts have one size."""
    sizes = {"llama": {"intermediate_size": 45, "head_dim": 16}, "qwen3_moe": {"moe_intermediate_size": 32}}
    sizes["deepseek_v3"] = {"moe_intermediate_size": 48}  # its shared experts have other groups than its experts
    model = pico.save(tmp_path / "m", family, hidden_size=128, with_tokenizer=False, **sizes[family])
    settings = {"weights": "int4", "method": "rtn"}
    checkpoint = open_checkpoint(model)
    planned = plan(checkpoint, "cast", **settings)
    _, layout = stored_form(planned, "stock", 10**9, checkpoint.metadata)
    details: dict = {}
    out = compress.apply("cast", model, tmp_path / "out", details=details, **settings)
    assert (out / "model.safetensors").stat().st_size == layout.bytes
    assert torch.equal(stock_logits(out, tmp_path), our_logits(out))
    groups = {
        (model_map(planned).linears[t.name].I, t.quant_format.group)
        for t in open_checkpoint(out).spec.stored()
        if t.quant_format is not None
    }
    if family == "llama":
        assert groups == {(128, 64), (64, 64), (45, 0)}
        assert "one scale per output in 4 matrices with 45 inputs (model.layers.*.mlp.down_proj)" in details["groups"]
    elif family == "qwen3_moe":
        assert groups == {(128, 64), (128, 32), (32, 32), (64, 64)}  # attention; experts; a dense MLP


def test_cast_kv_cache_format_is_written_to_config(folders, tmp_path):
    """In the config alone: stock transformers loads it, compressed-tensors parses it, and writing again keeps it."""
    from compressed_tensors.quantization import QuantizationConfig

    settings = {"weights": "int8", "method": "rtn", "kv_cache": "fp8"}
    out = compress.apply("cast", folders["llama"], tmp_path / "out", **settings)
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(said).kv_cache_scheme
    assert (scheme.num_bits, scheme.type, scheme.strategy, scheme.symmetric) == (8, "float", "tensor", True)
    assert scheme.dynamic is True
    plain = compress.apply("cast", folders["llama"], tmp_path / "plain", weights="int8", method="rtn")
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert torch.equal(stock_logits(out, tmp_path), our_logits(out))
    opened = open_checkpoint(out)
    assert (opened.spec.structure.kv_cache, open_checkpoint(plain).spec.structure.kv_cache) == ("fp8", None)
    again = write(opened, tmp_path / "again")
    assert json.loads((again.folder / "config.json").read_text())["quantization_config"] == said
    dense = compress.unpack(out, tmp_path / "dense")
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    with pytest.raises(CompressError, match=r"`kv_cache` needs codes"):
        compress.apply("cast", folders["llama"], tmp_path / "o", weights="bf16", kv_cache="fp8")
    with pytest.raises(PassError, match=r"BertForMaskedLM caches no keys and values"):
        compress.apply("cast", folders["bert"], tmp_path / "o", **settings)
    with pytest.raises(
        PassError, match=r"belongs in the config of compressed-tensors, which compact checkpoints do not have"
    ):
        compress.apply("cast", folders["gpt2"], tmp_path / "o", store="compact", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["mxfp4", "nvfp4", "int4"])
def test_cast_codes_of_bfloat16_checkpoints_match_stock(format_, folders, tmp_path):
    group = {"group_size": 16} if format_ == "int4" else {}
    out = write(
        apply(open_checkpoint(folders["bf16"]), "cast", weights=format_, method="mse", **group), tmp_path / "out"
    )
    assert torch.equal(stock_logits(out.folder, tmp_path), our_logits(out.folder))


#: Family ▶ whether codes are symmetric at every commit; the other way round is slow.
SYMMETRIC = {"llama": True, "gpt2": None, "qwen3_moe": None, "bert": None, "opt": None, "phi3": None}


@pytest.mark.parametrize(
    ("family", "symmetric"),
    [
        pytest.param(family, symmetric, marks=[] if symmetric == quick else [pytest.mark.slow])
        for family, quick in SYMMETRIC.items()
        for symmetric in (True, False)
    ],
)
def test_cast_block_by_block_writes_what_is_planned(family, symmetric, folders, data, tmp_path):
    checkpoint = open_checkpoint(folders[family])
    settings = {"weights": "int4", "group_size": 8, "symmetric": symmetric, "reconstruction_epochs": 1}
    planned = plan(checkpoint, "cast", **settings)
    assert planned.exact
    _, layout = stored_form(planned, "compact", 10**9, checkpoint.metadata)
    details: dict = {}
    cast = apply(checkpoint, "cast", data=data, work=tmp_path / "work", details=details, **settings)
    written = write_checkpoint(cast, tmp_path / "out", store="compact")
    assert written.bytes == layout.bytes
    coded = [t for t in open_checkpoint(written.folder).spec.stored() if t.quant_format is not None]
    assert {t.name for t in coded} == {x.name for x in model_map(checkpoint.spec).layers if len(x.tensor.shape) == 2}
    if family == "gpt2" or not symmetric:
        assert json.loads((written.folder / "config.json").read_text())["model_type"] == "compress"
    if family != "bert":
        trust = family == "gpt2" or not symmetric
        logits = stock_logits(written.folder, tmp_path, trust=trust)
        # kernels for a few tokens round by the alignment of what they read: experts get few
        torch.testing.assert_close(logits, our_logits(written.folder), rtol=0, atol=1e-5 if "moe" in family else 0)
    assert len(details["blocks"]) == 4


@pytest.mark.slow
def test_cast_gptq_and_tuning_lower_the_error(tmp_path):
    original = pico.folder("llama", num_hidden_layers=2)
    checkpoint = open_checkpoint(original)
    data = Batches(torch.randint(2, 250, (32, 24), generator=torch.Generator().manual_seed(1)))

    def error(i, **settings):
        cast = apply(checkpoint, "cast", data=data, work=tmp_path / f"w{i}", weights="int3", group_size=16, **settings)
        folder = write(cast, tmp_path / f"o{i}").folder
        with torch.no_grad():
            a, b = (load_model(f)(input_ids=data.ids).logits for f in (original, folder))
        return float((a - b).square().mean())

    alone = {"error_correction": []}
    errors = [
        error(0, method="rtn"),
        error(1, method="mse"),
        error(2, reconstruction_epochs=0, **alone),
        error(3, reconstruction_epochs=5, **alone),
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[2] > error(4, reconstruction_epochs=0)


def test_cast_gptq_matches_inputs_behind_earlier_matrices(folders, tmp_path):
    checkpoint = open_checkpoint(folders["llama"])
    data = Batches(torch.randint(2, 250, (64, 24), generator=torch.Generator().manual_seed(1)))
    settings = {"weights": "int4", "group_size": 16, "error_correction": [], "reconstruction_epochs": 0}
    cast = apply(checkpoint, "cast", data=data, work=tmp_path / "work", **settings)
    model, quant_format = load_model(folders["llama"]), QuantFormat("int4", 16)
    for group in GROUPS:
        name = f"model.layers.0.{group[-1]}.weight"
        module, seen = model.get_submodule(name.removesuffix(".weight")), []
        handle = module.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0].flatten(0, 1).double()))
        with torch.no_grad():
            model(input_ids=data.ids)
        handle.remove()
        H, W = seen[0].T @ seen[0], checkpoint.tensor(name).data
        order, factor, _ = act_order_factor(H)
        scales = fit(W, quant_format, H.diagonal())
        expected = to_codes(gptq(W, factor.float(), order, quant_format, scales), quant_format, scales, torch.float32)
        assert torch.equal(cast.tensor(name).codes.codes, expected.codes)
        for part in group:  # the next ones read what these output when they are rounded
            codes = cast.tensor(f"model.layers.0.{part}.weight").codes
            model.get_submodule(f"model.layers.0.{part}").weight.data.copy_(dequantize(codes))


@pytest.mark.slow
def test_cast_keeps_pruned_weights_zero(folders, data, tmp_path):
    base = open_checkpoint(folders["llama"])
    pruned = write(
        apply(base, "prune_unstructured", method="magnitude", sparsity=0.6), tmp_path / "pruned", store="compact"
    )
    masks = {t.name: pruned.tensor(t.name).mask for t in pruned.spec.stored() if t.kept is not None}
    cast = apply(pruned, "cast", data=data, work=tmp_path / "w", weights="int4", group_size=16, reconstruction_epochs=2)
    sizes = {}
    for store in ("stock", "compact"):
        out = write(cast, tmp_path / store, store=store)
        sizes[store] = sum((out.folder / f).stat().st_size for f in out.files)
        for name, mask in masks.items():
            value = out.tensor(name)
            assert not value.data[~mask].any()
            if store == "compact":
                assert torch.equal(value.mask, mask)
    assert sizes["compact"] < sizes["stock"]
    logits = stock_logits(tmp_path / "compact", tmp_path, trust=True)
    assert torch.equal(logits, our_logits(tmp_path / "compact"))
    assert torch.equal(logits, stock_logits(tmp_path / "stock", tmp_path))


def test_unpack_of_cast_codes_gives_dense_twin(folders, tmp_path):
    out = write(
        apply(open_checkpoint(folders["llama"]), "cast", weights="int4", group_size=16, method="rtn"), tmp_path / "out"
    )
    compress.unpack(out.folder, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(stock_logits(tmp_path / "dense", tmp_path), our_logits(out.folder))


def test_cast_embeddings_when_asked(folders, tmp_path):
    settings = {"weights": "int4", "group_size": 16, "method": "rtn", "overrides": {"model.embed_tokens": "int8"}}
    with pytest.raises(CompressError, match=r"stock loaders do not read int8 codes of model.embed_tokens.weight"):
        compress.apply("cast", folders["llama"], tmp_path / "no", **settings)
    out = compress.apply("cast", folders["llama"], tmp_path / "out", store="compact", **settings)
    assert open_checkpoint(out).spec.tensors["model.embed_tokens.weight"].quant_format.format == "int8"
    assert torch.equal(stock_logits(out, tmp_path, trust=True), our_logits(out))


def test_cast_embeddings_only(folders, data, tmp_path):
    """Nothing is left for the sweep; the blocks stay as they are."""
    original = open_checkpoint(folders["llama"])
    settings = {"weights": "fp32", "overrides": {"model.embed_tokens": "int8"}}
    cast = write(
        apply(original, "cast", data=data, work=tmp_path / "work", **settings), tmp_path / "out", store="compact"
    )
    assert [t.name for t in cast.spec.stored() if t.quant_format is not None] == ["model.embed_tokens.weight"]
    before, after = (c.tensor("model.layers.0.mlp.up_proj.weight").data for c in (original, cast))
    assert torch.equal(before, after)
    table, rounded = (c.tensor("model.embed_tokens.weight").data for c in (original, cast))
    assert 0 < float((table - rounded).abs().max()) < float(table.abs().max()) / 100


def test_cast_refuses_bad_input(folders, data, tmp_path):
    llama = open_checkpoint(folders["llama"])
    with pytest.raises(PassError, match=r"proj.weight has 32 inputs, which groups of 64 do not divide") as caught:
        plan(llama, "cast", weights="int4", group_size=64)
    assert "group_size: 32" in caught.value.fix
    with pytest.raises(PassError, match=r"mxfp4 goes with bfloat16 weights beside it"):
        plan(llama, "cast", weights="mxfp4")
    with pytest.raises(PassError, match=r"`lm_hed` matches no module"):
        plan(llama, "cast", weights="int8", overrides={"lm_hed": "bf16"})
    with pytest.raises(CompressError, match=r"`activations: fp8` does not go with `weights: int8`: int8 takes int8"):
        compress.apply("cast", folders["llama"], tmp_path / "o", weights="int8", activations="fp8")
    with pytest.raises(CompressError, match=r"nvfp4 has groups of 16: leave `group_size` out"):
        compress.apply("cast", folders["llama"], tmp_path / "o", weights="nvfp4", group_size=32)
    with pytest.raises(CompressError, match=r"stock loaders do not read int4 codes of"):
        compress.apply("cast", folders["gpt2"], tmp_path / "o", weights="int4", group_size=8, method="rtn")
    with pytest.raises(CompressError, match=r"cast needs calibration data"):
        compress.apply("cast", folders["llama"], tmp_path / "o", weights="int4", group_size=8)
    cast = compress.apply("cast", folders["llama"], tmp_path / "cast", weights="int8", method="rtn")
    for again in ({"weights": "int4", "method": "rtn"}, {"weights": "bf16"}):
        with pytest.raises(CompressError, match=r"cast accepts float weights, and model.layers.0.* is quantised"):
            compress.apply("cast", cast, tmp_path / "o", **again)
    with pytest.raises(CompressError, match=r"prune_unstructured accepts float weights"):
        compress.apply("prune_unstructured", cast, tmp_path / "o", method="magnitude", sparsity=0.5)
    config = json.loads((cast / "config.json").read_text())
    bare = tmp_path / "bare"
    shutil.copytree(folders["llama"], bare)
    (bare / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(CheckpointError, match=r"has weights quantised by 'quip', which this version cannot read"):
        open_checkpoint(bare)


def test_cast_refuses_infinite_weights(tmp_path):
    folder = pico.save(tmp_path / "in", "llama", with_tokenizer=False)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"tensor model.layers.1.mlp.up_proj.weight holds NaN or infinite values"):
        compress.apply("cast", folder, tmp_path / "out", weights="int8", method="rtn")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"weights": "int4", "effort": "best"}, {"bits": 5}])
def test_cast_names_a_model_that_predicts_nan(settings, data, tmp_path):
    """What stands outside the blocks is not cast, but measured with."""
    folder = pico.save(tmp_path / "in", "llama", with_tokenizer=False)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the model predicts NaN or infinite values on a calibration sample"):
        compress.apply("cast", folder, tmp_path / "out", data=data.ids, group_size=16, **settings)
    assert not (tmp_path / "out").exists()
