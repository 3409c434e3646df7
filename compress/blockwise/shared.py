"""Tensors that several blocks share, in a sweep: solved once, in the block that comes first, with the inputs of all.

What the other blocks read is measured beforehand, in the model as it came; from the solution on, they have the changed
tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.blockwise.linears import InputStatistics, TargetLinear, find_linears
from compress.blockwise.saved_hessians import SavedHessians
from compress.errors import PassError

if TYPE_CHECKING:
    from compress.blockwise.runner import Block, BlockRunner


class SharedTensors:
    """The further users of the tensors that a sweep changes.

    Attributes:
        by_block: number of a block ▶ its names of tensors of other blocks ▶ their own names.
    """

    def __init__(self, runner: BlockRunner) -> None:
        self.runner, self._gathered = runner, SavedHessians(runner.work / "users", runner.device)
        self.by_block: dict[int, dict[str, str]] = {}
        self._files: dict[str, list[int]] = {}
        self.names: set[str] = set()
        for tensor in runner.checkpoint.spec.tensors.values():
            if tensor.alias_of is None:
                continue
            index, first = (runner.streamed.record.block_index(name) for name in (tensor.name, tensor.alias_of))
            if index == first:
                continue
            if index is None or first is None or first > index:
                self._refuse(tensor.name, tensor.alias_of)
                continue
            self.names |= {tensor.name, tensor.alias_of}
            if tensor.alias_of in runner.wanted:
                self.by_block.setdefault(index, {})[tensor.name] = tensor.alias_of

    def _refuse(self, name: str, source: str) -> None:
        """Raises `PassError` where the sweep would change a tensor that runs before it is solved, or outside the blocks."""
        wanted = self.runner.wanted
        if not wanted.isdisjoint((name, source)):
            module = source.rpartition(".")[0]
            raise PassError(
                f"{name} is shared with {source}, which comes after it", fix=f"leave it out: skip: [{module}]"
            )

    def collect(self) -> None:
        """Statistics of what the other users read; nothing where that was done before."""
        if not self.by_block:
            return
        self._gathered.collect(self.runner, self.by_block, "reading what shared tensors multiply")
        for names in self.by_block.values():
            for name, source in names.items():
                self._files[source] = sorted([*self._files.get(source, ()), self._gathered.files[name]])

    def split(self, groups: list[list[TargetLinear]]) -> list[list[TargetLinear]]:
        """Groups whose sites have the same further users, too."""
        result: list[list[TargetLinear]] = []
        for group in groups:
            parts: dict[tuple[int, ...], list[TargetLinear]] = {}
            for linear in group:
                parts.setdefault(tuple(self._files.get(linear.name, ())), []).append(linear)
            result += parts.values()
        return result

    def add(self, group: list[TargetLinear], statistics: InputStatistics) -> None:
        """Add what the other users of the group's tensors read."""
        for number in self._files.get(group[0].name, ()):
            found = self._gathered.sums(number)
            statistics.hessian += found["hessian"]
            statistics.total += found["total"]
            statistics.tokens += found["tokens"]

    def renew(self, block: Block) -> None:
        """Give a block the tensors of earlier ones as these have become."""
        if not (names := self.by_block.get(block.index)):
            return
        read = self.runner.changed().reader()
        for linear in find_linears(self.runner.streamed, block.index, block.module, names)[0]:
            value = read(names[linear.name]).data
            linear.weight.copy_((value.T if linear.transposed else value).to(linear.weight))

    def frozen(self, block: Block) -> set[int]:
        """Ids of the block's parameters that others share, which tuning must leave alone."""
        found: set[int] = set()
        if not self.names:
            return found
        for key, parameter in block.module.named_parameters():
            if not self.names.isdisjoint(self.runner.streamed.stored_names(block.index, {key: parameter.data})):
                found.add(id(parameter))
        return found


def file_of(folder: Path, index: int) -> Path:
    """The file that a sweep leaves of a block."""
    return folder / f"{index:05}.safetensors"
