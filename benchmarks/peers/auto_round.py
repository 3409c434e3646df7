"""auto-round with its default of 200 steps a block, symmetric int4 or int3 in groups of 64."""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoTokenizer

from benchmarks.peers import worker


def compress(model: Any, ids: torch.Tensor, request: dict[str, Any]) -> None:
    """Tune rounding and clipping; the weights become what the codes say."""
    AutoRound(
        model, AutoTokenizer.from_pretrained(request["model"]), scheme=f"W{request['amount'][-1]}A16",
        bits=int(request["amount"][-1]), group_size=worker.GROUP, sym=not request["method"].endswith("asymmetric"),
        iters=200, nsamples=len(ids), seqlen=ids.shape[1], dataset=[{"input_ids": row[None]} for row in ids],
        device_map="cpu",
    ).quantize()  # fmt: skip


if __name__ == "__main__":
    worker.run(compress)
