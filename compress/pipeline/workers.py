"""The processes of a run (torchrun), and the context that each gives a pass.

The first process runs the pipeline: it locks, hashes, writes, evaluates and prints. Before a pass that shares its work it sends
the others a `Job`. They open the same checkpoint, which must lie where all can read it, and apply the pass with the first one.
torchrun ends all processes when one of them fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.open import open_checkpoint
from compress.distributed import ProcessGroup
from compress.errors import CompressError
from compress.passes.base import Context
from compress.progress import SilentProgress
from compress.workspace import Workspace

if TYPE_CHECKING:
    from compress.checkpoint.open import Stored
    from compress.checkpoint.values import Checkpoint
    from compress.progress import Progress


def launched() -> tuple[int, int]:
    """(rank, number of processes) as torchrun sets them; (0, 1) without it. Raises `CompressError` for what is not a number."""
    return _number("RANK", 0), max(1, _number("WORLD_SIZE", 1))


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise CompressError(
            f"the environment variable {variable} is {text!r}, which is not a number", fix="unset it; torchrun sets it"
        )
    return int(text) if text else default


@dataclass(frozen=True)
class Job:
    """A pass to apply, as every process needs to know it.

    Attributes:
        name, settings: of the pass. folder: its input, None before there is one. original: the checkpoint of the recipe.
        device: as the recipe names it; each process takes its own. dtype, seed, max_ram, max_vram, offline: of the recipe.
        work: folder of the workspace. data: samples by data set, for processes that do not draw them.
    """

    name: str
    settings: Any
    folder: Path | None
    original: Path
    trust_remote_code: bool
    ignore_auto_map: bool
    device: str
    dtype: str
    seed: int
    max_ram: int | None
    max_vram: int | None
    offline: bool
    work: Path
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether all processes apply the pass together; a pass that works tensor by tensor runs in the first one."""
        from compress import passes

        return bool(passes.get(self.name).mode_for(self.settings) != "stream")

    def context(
        self, original: Checkpoint, data: Callable[[str], Any], progress: Progress, processes: ProcessGroup
    ) -> Context:
        """The pass's context in this process. Every context of a run is made here."""
        return Context(
            original=original,
            device=own_device(self.device),
            dtype=self.dtype,
            seed=self.seed,
            max_ram=self.max_ram,
            max_vram=self.max_vram,
            data=data,
            progress=progress,
            workspace=Workspace(self.work, processes if self.shared else ProcessGroup()),
            offline=self.offline,
        )

    def open(self, folder: Path) -> Stored:
        """A checkpoint of the job."""
        return open_checkpoint(folder, trust_remote_code=self.trust_remote_code, ignore_auto_map=self.ignore_auto_map)


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """The group of the processes that torchrun started. Waiting has no limit: the first one may evaluate for hours."""
    rank, world = launched()
    if world == 1:
        yield ProcessGroup()
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise CompressError(
            f"the environment variable WORLD_SIZE is {world}, but {missing[0]} is not set",
            fix="unset it, or start compress with torchrun",
        )
    _number("MASTER_PORT", 0)
    if rank >= world:
        raise CompressError(
            f"the environment variable RANK is {rank}, of {world} processes", fix="start compress with torchrun"
        )
    import torch.distributed as dist

    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    if device != "cpu":
        import torch

        torch.cuda.set_device(_number("LOCAL_RANK", 0))
    dist.init_process_group(backend, timeout=timedelta(days=30))
    try:
        yield ProcessGroup(rank, world)
    except SystemExit:
        _leave()
        raise
    _leave()


def _leave() -> None:
    import torch.distributed as dist

    dist.barrier()  # without it processes that are done early abort the others
    dist.destroy_process_group()


def own_device(device: str) -> str:
    """The device of this process: under torchrun each has a GPU of its own."""
    return f"cuda:{_number('LOCAL_RANK', 0)}" if device == "cuda" and launched()[1] > 1 else device


def worker_loop(processes: ProcessGroup) -> None:
    """Apply the passes that the first process hands out, until it sends None. For all processes but the first."""
    from compress import passes

    for name in ("transformers.modeling_utils", "compress.blockwise.runner"):
        import_module(name)  # takes seconds, while the first process plans

    while (job := processes.broadcast_object(0, None)) is not None:
        context = job.context(job.open(job.original), job.data.__getitem__, SilentProgress(), processes)
        passes.get(job.name).apply(job.open(job.folder), job.settings, context)


def dispatch(processes: ProcessGroup, job: Job, data: Callable[[str], Any]) -> None:
    """Tell the other processes to take part in a pass, where it shares its work.

    Args:
        data: gives a data set by name; those that the pass reads are sent along.
    """
    if processes.world == 1 or not job.shared:
        return
    from compress import passes

    assert job.folder is not None
    sent = replace(
        job,
        folder=job.folder.resolve(),
        original=job.original.resolve(),
        work=job.work.resolve(),
        device=job.device.partition(":")[0],
        data={name: data(name) for name in passes.get(job.name).required_data(job.settings)},
    )
    processes.broadcast_object(0, sent)
