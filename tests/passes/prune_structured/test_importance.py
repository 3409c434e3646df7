"""Importance of experts, against the paper."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.models.loading import load_model
from tests.toolbox import apply


def test_expert_saliency_matches_paper(folders, tmp_path):
    """Mean over the tokens sent to an expert of its router weight times the norm of its output, by hooks on the stock model."""

    ids = torch.randint(0, 250, (6, 16), generator=torch.Generator().manual_seed(1))
    details: dict = {}
    original = open_checkpoint(folders["mixtral"])
    apply(
        original, "prune_structured", data=Batches(ids), work=tmp_path, details=details, experts=1, compensation="none"
    )
    model = load_model(original.folder)
    experts = model.model.layers[0].mlp.experts
    seen = {}
    experts.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    with torch.no_grad():
        model(input_ids=ids)
        hidden, index, weights = seen["args"]
        for e in range(4):
            token, place = torch.where(index == e)
            gate, up = torch.nn.functional.linear(hidden[token], experts.gate_up_proj[e]).chunk(2, -1)
            out = torch.nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[e])
            expected = (weights[token, place] * out.norm(dim=-1)).mean().item()
            assert details["expert_saliency"]["0"][e] == pytest.approx(expected, rel=1e-4)
