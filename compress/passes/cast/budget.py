"""Formats within a budget: exact costs from headers, and losses that are measured or assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from compress.checkpoint.layout import lay_out
from compress.checkpoint.storage import format_chain, parts
from compress.checkpoint.store import Store, smallest, with_storage
from compress.errors import PassError
from compress.solvers.knapsack import choose
from compress.spec.formats import QuantFormat
from compress.spec.spec import Spec

#: Error of trellis codes beside that of integers of as many bits in groups of 64.
_TRELLIS = 0.65


def assumed(quant_format: QuantFormat) -> float:
    """Loss per weight that plans assume before anything is measured: each bit divides the rounding error by four.

    Each doubling of the group size adds 8 % (int2) to 16 % (int4), measured on a small trained Llama.
    """
    error: float = 4.0**-quant_format.bits
    return error * (_TRELLIS if quant_format.is_trellis else ((quant_format.group or 1024) / 64) ** 0.16)


@dataclass(frozen=True)
class Choices:
    """The options of a budget.

    Attributes:
        groups: tensors; those of one group get the same option.
        options: formats, some with a group size.
        quant_format: format of a tensor (first argument) with an option.
        planned: the checkpoint with formats for the tensors of the groups; other tensors have those that the settings name.
        store: where the result is written.
    """

    spec: Spec
    groups: Sequence[Sequence[str]]
    options: Sequence[str]
    quant_format: Callable[[str, str], QuantFormat]
    planned: Callable[[Mapping[str, QuantFormat]], Spec]
    store: Store = "stock"

    def allocate(
        self, losses: Mapping[str, Mapping[str, float]], bits: float | None, max_bytes: int | None = None
    ) -> dict[str, str]:
        """The option of every tensor that minimises the total loss within one of two budgets.

        Args:
            losses: by tensor and option.
            bits: average bits per cast weight, scales included.
            max_bytes: bytes of the whole checkpoint.

        Raises:
            PassError: even the smallest formats exceed the budget; it names the least possible budget.
        """
        names = [name for group in self.groups for name in group]
        masked = max_bytes is not None and self.store == "compact"
        costs = [[sum(self._bytes(n, f, masked) for n in group) for f in self.options] for group in self.groups]
        values = [[sum(losses[n][f] for n in group) for f in self.options] for group in self.groups]
        least = sum(min(row) for row in costs)
        count = sum(self.spec.tensors[n].count for n in names)
        if bits is not None:
            room, beside = int(bits * count / 8), 0
        else:
            assert max_bytes is not None
            beside = self._whole({n: self.quant_format(n, self.options[0]) for n in names}) - sum(
                row[0] for row in costs
            )
            room = max_bytes - beside
        while True:
            chosen = choose(costs, values, room)
            if chosen is None:
                smallest = f"bits: {8 * least / count:.2f}" if bits is not None else f"max_bytes: {beside + least:_}"
                raise PassError(
                    f"even the smallest formats need more: {smallest} is the least possible",
                    key="bits" if bits is not None else "max_bytes",
                )
            result = {n: self.options[i] for group, i in zip(self.groups, chosen, strict=True) for n in group}
            if max_bytes is None or (over := self._whole(self.quant_formats(result)) - max_bytes) <= 0:
                return result
            room -= over  # some formats have longer headers

    def quant_formats(self, chosen: Mapping[str, str]) -> dict[str, QuantFormat]:
        """Formats of the chosen options, by tensor."""
        return {name: self.quant_format(name, option) for name, option in chosen.items()}

    def curve(self, losses: Mapping[str, Mapping[str, float]]) -> list[tuple[float, float]]:
        """Pairs of bits per weight, in steps of a half, and the least total loss."""
        points = []
        for half in range(4, 17):
            try:
                chosen = self.allocate(losses, half / 2)
            except PassError:  # below the smallest formats
                continue
            points.append((half / 2, sum(losses[n][o] for n, o in chosen.items())))
        return points

    def _bytes(self, name: str, option: str, masked: bool) -> int:
        """Stored bytes of a tensor with an option. ``masked``: of the weights that its mask keeps, if that is less."""
        quant_format = self.quant_format(name, option)
        tensor = replace(self.spec.tensors[name], quant_format=quant_format, storage=format_chain(quant_format))
        if masked and tensor.kept is not None:
            tensor = smallest(tensor, "compact")
        return sum(part.bytes for part in parts(tensor if masked else replace(tensor, kept=None)))

    def _whole(self, quant_formats: Mapping[str, QuantFormat]) -> int:
        """Bytes of all weight files of the checkpoint with these formats."""
        return lay_out(with_storage(self.planned(quant_formats), self.store), 1 << 62).bytes
