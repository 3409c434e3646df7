"""Input statistics of the model as it came, collected in one run over its blocks and kept in files."""

from __future__ import annotations

import json
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


class SavedHessians:
    """Statistics by tensor, from files of a folder: one for each group of matrices that read the same inputs.

    Attributes:
        device: where tensors are returned. files: number of the file of each tensor.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.files: dict[str, int] = {}
        self._energies: dict[str, float] = {}

    def collect(
        self,
        executor: BlockExecutor,
        names: Mapping[int, Collection[str]],
        *,
        work: Path,
        progress: Progress,
        title: str,
        check: bool = False,
    ) -> None:
        """Run the blocks as they are and save the statistics, unless that was done before.

        Args:
            names: tensors by block. work: folder for activations. title: of the progress bar.
            check: also check that the model can be run block by block; pass it where nobody else has.
        """
        table = self.folder / "table.json"
        if not executor.processes.broadcast_object(0, table.exists()):
            if check:
                check_blockwise(executor, progress)
            rows: dict[str, tuple[int, float]] = {}
            number, last = 0, max(names)
            with progress.task(title, last + 1, "blocks") as task:
                for block in unchanged_blocks(executor, work, last, names):
                    for group, statistics, _ in block.statistics() if block.linears else ():
                        rows |= {linear.name: (number, _energy(linear, statistics)) for linear in group}
                        if not executor.processes.rank:
                            self.folder.mkdir(parents=True, exist_ok=True)
                            kept = {k: getattr(statistics, k) for k in ("hessian", "total", "tokens")}
                            torch.save(kept, self.folder / f"{number}.pt")
                        number += 1
                    task.advance()
            if not executor.processes.rank:
                temp = table.with_suffix(".tmp")
                temp.write_text(json.dumps(rows))
                temp.replace(table)
            executor.processes.barrier()
        saved = json.loads(table.read_text())
        self.files = {name: number for name, (number, _) in saved.items()}
        self._energies = {name: energy for name, (_, energy) in saved.items()}

    def sums(self, number: int) -> dict[str, Any]:
        """``hessian`` Σ x xᵀ [I, I], ``total`` Σ x [I] and number of ``tokens`` in a file."""
        sums: dict[str, Any] = torch.load(self.folder / f"{number}.pt", map_location=self.device)
        return sums

    def hessian(self, name: str) -> torch.Tensor:
        """Mean of x xᵀ over tokens [I, I]."""
        sums = self.sums(self.files[name])
        result: torch.Tensor = sums["hessian"] / max(sums["tokens"], 1)
        return result

    def energy(self, name: str) -> float:
        """Mean of ||W x||² over tokens, with the tensor's own weights; positive."""
        return max(self._energies[name], 1e-30)


def _energy(linear: TargetLinear, statistics: InputStatistics) -> float:
    W = linear.weight.float()
    return float(((W @ statistics.hessian.float()) * W).sum()) / max(statistics.tokens, 1)
