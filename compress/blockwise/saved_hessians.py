"""Statistics of what matrices read in the model as it came, gathered in one sweep that changes nothing and kept in files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compress.blockwise.runner import BlockRunner


class SavedHessians:
    """Statistics by tensor, from files of a folder: one for each group of matrices that read the same.

    Attributes:
        device: where tensors are handed out. files: number of the file of each tensor.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.files: dict[str, int] = {}
        self._energies: dict[str, float] = {}

    def collect(
        self, runner: BlockRunner, names: Mapping[int, Collection[str]], title: str, *, check: bool = False
    ) -> None:
        """Sweep over the blocks as they are, unless that was done before.

        Args:
            names: tensors by block. check: that the sweep follows the model, which others have not seen to.
        """
        table = self.folder / "table.json"
        if not runner.processes.broadcast_object(0, table.exists()):
            if check:
                runner.check()
            found: dict[str, tuple[int, float]] = {}
            number, last = 0, max(names)
            with runner.progress.task(title, last + 1, "blocks") as task:
                for block in runner.unchanged(last, names):
                    for group, statistics, _ in block.statistics() if block.linears else ():
                        for linear in group:
                            W = linear.weight.float()
                            energy = float(((W @ statistics.hessian.float()) * W).sum()) / max(statistics.tokens, 1)
                            found[linear.name] = (number, energy)
                        if not runner.processes.rank:
                            self.folder.mkdir(parents=True, exist_ok=True)
                            kept = {k: getattr(statistics, k) for k in ("hessian", "total", "tokens")}
                            torch.save(kept, self.folder / f"{number}.pt")
                        number += 1
                    task.advance()
            if not runner.processes.rank:
                temp = table.with_suffix(".tmp")
                temp.write_text(json.dumps(found))
                temp.replace(table)
            runner.processes.barrier()
        rows = json.loads(table.read_text())
        self.files = {name: number for name, (number, _) in rows.items()}
        self._energies = {name: energy for name, (_, energy) in rows.items()}

    def sums(self, number: int) -> dict[str, Any]:
        """``hessian`` Σ x xᵀ [I, I], ``total`` Σ x [I] and number of ``tokens`` in a file."""
        found: dict[str, Any] = torch.load(self.folder / f"{number}.pt", map_location=self.device)
        return found

    def hessian(self, name: str) -> torch.Tensor:
        """Mean of x xᵀ over tokens [I, I]."""
        sums = self.sums(self.files[name])
        result: torch.Tensor = sums["hessian"] / max(sums["tokens"], 1)
        return result

    def energy(self, name: str) -> float:
        """Mean of ||W x||² over tokens, with the tensor's own weights; positive."""
        return max(self._energies[name], 1e-30)
