"""Importance by gradients, beside the derivative of the loss by a factor on every unit."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from compress.architectures import resize
from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from compress.passes.prune_structured.taylor import taylor_scores
from compress.progress import SilentProgress
from tests import pico
from tests.toolbox import apply, plan, write

IDS = torch.randint(0, 250, (5, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(5, 12, dtype=torch.bool)
MASK[1, 7:] = False
HOW = {"dtype": "float32", "device": "cpu", "seed": 3, "progress": SilentProgress()}


def units(checkpoint, whole_groups=False):
    neurons = [one for block in resize.mlp_units(checkpoint.spec).values() for one in block]
    heads = [one for block in resize.head_units(checkpoint.spec, whole_groups).values() for one in block]
    return [*neurons, *heads]


def derivative(model, parameter: str, count: int, batches: Batches, along: int, part=...) -> torch.Tensor:
    """Σ over samples of (d loss / d factor)², the factors multiplying inputs of that parameter."""
    weights = dict(model.named_parameters())
    total = torch.zeros(count, dtype=torch.float64)
    for sample in batches.parts(1):
        factor = torch.ones(count, requires_grad=True)
        weight = weights[parameter]
        wide = factor.repeat_interleave(weight.shape[along] // count)
        scale = torch.ones_like(weight)
        scale[part] = wide[:, None] if along == 0 else wide
        logits = functional_call(model, {parameter: weight * scale}, (), sample.inputs("cpu"))[0][0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], sample.ids[0, 1:], reduction="none")
        loss = losses[sample.mask[0, 1:]].sum()
        total += torch.autograd.grad(loss, factor)[0].double().square()
    return total


@pytest.mark.parametrize("family", pico.families(["llama", "gemma2", "phi3", "gpt2", "opt"], tier=("llama", "gpt2")))
@pytest.mark.parametrize("whole_groups", [False, True])
def test_taylor_scores_match_derivative_by_unit_factor(family, whole_groups, tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False))
    model = load_model(checkpoint.folder).requires_grad_(False)
    batches = Batches(IDS, MASK)
    found = taylor_scores(checkpoint, units(checkpoint, whole_groups), batches, **HOW)
    for one in units(checkpoint, whole_groups):
        expected = derivative(model, f"{one.name}.weight", one.count, batches, 0 if family == "gpt2" else 1)
        torch.testing.assert_close(torch.tensor(found[one.name]), expected, rtol=1e-3, atol=1e-7, check_dtype=False)


def test_taylor_scores_of_experts_match_derivative(tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", "mixtral", with_tokenizer=False))
    model = load_model(checkpoint.folder).requires_grad_(False)
    batches = Batches(IDS, MASK)
    found = taylor_scores(checkpoint, units(checkpoint), batches, **HOW)
    for expert in range(4):
        expected = derivative(model, "model.layers.1.mlp.experts.down_proj", 64, batches, 2, (expert,))
        (name,) = [n for n in found if n.startswith("model.layers.1.") and f"experts.{expert}." in n]
        torch.testing.assert_close(torch.tensor(found[name]), expected, rtol=1e-3, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize(
    ("family", "class_name"), [("bert", None), ("bert", "BertForSequenceClassification"), ("qwen3_moe", None)]
)
def test_taylor_scores_of_other_models_repeat_by_seed(family, class_name, tmp_path):
    """The same ones for the same seed; labels are drawn where the model predicts no next token."""
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False, class_name=class_name))
    first, again = (taylor_scores(checkpoint, units(checkpoint), Batches(IDS, MASK), **HOW) for _ in range(2))
    assert first == again
    assert all(min(scores) >= 0 for scores in first.values())
    assert sum(max(scores) > 0 for scores in first.values()) > len(first) / 2


def test_taylor_scores_refuse_model_without_head(tmp_path):
    folder = pico.save(tmp_path / "in", "bert", with_tokenizer=False, class_name="BertModel")
    with pytest.raises(
        PassError, match="importance: taylor needs a model that predicts something; set `importance: obs`"
    ):
        taylor_scores(open_checkpoint(folder), [], Batches(IDS), **HOW)


@pytest.mark.parametrize(
    ("family", "compensation"),
    [
        *(("llama", "reconstruction"), ("mixtral", "none")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", "none"), ("mixtral", "reconstruction"))),
    ],
)
def test_taylor_removes_units_of_least_score(family, compensation, tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False))
    settings = {
        "mlp": "50%",
        "heads": 2,
        "importance": "taylor",
        "compensation": compensation,
        "reconstruction_epochs": 1,
    }
    details: dict = {}
    made = apply(checkpoint, "prune_structured", data=Batches(IDS), work=tmp_path / "work", details=details, **settings)
    out = write(made, tmp_path / "out")
    assert plan(checkpoint, "prune_structured", **settings).tensors == out.spec.tensors
    scores = taylor_scores(checkpoint, units(checkpoint), Batches(IDS), **HOW)
    if compensation == "none":
        name = next(n for n in scores if "down_proj" in n or n.endswith("w2"))
        before, after = (c.tensor(f"{name}.weight").data for c in (checkpoint, out))
        kept = (before.T[:, None] == after.T[None]).all(-1).any(1)
        found = torch.tensor(scores[name])
        assert found[kept].min() >= found[~kept].max()
        assert "blocks" not in details
    pico.logits(load_model(out.folder))
