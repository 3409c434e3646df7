"""Experts that files hold in one tensor (gpt-oss: [E, I, O]; Granite MoE: [E, O, I]): each is a matrix like any other."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compress
from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.storage import parts
from compress.checkpoint.write import stored_form
from compress.data.batches import Batches
from compress.errors import CompressError, PassError
from compress.models.loading import load_model
from compress.models.pico import pico_model
from compress.models.shrink import default_config, shrunken
from compress.passes import get
from compress.solvers.hessian import inverse_factor
from compress.solvers.quant_format import dequantize, rounded
from compress.solvers.sparsegpt import sparsegpt
from compress.spec.formats import QuantFormat
from tests import pico
from tests.toolbox import apply, our_logits, plan, stock_logits

FAMILIES = ("gpt_oss", "granitemoe")


@pytest.fixture(scope="module")
def models():
    return {family: pico.folder(family, with_tokenizer=False) for family in FAMILIES}


def experts_of(checkpoint, block=0):
    """Up and down tensors of a block's experts as [E, O, I], by name."""
    linears = [x for x in model_map(checkpoint.spec).layers if x.experts and x.block == block]
    return {
        x.name: checkpoint.tensor(x.name).data.mT if x.transposed else checkpoint.tensor(x.name).data for x in linears
    }


@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_experts_run_one_by_one_compute_the_same(family):
    from compress.blockwise.experts import Experts, ExpertSwap, unfused

    model = pico.model(family)
    swaps = []
    for path, module in list(model.named_modules()):
        if Experts.fits(module):
            parent, _, child = path.rpartition(".")
            swaps.append(ExpertSwap(model.get_submodule(parent), child, Experts(module)))
    assert len(swaps) == 2
    expected = pico.logits(model)
    with unfused(swaps):
        torch.testing.assert_close(pico.logits(model), expected)


@pytest.mark.parametrize("family", pico.families(FAMILIES, tier=("granitemoe",)))
def test_rounded_experts_are_stored_in_compact_checkpoints(family, models, tmp_path):
    """Every expert has the codes of its own matrix; planned bytes are exact; transformers computes what we compute."""
    settings = {"weights": "int4", "method": "rtn", "fused_experts": True}
    checkpoint = open_checkpoint(models[family])
    planned = plan(checkpoint, "cast", **settings)
    out = compress.apply("cast", models[family], tmp_path / "out", store="compact", **settings)
    _, layout = stored_form(planned, "compact", 10**9, checkpoint.metadata)
    assert (out / "model.safetensors").stat().st_size == layout.bytes
    before, after = experts_of(checkpoint), experts_of(open_checkpoint(out))
    assert len(before) == 2
    for name, experts in before.items():
        group = 32 if experts.shape[-1] == 32 else 0
        quant_format = QuantFormat("int4", 0 if 48 in [e.shape[-1] for e in before.values()] else group)
        for one, values in zip(experts, after[name], strict=True):
            assert torch.equal(values, dequantize(rounded(one.contiguous(), quant_format, torch.float32, search=False)))
    assert torch.equal(stock_logits(out, tmp_path, trust=True), our_logits(out))


def test_rounded_experts_in_stock_checkpoints(models, tmp_path):
    """Stock loaders read no codes of such experts: they keep their format, and the plan and the report say so."""
    details: dict = {}
    out = compress.apply("cast", models["gpt_oss"], tmp_path / "out", weights="int8", method="rtn", details=details)
    coded = [t.name for t in open_checkpoint(out).spec.stored() if t.quant_format is not None]
    assert len(coded) == 8
    assert all(".self_attn." in name for name in coded)
    assert "model.layers.0.mlp.experts and its like keep their format" in details["left"]
    assert torch.equal(stock_logits(out, tmp_path), our_logits(out))
    with pytest.raises(CompressError, match=r"stock loaders do not read int8 codes of .*experts.*use `store: compact`"):
        compress.apply("cast", models["gpt_oss"], tmp_path / "no", weights="int8", method="rtn", fused_experts=True)


@pytest.mark.parametrize("family", pico.families(FAMILIES, tier=("gpt_oss",)))
def test_pruned_experts_equal_a_solver_of_each_matrix(family, models, data, tmp_path):
    """SparseGPT on the inputs that stock transformers gives an expert behind the pruned attention, matrix by matrix."""
    settings = {"method": "sparsegpt", "sparsity": 0.5, "reconstruction_epochs": 0}
    out = compress.apply("prune_unstructured", models[family], tmp_path / "out", data=data.ids, **settings)
    model, pruned = (load_model(folder, dtype="float32") for folder in (models[family], out))
    for key, value in pruned.state_dict().items():
        if "self_attn" in key:  # experts come last, on what the pruned attention gives them
            model.state_dict()[key].copy_(value)
    mlp = next(m for n, m in model.named_modules() if hasattr(m, "experts") and ".0." in n)
    calls = []
    mlp.experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        model(input_ids=data.ids)
    (states, chosen, _) = calls[0]
    before, after = experts_of(open_checkpoint(models[family])), experts_of(open_checkpoint(out))
    name = next(n for n, e in before.items() if e.shape[-1] == 32)
    rows = slice(0, None, 2) if family == "gpt_oss" else slice(0, 48)  # the gate's
    x = states[(chosen == 1).any(-1)]
    factor = inverse_factor((x.T @ x).double())[0].float()
    weight, mask = sparsegpt(before[name][1, rows].contiguous(), factor, sparsity=0.5)
    kept = after[name][1, rows]
    assert torch.equal(kept != 0, mask)
    torch.testing.assert_close(kept, weight.masked_fill(~mask, 0), rtol=1e-3, atol=1e-4)
    assert torch.equal(stock_logits(out, tmp_path), our_logits(out))


