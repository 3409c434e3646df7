"""The change that each wanted matrix alone would undergo, on the inputs of the model as it is, to share out amounts by loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from compress.blockwise.block import Block
from compress.blockwise.details import BlockDetails
from compress.blockwise.results import TensorExtras
from compress.blockwise.runner import BlockRunner

#: A block ▶ names of its tensors, each with ΔW [O, I] by trial. The first process saves what its function yields.
ProbeFn = Callable[[Block], Iterator[tuple[str, Mapping[str, torch.Tensor]]]]


def probe_matrices(
    runner: BlockRunner, title: str, measure: ProbeFn
) -> tuple[Callable[[str], dict[str, torch.Tensor]], list[BlockDetails]]:
    """Run over the blocks without changing them, in a folder of the runner's own, and save the changes of each block.

    Returns:
        A function from a tensor's name to ΔW [O, I] in bfloat16 by trial, for the first process; and the details of the blocks.
    """
    from safetensors import safe_open

    def file_of(index: int) -> str:
        return f"trial{index:05}"

    def save(block: Block) -> dict[str, TensorExtras]:
        changes = {
            f"{name}:{trial}": change.to("cpu", torch.bfloat16).contiguous()
            for name, trials in measure(block)
            for trial, change in trials.items()
        }
        runner.workspace.save_tensors(file_of(block.index), changes)
        return {}

    details = runner.run(save, title).details

    table: dict[str, tuple[Path, list[str]]] = {}  # a matrix ▶ its file, and its trials

    def read(name: str) -> dict[str, torch.Tensor]:
        for index in range(0 if table else runner.executor.depth):
            path = runner.workspace.tensors(file_of(index))
            with safe_open(path, framework="pt") if path.exists() else nullcontext() as file:
                for key in () if file is None else file.keys():
                    matrix, _, trial = key.rpartition(":")
                    table.setdefault(matrix, (path, []))[1].append(trial)
        path, trials = table[name]
        with safe_open(path, framework="pt") as file:
            # numbers in their order
            return {trial: file.get_tensor(f"{name}:{trial}") for trial in sorted(trials, key=lambda t: (len(t), t))}

    return read, details
