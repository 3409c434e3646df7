"""Importance of experts and hidden channels, measured by a block runner that changes nothing."""

from __future__ import annotations

import torch

from compress.blockwise.block import Block
from compress.blockwise.details import BlockDetails
from compress.blockwise.experts import unfused
from compress.blockwise.results import TensorExtras
from compress.blockwise.runner import BlockRunner
from compress.errors import PassError


def expert_saliency(runner: BlockRunner) -> tuple[dict[int, list[float]], list[BlockDetails]]:
    """Saliency of every expert by block: mean over its tokens of the router weight times the norm of the expert's output.

    Experts that get no token have 0. Also returns a row for each block with the number of tokens of each expert, see
    `Block.experts`.

    Raises:
        PassError: the model's experts are of an unknown kind.

    Source: REAP (arXiv 2510.13999), equation 9.
    """

    def score(block: Block) -> dict[str, TensorExtras]:
        if not block.swaps:
            raise PassError(f"the experts of block {block.index} are of a kind that cannot be scored", key="experts")
        experts = block.swaps[0].experts
        sums = torch.zeros(2, len(experts.gate), dtype=torch.float64)

        def watch(expert: int, outputs: torch.Tensor, weights: torch.Tensor) -> None:
            sums[0, expert] += float((weights.float() * outputs.float().norm(dim=-1)).sum())
            sums[1, expert] += len(outputs)

        experts.watch = watch
        with torch.no_grad(), unfused(block.swaps):
            for rows in block.view.batches():
                mask = block.token_mask(rows)
                experts.token_mask = None if mask is None else mask.flatten()
                block.forward(rows, block.read_inputs(rows))
        experts.watch = experts.token_mask = None
        block.view.processes.all_reduce(sums)
        for e, gate in enumerate(experts.gate):
            block.count([linear for linear in block.linears if linear.module is gate], int(sums[1, e]))
        block.details["saliency"] = (sums[0] / sums[1].clamp(min=1)).tolist()
        return {}

    rows = runner.run(score, "scoring experts").details
    scored = [row for row in rows if "saliency" in row]
    reached: list[BlockDetails] = [{"block": row["block"], "experts": row["experts"]} for row in scored]
    return {row["block"]: row["saliency"] for row in scored}, reached


def channel_importance(runner: BlockRunner, width: int) -> torch.Tensor:
    """Importance of each hidden channel [width], float64: the error of all matrices that read the hidden width without it.

    Σ x² Σ w² per channel, as a share of that of all channels, summed over the matrices of all blocks.
    """
    total = torch.zeros(width, dtype=torch.float64)

    def score(block: Block) -> dict[str, TensorExtras]:
        shares = torch.zeros(width, dtype=torch.float64)
        names = {linear.name for linear in block.linears if linear.weight.shape[1] == width}
        for group, statistics, _ in block.statistics(groups=block.groups_with(names)):
            for linear in group:
                lost = statistics.hessian.diagonal().double() * linear.weight.double().square().sum(0)
                shares += (lost / lost.sum().clamp(min=1e-300)).cpu()
        block.details["importance"] = shares.tolist()
        return {}

    for row in runner.run(score, "scoring hidden channels").details:
        if "importance" in row:
            total += torch.tensor(row["importance"], dtype=torch.float64)
    return total
