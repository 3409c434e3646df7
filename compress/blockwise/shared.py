"""Tensors that several blocks share: solved for once, in the block that comes first, with the inputs of all of them.

The inputs of the other blocks are measured beforehand, in the model as it came. Once the tensor is solved for, those blocks
use the changed one.
"""

from __future__ import annotations

from compress.blockwise.block import Block
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear, find_linears
from compress.blockwise.results import RunnerResult
from compress.blockwise.saved_hessians import SavedHessians
from compress.errors import PassError
from compress.progress import Progress
from compress.workspace import Workspace


class SharedTensors:
    """The tensors that a run changes and later blocks use too.

    Attributes:
        by_block: number of a block ▶ its names of tensors of earlier blocks ▶ their own names.
        names: all names of shared tensors, changed or not.

    Raises:
        PassError: a wanted tensor is used by a block that comes before the one it is solved in, or outside the blocks.
    """

    def __init__(self, executor: BlockExecutor, wanted: set[str], workspace: Workspace) -> None:
        self._executor, self._wanted, self._workspace = executor, wanted, workspace
        self._hessians = SavedHessians(workspace.folder("hessians"), executor.device)
        self.by_block: dict[int, dict[str, str]] = {}
        self._files: dict[str, list[int]] = {}
        self.names: set[str] = set()
        for tensor in executor.checkpoint.spec.tensors.values():
            if tensor.alias_of is None:
                continue
            index, first = (executor.streamed.number_of(name) for name in (tensor.name, tensor.alias_of))
            if index == first:
                continue
            if index is None or first is None or first > index:
                self._require_unchanged(tensor.name, tensor.alias_of)
                continue
            self.names |= {tensor.name, tensor.alias_of}
            if tensor.alias_of in wanted:
                self.by_block.setdefault(index, {})[tensor.name] = tensor.alias_of

    def _require_unchanged(self, name: str, source: str) -> None:
        if not self._wanted.isdisjoint((name, source)):
            module = source.rpartition(".")[0]
            raise PassError(
                f"{name} is shared with {source}, which comes after it", fix=f"leave it out: skip: [{module}]"
            )

    def collect(self, progress: Progress) -> None:
        """Measure the inputs of later blocks that use changed tensors, unless that was done before."""
        if not self.by_block:
            return
        self._hessians.collect(
            self._executor,
            self.by_block,
            activations=self._workspace.path,
            progress=progress,
            title="reading what shared tensors multiply",
        )
        for names in self.by_block.values():
            for name, source in names.items():
                self._files[source] = sorted([*self._files.get(source, ()), self._hessians.files[name]])

    def split(self, groups: list[list[TargetLinear]]) -> list[list[TargetLinear]]:
        """Groups of which the linears are also used by the same later blocks."""
        result: list[list[TargetLinear]] = []
        for group in groups:
            parts: dict[tuple[int, ...], list[TargetLinear]] = {}
            for linear in group:
                parts.setdefault(tuple(self._files.get(linear.name, ())), []).append(linear)
            result += parts.values()
        return result

    def add(self, group: list[TargetLinear], statistics: InputStatistics) -> None:
        """Add the inputs of later blocks that use the group's tensors."""
        for number in self._files.get(group[0].name, ()):
            sums = self._hessians.sums(number)
            statistics.hessian += sums["hessian"]
            statistics.total += sums["total"]
            statistics.tokens += sums["tokens"]

    def renew(self, block: Block) -> None:
        """Copy into a block the tensors of earlier blocks that have been changed."""
        if not (names := self.by_block.get(block.index)):
            return
        checkpoint, depth = self._executor.checkpoint, self._executor.depth
        read = RunnerResult(self._workspace.folder("blocks").path, checkpoint, list(range(depth)), []).reader()
        for linear in find_linears(self._executor.streamed, block.index, block.module, names)[0]:
            value = read(names[linear.name]).data
            linear.weight.copy_((value.T if linear.transposed else value).to(linear.weight))

    def frozen(self, block: Block) -> set[int]:
        """Ids of the block's parameters that other blocks share, which reconstruction must not change."""
        if not self.names:
            return set()
        stored = self._executor.streamed.stored_names
        return {
            id(parameter)
            for key, parameter in block.module.named_parameters()
            if not self.names.isdisjoint(stored(block.index, {key: parameter.data}))
        }
