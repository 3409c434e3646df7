"""Decode of a block with latent attention beside the original's, in stock transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.values import Checkpoint
from compress.evaluation.prefill import decode_ratio
from compress.models.loading import load_checkpoint
from compress.models.noise import with_noise
from compress.passes.base import Context
from compress.passes.latent_attention.plan import TIMED_BLOCKS
from compress.spec.spec import Spec

#: Cached tokens before the timed one where the model was trained on so many, and most rows of the tables.
_TOKENS, _ROWS = 768, 256


def decode(before: Checkpoint, after: Checkpoint, context: Context) -> dict[str, float]:
    """A block's time for one token after ``tokens`` cached ones, over the original's: ``ratio``.

    The first two blocks are timed, with random values and without the head, which both models share.
    """
    tokens = min(_TOKENS, model_map(before.spec).trained_positions or _TOKENS)
    original, candidate = _blocks(before, context), _blocks(after, context)
    generator = torch.Generator().manual_seed(context.seed)
    rows = len(original.get_input_embeddings().weight)
    prompt = torch.randint(rows, (1, tokens), generator=generator).to(context.device)
    return {"tokens": tokens, "ratio": decode_ratio(original, candidate, prompt, seed=context.seed)}


def _blocks(checkpoint: Checkpoint, context: Context) -> Any:
    noise = with_noise(checkpoint, _first(checkpoint.spec), context.seed)
    return load_checkpoint(noise, dtype=context.dtype, device=context.device).base_model


def _first(spec: Spec) -> Spec:
    """The spec of a model with the first blocks alone, and few rows of the tables."""
    mapped = model_map(spec)
    keep = range(min(TIMED_BLOCKS, mapped.depth))
    config = mapped.record.cut_depth(spec.structure.config, keep)
    rows = config["vocab_size"]
    tensors = {n: t for n, t in spec.tensors.items() if mapped.block_of(n) in keep}
    for name, tensor in spec.tensors.items():
        if mapped.block_of(name) is None:
            table = tensor.shape[:1] == (rows,)
            tensors[name] = replace(tensor, shape=(min(rows, _ROWS), *tensor.shape[1:])) if table else tensor
    config = {**config, "vocab_size": min(rows, _ROWS), "pad_token_id": None}
    return replace(spec, tensors=tensors, structure=replace(spec.structure, config=config))
