"""Solve the tensors of blocks that share: Hessians ▶ aligned units ▶ one matrix for all ▶ low-rank residuals.

Sharing changes no activation until it is applied, so one calibration run collects all Hessians.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compress.architectures.groups import PrunableGroup
from compress.architectures.model_map import model_map
from compress.architectures.resize import head_units, mlp_units
from compress.blockwise.saved_hessians import SavedHessians
from compress.checkpoint.values import Checkpoint
from compress.solvers.low_rank import low_rank
from compress.solvers.shared_matrix import matching, pair_cost, partition, shared_matrix
from compress.workspace import Workspace

#: Rounds of solving the shared matrix and the residuals in turn.
ROUNDS = 3


@dataclass(frozen=True)
class ShareOptions:
    """How blocks share.

    Attributes:
        parts: tensors of a block to share, without the block's path; other float tensors stay each block's own.
        init: start of the shared matrices.
        align: first put units into the order of the group's first block.
        rank: rank of each block's residual; 0 for none.
        fisher: function from a tensor's name to its Fisher information, for ``init: fisher``.
    """

    parts: Sequence[str]
    init: str
    align: bool
    rank: int
    fisher: Callable[[str], torch.Tensor] | None = None


class _InFiles(Sequence[torch.Tensor]):
    """Tensors that are read each time that they are asked for."""

    def __init__(self, count: int, read: Callable[[int], torch.Tensor]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if index >= self._count:
            raise IndexError
        return self._read(index)


class Solver:
    """Solves the tensors of groups of blocks."""

    def __init__(self, checkpoint: Checkpoint, read: SavedHessians, options: ShareOptions) -> None:
        self.checkpoint, self.read, self.options = checkpoint, read, options
        spec = checkpoint.spec
        self.map = model_map(spec)
        attention = self.map.record.attention
        self.transposed = self.map.record.input_axis == 0
        self.paths = self.map.paths
        mlps = mlp_units(spec)
        movable = attention is not None and not attention.ordered
        heads = head_units(spec, whole_groups=True) if movable else {}
        self.units = {i: [*mlps.get(i, ()), *heads.get(i, ())] for i in self.paths}
        self._orders: dict[tuple[int, int], list[list[int]]] = {}

    # ---- alignment ----

    def orders(self, first: int, other: int) -> list[list[int]]:
        """Order of each kind of unit that makes the units of ``other`` most similar to those of ``first``."""
        if first == other or not self.options.align:
            return [list(range(units.count)) for units in self.units[other]]
        if (first, other) not in self._orders:
            pairs = zip(self.units[first], self.units[other], strict=True)
            self._orders[first, other] = [matching(self._likeness(a, b)) for a, b in pairs]
        return self._orders[first, other]

    def _likeness(self, first: PrunableGroup, other: PrunableGroup) -> torch.Tensor:
        """Similarity of units [U, U]: Σ over tensors of the products of their entries, each tensor scaled to norm 1."""
        total = torch.zeros(first.count, first.count, dtype=torch.float64, device=self.read.device)
        for a, b in zip(first.members, other.members, strict=True):
            rows = []
            for units, member in ((first, a), (other, b)):
                W = self._matrix(f"{member.module}.weight").double()
                W = W if member.side == "out" else W.T
                entries = torch.tensor([member.entries(units.count, [u]) for u in range(units.count)], device=W.device)
                part = W[entries].flatten(1)
                rows.append(part / part.norm().clamp_min(1e-30))
            total.addmm_(rows[0], rows[1].T)
        return total

    def _order_of(self, name: str, side: str, block: int, orders: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Indices of a tensor's outputs or inputs in the new order; None if they stay."""
        module = name.rpartition(".")[0]
        entries: torch.Tensor | None = None
        for units, order in zip(self.units[block], orders, strict=True):
            for member in (*units.members, *units.alongside):
                if member.module in (module, name) and member.side == side and list(order) != list(range(units.count)):
                    if entries is None:
                        shape = self.checkpoint.spec.tensors[name].shape
                        axis = 0 if len(shape) == 1 else (1 if side == "in" else 0) ^ self.transposed
                        entries = torch.arange(shape[axis])
                    span = member.span(units.count)
                    entries[span.start : span.stop] = torch.tensor(member.entries(units.count, order))
        return entries

    def _matrix(self, name: str) -> torch.Tensor:
        """A weight [O, I], float32."""
        data = self.checkpoint.tensor(name).data.to(self.read.device, torch.float32)
        return data.T if self.transposed else data

    def aligned(self, name: str, block: int, first: int) -> torch.Tensor:
        """A tensor of ``block`` with its units in the order of ``first``: a weight [O, I], or a vector [O]; float32."""
        return self._ordered(name, self.checkpoint.tensor(name).data, block, first)

    def _ordered(self, name: str, data: torch.Tensor, block: int, first: int) -> torch.Tensor:
        """Values, shaped as in the checkpoint, with units in the order of ``first``."""
        orders = self.orders(first, block)
        data = data.to(self.read.device, torch.float32)
        if data.ndim == 2 and self.transposed:
            data = data.T
        if (rows := self._order_of(name, "out", block, orders)) is not None:
            data = data[rows.to(data.device)]
        if data.ndim == 2 and (columns := self._order_of(name, "in", block, orders)) is not None:
            data = data[:, columns.to(data.device)]
        return data

    def _hessian(self, name: str, block: int, first: int) -> torch.Tensor:
        hessian = self.read.hessian(name)
        if (columns := self._order_of(name, "in", block, self.orders(first, block))) is not None:
            hessian = hessian[columns.to(hessian.device)][:, columns.to(hessian.device)]
        return hessian

    # ---- groups ----

    def costs(self, unlike: Callable[[int, int], Any]) -> list[list[float]]:
        """Relative output error of any two blocks if they share; infinite for blocks that cannot."""
        count = len(self.paths)
        result = [[0.0] * count for _ in range(count)]
        matrices = [p for p in self.options.parts if f"{self.paths[0]}{p}" in self.read.files]
        for i in range(count):
            for j in range(i):
                total = 0.0 if unlike(i, j) is None else math.inf
                for part in matrices if total == 0 else ():
                    names = [f"{self.paths[b]}{part}" for b in (i, j)]
                    weights = [self.aligned(names[0], i, i), self.aligned(names[1], j, i)]
                    inputs = [self._hessian(names[0], i, i).diagonal(), self._hessian(names[1], j, i).diagonal()]
                    scale = [1 / self.read.energy(n) for n in names]
                    total += pair_cost(weights[0], weights[1], inputs[0] * scale[0], inputs[1] * scale[1])
                result[i][j] = result[j][i] = total
        return result

    def nearest(self, starts: Sequence[Sequence[Sequence[int]]], unlike: Callable[[int, int], Any]) -> list[list[int]]:
        """Groups of equal size with the least total of `costs`.

        Args:
            starts: groupings to begin from.
            unlike: returns None for two blocks that can share.
        """
        numbers = []
        for groups in starts:
            of = [0] * len(self.paths)
            for number, blocks in enumerate(groups):
                for block in blocks:
                    of[block] = number
            numbers.append(of)
        chosen = partition(self.costs(unlike), numbers)
        by_number: dict[int, list[int]] = {}
        for block, number in enumerate(chosen):
            by_number.setdefault(number, []).append(block)
        return sorted(by_number.values())

    # ---- shared tensors ----

    def solve(self, groups: Sequence[Sequence[int]], workspace: Workspace) -> list[dict[str, Any]]:
        """Solve all tensors that change, and save each in the workspace; saved ones stay. Returns a row for each matrix.

        Values are shaped as in the checkpoint. Shared ones have the name of their group's first block. Residuals end in
        ``.residual_up.weight`` [O, r] and ``.residual_down.weight`` [r, I].
        """
        rows: list[dict[str, Any]] = []

        def solve_part(part: str, blocks: Sequence[int]) -> list[dict[str, Any]]:
            values, part_rows = self._share(part, list(blocks))
            for name, value in values.items():
                workspace.save_tensors(name, {"values": value})
            return part_rows

        for blocks in groups:
            for part in self.options.parts:
                name = f"{self.paths[blocks[0]]}{part}.rows"
                rows += workspace.cached(name, partial(solve_part, part, blocks))
        return rows

    def read_solved(self, groups: Sequence[Sequence[int]], workspace: Workspace) -> Callable[[str], torch.Tensor]:
        """Function from a tensor's name to its values after `solve`; other tensors of a block are aligned."""
        firsts = {block: blocks[0] for blocks in groups for block in blocks}

        def read(name: str) -> torch.Tensor:
            if (path := workspace.tensors(name)).exists():
                from safetensors.torch import load_file

                return load_file(path)["values"]
            block = self.map.block_of(name)
            if block in firsts and firsts[block] != block and self.checkpoint.spec.tensors[name].is_float:
                return self._shaped(self.aligned(name, block, firsts[block]))
            return self.checkpoint.tensor(name).data

        return read

    def _shaped(self, data: torch.Tensor) -> torch.Tensor:
        return (data.T if data.ndim == 2 and self.transposed else data).contiguous().cpu()

    def _share(self, part: str, blocks: list[int]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """New values by name, and a row for each matrix."""
        first = blocks[0]
        names = [f"{self.paths[b]}{part}" for b in blocks]
        weights = _InFiles(len(names), lambda b: self.aligned(names[b], blocks[b], first))
        if names[0] not in self.read.files:  # biases and norms
            return {names[0]: self._shaped(torch.stack([*weights]).mean(0))}, []
        energies = [self.read.energy(name) for name in names]
        scaled = _InFiles(len(names), lambda b: self._hessian(names[b], blocks[b], first).div_(energies[b]))
        factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        shared = weights[0]

        def without_residual(b: int) -> torch.Tensor:
            left: torch.Tensor = weights[b]
            if factors:
                left = left - factors[b][0] @ factors[b][1]
            return left

        for _ in range(ROUNDS if self.options.rank else 1):
            shared = self._start(_InFiles(len(names), without_residual), scaled, names, blocks)
            if self.options.rank:
                factors = [low_rank(weights[b] - shared, scaled[b], self.options.rank)[:2] for b in range(len(names))]
        values, rows = {names[0]: self._shaped(shared)}, []
        for number, name in enumerate(names):
            if self.options.rank:
                module = name.removesuffix(".weight")
                for suffix, factor in zip(("up", "down"), factors[number], strict=True):
                    values[f"{module}.residual_{suffix}.weight"] = factor.contiguous().cpu()
            left = without_residual(number) - shared
            lost = float(((left @ scaled[number].float()) * left).sum())
            rows.append({"tensor": name, "shared_with": names[0], "error": lost})
        return values, rows

    def _start(
        self, weights: Sequence[torch.Tensor], hessians: Sequence[torch.Tensor], names: list[str], blocks: list[int]
    ) -> torch.Tensor:
        if self.options.init == "first":
            return weights[0]
        if self.options.init == "mean":
            return torch.stack([*weights]).mean(0)
        if self.options.init == "fisher":
            assert self.options.fisher is not None
            information = [self.options.fisher(name) for name in names]
            importance = [self._ordered(n, F, b, blocks[0]) for n, F, b in zip(names, information, blocks, strict=True)]
            total = sum(importance, torch.zeros(())).clamp_min(1e-30)
            return sum((F * W for F, W in zip(importance, weights, strict=True)), torch.zeros(())) / total
        return shared_matrix(weights, hessians)[0]