@pytest.mark.slow
def test_calibrated_codes_of_experts_beat_rounding(models, data, tmp_path):
    errors = {}
    expected = our_logits(models["gpt_oss"])
    for method in ("rtn", "gptq"):
        settings = {"weights": "int3", "method": method, "store": "compact", "reconstruction_epochs": 0}
        given = {"data": data.ids} if method == "gptq" else {}
        out = compress.apply("cast", models["gpt_oss"], tmp_path / method, **given, **settings)
        coded = [t for t in open_checkpoint(out).spec.stored() if t.quant_format is not None]
        assert sum(t.quant_format.experts == 4 for t in coded) == 4
        errors[method] = float((our_logits(out) - expected).square().mean())
    assert errors["gptq"] < errors["rtn"]
    assert torch.equal(stock_logits(tmp_path / "gptq", tmp_path, trust=True), our_logits(tmp_path / "gptq"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("granitemoe", marks=pytest.mark.slow)])
def test_budgets_and_allocation_reach_such_experts(family, models, data, tmp_path):
    settings = {"bits": 4.8, "group_size": 16, "reconstruction_epochs": 0, "error_correction": [], "store": "compact"}
    out = compress.apply("cast", models[family], tmp_path / "bits", data=data.ids, **settings)
    coded = [t for t in open_checkpoint(out).spec.stored() if t.quant_format is not None]
    experts = {t.quant_format for t in coded if t.quant_format.experts}
    assert len(experts) == 1 or len({f.format for f in experts}) == 1
    assert sum(p.bytes for t in coded for p in parts(t)) * 8 / sum(t.count for t in coded) <= 4.8
    settings = {"sparsity": 0.5, "method": "wanda", "allocation": "kl", "reconstruction_epochs": 0}
    pruned = compress.apply("prune_unstructured", models[family], tmp_path / "kl", data=data.ids, **settings)
    spec = open_checkpoint(pruned).spec
    kept = [t for t in spec.stored() if t.kept is not None]
    assert len({round(t.kept / t.count, 2) for t in kept if len(t.shape) == 3}) > 1
    assert abs(sum(t.kept for t in kept) / sum(t.count for t in kept) - 0.5) < 0.02


def test_scales_of_all_experts_are_refused_where_each_is_solved_alone(models, tmp_path):
    half = compress.apply("cast", models["gpt_oss"], tmp_path / "bf16", weights="bf16")
    spec, cast = open_checkpoint(half).spec, get("cast")
    with pytest.raises(
        PassError, match=r"has one nvfp4 scale for all experts, and `method: gptq` solves them one by one"
    ):
        cast.plan(spec, cast.settings(weights="nvfp4", only=["*.mlp.experts"]))


@pytest.mark.slow
def test_experts_of_a_class_that_reads_both_ways_are_pruned_alike(tmp_path):
    """Qwen3-VL-MoE turns tensors of experts that have the other shape: published files are [E, I, O], those it writes are not."""
    model = pico_model(transformers.Qwen3VLMoeForConditionalGeneration, shrunken(default_config("qwen3_vl_moe")))
    model.save_pretrained(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "turned")
    tensors = load_file(tmp_path / "straight" / "model.safetensors")
    turned = {n: t.mT.contiguous() if t.ndim == 3 and ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, tmp_path / "turned" / "model.safetensors", metadata={"format": "pt"})
    ids = Batches(torch.randint(5, 250, (4, 12), generator=torch.Generator().manual_seed(0)))
    name = "model.language_model.layers.0.mlp.experts.{}_proj"
    pruned = [
        apply(
            open_checkpoint(tmp_path / layout),
            "prune_unstructured",
            data=ids,
            work=tmp_path / f"{layout}-work",
            method="sparsegpt",
            sparsity=0.5,
            only=("*.layers.0.mlp.experts",),
        )
        for layout in ("straight", "turned")
    ]
    for one in (name.format("gate_up"), name.format("down")):
        straight, other = (checkpoint.tensor(one) for checkpoint in pruned)
        assert float((straight.data == 0).float().mean()) == 0.5
        torch.testing.assert_close(straight.data, other.data.mT)
        assert torch.equal(straight.mask, other.mask.mT)
