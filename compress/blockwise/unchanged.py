"""The blocks of a model as they are, one after another, each on its own inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from compress.blockwise.block import Block
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.linears import find_linears


def unchanged_blocks(
    executor: BlockExecutor, work: Path, last: int, wanted: Mapping[int, Collection[str]]
) -> Iterator[Block]:
    """Yield each block up to ``last`` with its inputs and target linears; the next blocks read the unchanged outputs.

    Args:
        work: folder of the hidden states. wanted: names of tensors by block.
    """
    stream = executor.open_stream(work, "unchanged")
    executor.processes.barrier()
    for index in range(last + 1):
        if executor.is_first(index):
            executor.enter(index, stream)
            executor.processes.barrier()
        with executor.streamed.block(index) as module:
            linears, swaps = find_linears(executor.streamed, index, module, wanted.get(index, ()))
            block = Block(executor, index, module, linears, swaps, stream.before(index))
            if linears:
                block.find_groups()
            yield block
            executor.write_outputs(index, module, block.inputs, stream.after(index))
        executor.processes.barrier()
    stream.close()
