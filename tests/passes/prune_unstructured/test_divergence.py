"""Divergences by which sparsities are allocated, measured with one block in memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from compress import passes
from compress.checkpoint.open import open_checkpoint
from compress.models.loading import load_model
from compress.passes.prune_unstructured import divergence
from compress.passes.prune_unstructured.plan import allocation_of
from compress.sensitivity.labels import draw
from compress.solvers.wanda import keep_wanda
from tests.toolbox import apply


def test_divergence_of_a_block_is_that_of_the_whole_model(folders, data, tmp_path, monkeypatch):
    details, name = {}, "model.layers.1.mlp.down_proj"
    monkeypatch.setattr(divergence, "PROBE_BYTES", 1)  # one matrix at a time
    settings = {"method": "wanda", "sparsity": 0.5, "allocation": "kl", "reconstruction_epochs": 0}
    apply(
        open_checkpoint(folders["llama"]), "prune_unstructured", data=data, work=tmp_path, details=details, **settings
    )
    measured = details["allocation"]["divergence"][f"{name}.weight"]
    model = load_model(folders["llama"], dtype="float32")
    module, read, written = model.get_submodule(name), [], []
    module.register_forward_hook(lambda m, args, output: read.append(args[0].detach()) or written.append(output))
    generators = [torch.Generator().manual_seed(row) for row in range(len(data.ids))]
    losses = [
        cross_entropy(logits, draw(logits, generator), reduction="sum")
        for logits, generator in zip(model(input_ids=data.ids).logits, generators, strict=True)
    ]
    (g,) = torch.autograd.grad(torch.stack(losses).sum(), written)
    x = read[0].flatten(0, 1)
    for sparsity in (0.3, 0.5, 0.7):
        keep = keep_wanda(module.weight.detach(), x.square().sum(0), sparsity, None, None)
        change = module.weight.detach().masked_fill(keep, 0).bfloat16().float()
        pulls = (x @ change.T * g.flatten(0, 1)).sum(1)
        assert measured[str(sparsity)] == pytest.approx(0.5 * float(pulls.square().mean()), rel=1e-3)


def test_best_allocates_by_divergence_where_predictions_are_measured(folders):
    settings = passes.get("prune_unstructured").settings
    llama = open_checkpoint(folders["llama"]).spec
    assert allocation_of(llama, settings(sparsity=0.5, effort="best")) == "kl"
    assert allocation_of(llama, settings(pattern="2:4", effort="best")) == "uniform"
    assert allocation_of(llama, settings(sparsity=0.5, effort="best", method="magnitude")) == "uniform"
    assert allocation_of(llama, settings(sparsity=0.5)) == "uniform"
