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
from compress.spec.spec import Spec

#: Blocks that are timed, and cached tokens before the timed one where the model was trained on so many.
_BLOCKS, _TOKENS = 2, 768


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
    """The spec of a model with the first blocks alone."""
    mapped = model_map(spec)
    keep = range(min(_BLOCKS, mapped.depth))
    tensors = {n: t for n, t in spec.tensors.items() if mapped.block_of(n) in (None, *keep)}
    config = mapped.record.cut_depth(spec.structure.config, keep)
    return replace(spec, tensors=tensors, structure=replace(spec.structure, config=config))
