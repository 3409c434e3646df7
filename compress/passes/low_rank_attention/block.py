"""The projections of one block, fitted on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compress.blockwise.block import Block
from compress.blockwise.results import TensorExtras
from compress.checkpoint.edits.linformer import neighbour_means, text_of
from compress.errors import PassError
from compress.sensitivity.attention import AttentionCall, observed_attention
from compress.solvers.linformer import Attended, project_values

#: Most samples that are held at a time, and one in how many is held out.
SAMPLES, HELD_OUT = 32, 4


def fit_block(block: Block, rank: int, positions: int, iterations: int) -> dict[str, TensorExtras]:
    """Fit the projections of a block; the block stays as it is.

    Returns:
        Both projections [rank, positions] as the factors of the block's one wanted tensor. ``block.details`` gets the
        relative error of the attention's outputs on held-out samples, of means of neighbours and after the fit.
    """
    (linear,) = block.linears
    means = neighbour_means(rank, positions).to(block.view.device)
    samples = _samples(block, means)
    fitting = [sample for number, sample in enumerate(samples) if number % HELD_OUT]
    fitted, errors = project_values(fitting, samples[::HELD_OUT], means, iterations)
    values, row = block.view.processes.broadcast_object(
        0, (fitted.cpu().clone(), {"before": errors[0], "after": min(errors), "iterations": len(errors) - 1})
    )
    block.details["projection"] = row
    return {linear.name: TensorExtras(factors=(means.cpu(), values))}


def _samples(block: Block, means: torch.Tensor) -> list[Attended]:
    """The first samples that have more tokens than rows. Raises `PassError` if there are too few."""
    samples: list[Attended] = []
    for rows in block.view.batches():
        calls: list[AttentionCall] = []
        with torch.no_grad(), observed_attention(calls.append):
            block.forward(rows, block.read_inputs(rows))
        if len(calls) != 1:
            raise PassError(f"block {block.index} does not call its attention once, through transformers' interface")
        samples += _attended(calls[0], means)
        if len(samples) >= SAMPLES:
            break
    if len(samples) < 2:
        raise PassError(
            f"no two samples have more tokens than the {len(means)} rows", key="rank", fix="give longer samples"
        )
    return samples[:SAMPLES]


def _attended(call: AttentionCall, means: torch.Tensor) -> list[Attended]:
    """The samples of a call that have more tokens than rows, each without its padding."""
    (rank, positions), tokens = means.shape, call.key.shape[2]
    text: Any = text_of(call.mask, tokens)
    samples = []
    for number in range(len(call.query)):
        own: Sequence[Any] | slice = (
            slice(None) if text is None else text[number if len(text) > 1 else 0].nonzero()[:, 0]
        )
        query, key, value, output = (
            part[number][:, own].float() for part in (call.query, call.key, call.value, call.output.transpose(1, 2))
        )
        length = key.shape[1]
        if length <= rank:
            continue
        places = torch.arange(length, device=key.device)
        columns = ((2 * places + 1) * positions).div(2 * length, rounding_mode="floor")
        scale = positions / length
        projected = (means[:, columns] * scale).to(key.device) @ key
        weights = (query @ projected.transpose(1, 2) * call.scale).softmax(-1)
        samples.append(Attended(weights, value, output.detach(), columns, scale))
    return samples
