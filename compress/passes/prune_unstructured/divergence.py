"""Divergence of the model's predictions if one matrix alone were pruned, with one block in memory at a time.

To second order the KL divergence is ½ E (gᵀ ΔW x)², with x a token's inputs of the matrix and g the gradient, at its outputs,
of the log-likelihood of a token drawn from the model's own prediction (the Fisher information).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.block import Block
from compress.blockwise.hessians import counted
from compress.blockwise.linears import TargetLinear
from compress.blockwise.memory_budget import PROBE_BYTES
from compress.blockwise.results import TensorExtras
from compress.blockwise.runner import BlockRunner
from compress.passes.prune_unstructured.block import Method, pruned_on_trial
from compress.sensitivity.matrices import by_tensor, users_of, with_cold_experts
from compress.sensitivity.output_curvature import Gradients

#: A linear, and its change ΔW [O, I] at each sparsity, bfloat16.
Probe = tuple[TargetLinear, list[torch.Tensor]]


def pruning_divergences(
    runner: BlockRunner, gradients: Gradients, method: Method, sparsities: Sequence[float]
) -> dict[str, list[float]]:
    """Divergence of the model's predictions, in nats per token, if one tensor alone were pruned, at each sparsity.

    Of tensors in the last list of blocks; convolutions have none. Runs over the blocks as they are.

    Args:
        runner: without targets, in a workspace of its own. gradients: of its executor; measured here.
    """
    mapped = model_map(runner.checkpoint.spec)

    def measure(block: Block) -> dict[str, TensorExtras]:
        if gradients.known and block.index >= gradients.first:
            sums = _sums(block, gradients, method, sparsities)
            linears = {linear.name: linear for linear in block.linears if linear.name in sums}
            totals = by_tensor(linears, with_cold_experts(mapped, linears, sums))
            block.details["divergence"] = {name: list(row.values()) for name, row in totals.items()}
        return {}

    details = runner.run(measure, "pruning on trial", gradients.measure).details
    users = Counter(source for source, _ in users_of(mapped, sorted(runner.wanted)))  # blocks that share a tensor
    rows = {name: row for one in details for name, row in one.get("divergence", {}).items()}
    return {name: [users[name] * value for value in row] for name, row in rows.items()}


def _sums(
    block: Block, gradients: Gradients, method: Method, sparsities: Sequence[float]
) -> dict[str, dict[str, float]]:
    """The divergence of each linear by number of the sparsity. Probes are measured together, as many as fit `PROBE_BYTES`."""
    sums: dict[str, dict[str, float]] = {}
    probes: list[Probe] = []
    waiting = 0
    for group, statistics, _ in block.statistics():
        shared: dict[str, Any] = {}
        for linear in group:
            if linear.kernel:
                continue
            size = 2 * len(sparsities) * linear.weight.numel()
            if probes and waiting + size > PROBE_BYTES:
                sums |= _measured(block, gradients, probes)
                probes.clear()
                waiting = 0
            probes.append((linear, pruned_on_trial(block, linear, statistics, method, sparsities, shared)))
            waiting += size
    return sums | (_measured(block, gradients, probes) if probes else {})


def _measured(block: Block, gradients: Gradients, probes: Sequence[Probe]) -> dict[str, dict[str, float]]:
    """½ E (gᵀ ΔW x)² over the tokens that gradients are known of."""
    totals = {linear.name: [0.0] * len(changes) for linear, changes in probes}
    tokens = 0
    with _recorded_inputs([linear for linear, _ in probes]) as inputs:
        for rows, outputs in gradients.at(block, [linear for linear, _ in probes], block.inputs):
            masks = block.token_masks(rows)
            tokens += int(masks[0].sum()) if masks else block.read_inputs(rows).shape[:2].numel()
            for linear, changes in probes:
                if (g := outputs.get(linear.name)) is not None:
                    x = counted(linear.rows(inputs[linear.name]).float(), masks)
                    for number, change in enumerate(changes):
                        pulls = ((x @ change.float().T) * g).sum(1)
                        totals[linear.name][number] += float(pulls.double().square().sum())
            inputs.clear()
    processes = block.view.processes
    count = processes.reduce_sum(tokens)[0]
    return {
        name: {str(i): 0.5 * total / max(count, 1) for i, total in enumerate(processes.reduce_sum(*row))}
        for name, row in totals.items()
    }


@contextmanager
def _recorded_inputs(linears: Sequence[TargetLinear]) -> Iterator[dict[str, torch.Tensor]]:
    """Within, what each linear reads, by name."""
    inputs: dict[str, torch.Tensor] = {}

    def listen(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            inputs[name] = args[0].detach()

        return hook

    handles = [linear.module.register_forward_pre_hook(listen(linear.name)) for linear in linears]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
