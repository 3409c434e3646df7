"""Merge KV heads of one block: align them, average them, then solve the weights that read them by least squares.

The block keeps its shape: merged heads have equal weights, which computes the same as fewer heads. Slicing comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from compress.architectures.groups import KVHeadMerge, Slice
from compress.blockwise.asymmetric import mismatch_of
from compress.blockwise.block import Block
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.spilled import SpilledValues
from compress.solvers.gptq import asymmetric_target, ridge_factor
from compress.solvers.hessian import damped
from compress.solvers.kv_merge import align_keys, align_values, merge

#: Damping of the least squares, as for units that are removed.
_DAMP = 0.001


def merge_heads(
    block: Block, options: KVHeadMerge, *, align: bool, compensate: bool
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Merge the heads of a block in place.

    Args:
        align: align the heads on calibration data first.
        compensate: solve the weights that read them.

    Returns:
        The row for the report, and a function that makes merged heads equal again after a step of reconstruction.
    """
    linears = {linear.name: linear for linear in block.linears}
    output = linears[f"{options.output.module}.weight"]
    heads = [
        rows
        for member in (options.key, options.value)
        for rows in _rows(linears[f"{member.module}.weight"], member, options)
    ]

    def project() -> None:
        for rows in heads:
            rows.copy_(merge(rows, options.left))

    if align:
        (key,) = block.groups_with({f"{options.key.module}.weight"})
        for _, inputs, _ in block.statistics(groups=[key]):
            _align(linears, options, inputs)
    (reading,) = block.groups_with({output.name})
    ((_, before, _),) = block.statistics(groups=[reading])
    separate = [rows.clone() for rows in heads]
    project()
    block.view.processes.broadcast(0, *(linear.weight for linear in linears.values()), *heads)
    apart = SpilledValues(block.inputs.path.parent, heads, separate)
    measured = mismatch_of(block, reading, [apart])
    apart.close()
    assert measured is not None  # no router is in front of it
    now, mismatch = measured
    weight = output.weight.clone()
    if compensate:
        factor = ridge_factor(now.hessian, _DAMP)
        output.weight.copy_(asymmetric_target(weight, partial(mismatch.pull, output, weight), factor))
        block.view.processes.broadcast(0, output.weight)
    error = _error(weight, output.weight, before.hessian, now.hessian, mismatch.inputs)
    return {"kept": options.left, "of": options.heads, "error": error}, project


def _error(
    before: torch.Tensor, after: torch.Tensor, H_II: torch.Tensor, now_II: torch.Tensor, mismatch_II: torch.Tensor
) -> float:
    """||W X - V X̂||² over ||W X||², for weights [O, I] and inputs as they were and are; ``mismatch_II`` is Σ (x - x̂) x̂ᵀ."""
    W, V = before.to(H_II.dtype), after.to(H_II.dtype)
    scale = float(((W @ H_II) * W).sum())
    lost = scale - 2 * float(((W @ (mismatch_II + now_II)) * V).sum()) + float(((V @ now_II) * V).sum())
    return max(lost, 0.0) / scale if scale else 0.0


def _rows(linear: TargetLinear, member: Slice, options: KVHeadMerge) -> Iterator[torch.Tensor]:
    """Views by head of a member's weights [heads, width, I] and, if it has any, biases [heads, width]."""
    span = member.span(options.heads)
    bias: Any = linear.module.bias
    for tensor in (linear.weight, None if bias is None else bias.data):
        if tensor is not None:
            yield tensor[span.start : span.stop].view(options.heads, member.width, *tensor.shape[1:])


def _align(linears: Mapping[str, TargetLinear], options: KVHeadMerge, inputs: InputStatistics) -> None:
    """Rotate keys with their queries, and values with the weights that read them; the block computes the same."""
    H_II = damped(inputs.hessian)[0]
    query, key, value = (
        list(_rows(linears[f"{m.module}.weight"], m, options)) for m in (options.query, options.key, options.value)
    )
    output = linears[f"{options.output.module}.weight"].weight
    columns = output.T.view(options.heads, -1, len(output))  # [heads, width, O]
    per = options.heads // options.left
    for start in range(0, options.heads, per):
        run = slice(start, start + per)
        if options.rotary:
            R_GDD = align_keys(key[0][run], H_II, options.rotary)
            for rows in (*query, *key):
                _turn(rows[run], R_GDD)
        R_GDD = align_values(value[0][run], H_II)
        for rows in (*value, columns):
            _turn(rows[run], R_GDD)


def _turn(rows: torch.Tensor, R_GDD: torch.Tensor) -> None:
    """Rotate rows [G, heads x D, …] in place: one or several heads for each of the G heads that are merged."""
    heads = rows.reshape(len(rows), -1, R_GDD.shape[1], *rows.shape[2:])
    rows.copy_(torch.einsum("gde,ghe...->ghd...", R_GDD.to(rows.dtype), heads).flatten(1, 2))
