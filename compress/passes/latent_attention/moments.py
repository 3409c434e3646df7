"""Moments of a block's inputs, and of gradients at its keys and values, by which components are chosen.

The gradients are of the log-likelihood of tokens drawn from the model, so that losses are expected divergences, nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compress.blockwise.block import Block
from compress.blockwise.linears import TargetLinear
from compress.blockwise.results import TensorExtras
from compress.blockwise.runner import BlockRunner
from compress.progress import Progress
from compress.sensitivity.output_curvature import Gradients
from compress.workspace import Workspace


@dataclass(frozen=True)
class Moments:
    """Moments of one block, float64. The inputs x of its attention end with a 1, so that biases are weights: I + 1 of them.

    Attributes:
        second: E x xᵀ, [I + 1, I + 1]. by_key: the same, each token with the squared gradient at its key as weight. by_value:
            the mean of ``second`` and the same with the gradient at the value: a few tokens have outliers that nobody reads.
        key_energy: E |g|² at the keys. value_metric: E g gᵀ at the values of all groups, [V, V].
    """

    second: torch.Tensor
    by_key: torch.Tensor
    by_value: torch.Tensor
    key_energy: float
    value_metric: torch.Tensor


class MomentFiles:
    """Moments of all blocks, in a file each."""

    def __init__(self, workspace: Workspace, device: str) -> None:
        self._workspace, self._device = workspace, device

    def measure(self, runner: BlockRunner, modules: tuple[str, str], progress: Progress) -> None:
        """Run the blocks as they are, forwards and backwards, and save their moments; a killed run goes on.

        Args:
            modules: projections to keys and values, by their paths below a block.
        """
        gradients = Gradients(runner.executor, self._workspace.folder("gradients"), progress)

        def save(block: Block) -> dict[str, TensorExtras]:
            key, value = (next(x for x in block.linears if x.name.endswith(f"{m}.weight")) for m in modules)
            self._workspace.save_tensors(f"{block.index:05}", _measured(block, key, value, gradients))
            return {}

        runner.run(save, "measuring keys and values", before=gradients.measure)

    def of(self, index: int) -> Moments:
        """The moments of a block."""
        from safetensors.torch import load_file

        saved: dict[str, Any] = load_file(self._workspace.tensors(f"{index:05}"), device=self._device)
        return Moments(**{**saved, "key_energy": float(saved["key_energy"])})


def _measured(block: Block, key: TargetLinear, value: TargetLinear, gradients: Gradients) -> dict[str, torch.Tensor]:
    """Fields of the block's `Moments`."""
    group = next(group for group in block.groups if any(linear is key for linear in group))
    ((_, statistics, _),) = block.statistics(groups=[group])
    mean = statistics.total.double() / max(1, statistics.tokens)
    second = torch.zeros(len(mean) + 1, len(mean) + 1, dtype=torch.float64, device=mean.device)
    second[:-1, :-1] = statistics.hessian.double() / max(1, statistics.tokens)
    second[-1, :-1] = second[:-1, -1] = mean
    second[-1, -1] = 1
    weighted = torch.zeros(2, *second.shape, dtype=second.dtype, device=second.device)
    metric = second.new_zeros(len(value.weight), len(value.weight))
    energies, tokens = second.new_zeros(2), second.new_zeros(())
    inputs: list[torch.Tensor] = []
    hook = key.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    try:
        for rows, by_name in gradients.at(block, [key, value], block.inputs):
            mask, x = block.token_mask(rows), inputs.pop().flatten(0, -2).double()
            x = torch.nn.functional.pad(x if mask is None else x[mask.flatten()], (0, 1), value=1.0)
            for place, linear in enumerate((key, value)):
                weights = by_name[linear.name].double().square().sum(1)
                weighted[place] += (x * weights[:, None]).T @ x
                energies[place] += weights.sum()
            metric += (by_name[value.name].T @ by_name[value.name]).double()
            tokens += len(x)
    finally:
        hook.remove()
    block.view.processes.all_reduce(weighted, metric, energies, tokens)
    by_key, by_value = weighted / energies.clamp_min(1e-30)[:, None, None]
    return {
        "second": second,
        "by_key": by_key.contiguous(),
        "by_value": (second + by_value) / 2,
        "key_energy": energies[0] / tokens.clamp_min(1),
        "value_metric": metric / tokens.clamp_min(1),
    }
