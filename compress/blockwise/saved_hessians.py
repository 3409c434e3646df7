"""Input statistics of the model as it came, collected in one run over its blocks and kept in files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.blockwise.executor import BlockExecutor
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.self_check import check_blockwise
from compress.blockwise.unchanged import unchanged_blocks
from compress.progress import Progress
from compress.workspace import Workspace


class SavedHessians:
    """Statistics by tensor, from files of a workspace: one for each group of matrices that read the same inputs.

    Attributes:
        device: where tensors are returned. files: number of the file of each tensor.
    """

    def __init__(self, workspace: Workspace, device: str) -> None:
        self._workspace, self.device = workspace, device
        self.files: dict[str, int] = {}
        self._energies: dict[str, float] = {}

    def collect(
        self,
        executor: BlockExecutor,
        names: Mapping[int, Collection[str]],
        *,
        activations: Path,
        progress: Progress,
        title: str,
        check: bool = False,
    ) -> None:
        """Run the blocks as they are and save the statistics, unless that was done before.

        Args:
            names: tensors by block. activations: folder for their files. title: of the progress bar.
            check: also check that the model can be run block by block; pass it where nobody else has.
        """

        def collect() -> dict[str, tuple[int, float]]:
            if check:
                check_blockwise(executor, progress)
            table: dict[str, tuple[int, float]] = {}
            number, last = 0, max(names)
            with progress.task(title, last + 1, "blocks") as task:
                for block in unchanged_blocks(executor, activations, last, names):
                    for group, statistics, _ in block.statistics() if block.linears else ():
                        table |= {linear.name: (number, _energy(linear, statistics)) for linear in group}
                        sums = {"hessian": statistics.hessian.contiguous(), "total": statistics.total.contiguous()}
                        tokens = torch.tensor(statistics.tokens)
                        self._workspace.save_tensors(str(number), {**sums, "tokens": tokens})
                        number += 1
                    task.advance()
            return table

        saved = self._workspace.cached("table", collect)
        self.files = {name: number for name, (number, _) in saved.items()}
        self._energies = {name: energy for name, (_, energy) in saved.items()}

    def sums(self, number: int) -> dict[str, Any]:
        """``hessian`` Σ x xᵀ [I, I], ``total`` Σ x [I] and number of ``tokens`` in a file."""
        from safetensors.torch import load_file

        sums: dict[str, Any] = load_file(self._workspace.tensors(str(number)), device=self.device)
        return {**sums, "tokens": int(sums["tokens"])}

    def hessian(self, name: str) -> torch.Tensor:
        """Mean of x xᵀ over tokens [I, I]."""
        sums = self.sums(self.files[name])
        result: torch.Tensor = sums["hessian"]
        return result.div_(max(sums["tokens"], 1))

    def energy(self, name: str) -> float:
        """Mean of ||W x||² over tokens, with the tensor's own weights; positive."""
        return max(self._energies[name], 1e-30)


def _energy(linear: TargetLinear, statistics: InputStatistics) -> float:
    W = linear.weight.float()
    return float(((W @ statistics.hessian.float()) * W).sum()) / max(statistics.tokens, 1)
