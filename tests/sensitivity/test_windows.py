"""Losses of windows, against whole models, dense masks and plain backward passes with the same drawn tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface

from compress.blockwise.executor import BlockExecutor
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.models.loading import load_checkpoint
from compress.progress import SilentProgress
from compress.sensitivity import attention
from compress.sensitivity.attention import Sight
from compress.sensitivity.labels import draw
from compress.sensitivity.windows import WindowLosses, window_losses
from compress.solvers.windows import HeadProducts, sink_logits
from compress.workspace import Workspace
from tests import pico
from tests.toolbox import LENGTH, SAMPLES, inputs_of

SIGHTS = (Sight(3), Sight(5, first=2))
FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral", "granite_swa"]


def measured(folder, work, logits, by, mask=None):
    checkpoint = open_checkpoint(folder)
    executor = BlockExecutor(checkpoint, inputs_of(checkpoint, mask=mask), dtype="float32", device="cpu")
    executor.learn_calls()
    sights = [replace(sight, logits=logits) for sight in SIGHTS]
    losses = window_losses(executor, sights, by=by, workspace=Workspace(work), progress=SilentProgress())
    return losses, executor


seen: dict[int, tuple] = {}


def keeping(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    """Dense attention of the original that keeps its scores, values and outputs."""
    repeated = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeated, 1) for x in (key, value))
    scores = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores + attention_mask[..., : scores.shape[-1]]
    n = torch.arange(scores.shape[-1])
    scores = scores.masked_fill(n[:, None] < n[None], -torch.inf)
    sink = torch.full((query.shape[1],), -1e4) if s_aux is None else s_aux
    output = scores.softmax(-1) @ value * torch.sigmoid(scores.logsumexp(-1) - sink[:, None])[..., None]
    output.retain_grad()
    seen[module.layer_idx] = (scores.detach(), value.detach(), output, sink.detach(), repeated)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("keeping", keeping)


def expected(executor, logits, by, mask):
    """By (unit, window), changes of the log-likelihood by token; and logits by block and window."""
    model = load_checkpoint(executor.checkpoint, dtype="float32").requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.requires_grad_())
    model.set_attn_implementation("eager")
    for module in [model, *model.modules()]:
        if hasattr(module, "config"):
            module.config._attn_implementation = "keeping"
    rows, tokens, firsts = {}, 0, {}
    for row in range(SAMPLES):
        model(**{name: value[:, :1] for name, value in executor.inputs.rows([row]).items()})
        for index, (_, value, *_) in seen.items():
            firsts[index] = firsts.get(index, 0) + value[0, :, 0] / SAMPLES
    for row in range(SAMPLES):
        inputs = executor.inputs.rows([row])
        inputs["attention_mask"] = dense(executor, row)
        generator = torch.Generator().manual_seed(executor.seed * 1_000_003 + row)
        output = model(**inputs)[0][0]
        drawn = draw(output, generator)
        losses = torch.nn.functional.cross_entropy(output, drawn, reduction="none")
        counted = torch.ones(LENGTH, dtype=torch.bool) if mask is None else mask[row]
        losses[counted].sum().backward()
        tokens += int(counted.sum())
        for index, (scores, value, out, sink, repeated) in seen.items():
            for number, sight in enumerate(SIGHTS):
                n = torch.arange(LENGTH)
                visible = (n[:, None] - n[None] < sight.window) | (n[None] < sight.first)
                kept = scores.masked_fill(~visible, -torch.inf)
                lost = scores.masked_fill(visible, -torch.inf).logsumexp(-1)[0]
                heads = kept.softmax(-1) @ value
                sunk = (out.grad * firsts[index][:, None]).sum(-1)[0]
                if not logits:
                    heads = heads * torch.sigmoid(kept.logsumexp(-1) - sink[:, None])[..., None]
                part = ((out.grad * out).sum(-1)[0], (out.grad * heads).sum(-1)[0], kept.logsumexp(-1)[0])
                lost = lost.masked_fill(~counted, -torch.inf)
                rows.setdefault((index, number), []).append((*part, lost, sunk, repeated))
    changes, searched = [], []
    for index in sorted({i for i, _ in rows}):
        units, chosen = [], []
        for number in range(len(SIGHTS)):
            full, kept, mass, lost, sunk = (
                torch.cat(x, -1).detach() for x in list(zip(*rows[index, number], strict=True))[:5]
            )
            real = torch.isfinite(lost)
            start = torch.where(real, lost, 0).sum(-1) / real.sum(-1)
            groups = len(full) // rows[index, number][0][5] if by == "heads" else 1
            products = HeadProducts(full, kept, mass, start.masked_fill(real.sum(-1) == 0, -torch.inf), sunk)
            found = sink_logits(products, groups) if logits else None
            chosen.append(found)
            units.append(products.changes(found).view(groups, -1, full.shape[-1]).sum(1))
        changes += [unit for group in zip(*units, strict=True) for unit in group]
        searched.append(chosen)
    changes = torch.stack(changes).double()
    return changes @ changes.T / 2 / tokens, searched, firsts


def dense(executor, row):
    """The mask of a sample as the model makes it, to be added to scores; a dict by kind where it makes several."""
    mask = executor.token_mask([row])
    n = torch.arange(LENGTH)
    causal = (n[:, None] >= n[None])[None, None]
    if mask is not None:
        causal = causal & mask[:, None, None]
        causal = causal | torch.eye(LENGTH, dtype=torch.bool)
    plain = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    config = executor.streamed.model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds <= {"full_attention"} and window is None:
        return plain
    sliding = plain.masked_fill(n[:, None] - n[None] >= (window or LENGTH), torch.finfo(torch.float32).min)
    return {"full_attention": plain, "sliding_attention": sliding} if kinds else sliding


@pytest.mark.parametrize(
    ("family", "logits"),
    [
        pytest.param(family, logits, marks=[] if number % 2 == logits else [pytest.mark.slow])
        for number, family in enumerate(FAMILIES)
        for logits in (False, True)
    ],
)
def test_window_losses_match_whole_models_and_dense_masks(family, logits, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES", 5)
    mask = None
    if family in ("llama", "granite_swa"):
        mask = torch.ones(SAMPLES, LENGTH, dtype=torch.bool)
        mask[1, 7:] = mask[4, 9:] = False
    folder = pico.folder(family)
    by = "heads" if logits == (family in ("llama", "gemma2", "gpt2")) else "layers"
    losses, executor = measured(folder, tmp_path, logits, by, mask)
    joint, searched, firsts = expected(executor, logits, by, mask)
    assert losses.joint.shape == joint.shape
    assert float(joint.diagonal().sum()) > 0
    assert (losses.joint - joint).abs().max() <= 1e-3 * joint.abs().max()
    if logits:
        assert torch.allclose(torch.tensor(losses.logits), torch.stack([torch.stack(s) for s in searched]), atol=1e-3)
    for index, value in firsts.items():
        repeated = len(value) // len(losses.values[index])
        assert torch.allclose(torch.tensor(losses.values[index]), value[::repeated], atol=1e-5)
    assert not any(p.suffix == ".act" for p in tmp_path.iterdir())


def test_results_survive_json():
    joint, noise = torch.rand(2, 4, 4, dtype=torch.float64)
    losses = WindowLosses(joint, [[[0.5, -1e4]], [[1.0, 2.0]]], [[[0.25, 0.5]]] * 2, noise)
    again = WindowLosses.from_json(losses.to_json())
    assert torch.equal(again.joint, losses.joint)
    assert torch.equal(again.noise, losses.noise)
    assert (again.logits, again.values) == (losses.logits, losses.values)


def test_attention_outside_the_interface_is_refused(tmp_path):
    with pytest.raises(PassError, match="block 3 does not call its attention once"):
        measured(pico.folder("bloom"), tmp_path, False, "layers")
