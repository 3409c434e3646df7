"""A run in several processes (torchrun): the first one runs the pipeline, the others help with the passes that can share work.

The first process alone locks, hashes, writes, evaluates and prints. Before a pass that shares its work it tells the others what
to do; they open the same checkpoint, which must lie where all can read it, and take part. An error in any process ends all
(torchrun sees to it).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.distributed import ProcessGroup
    from compress.passes.base import Context


def launched() -> tuple[int, int]:
    """(rank, number of processes) as torchrun says; (0, 1) without it. Raises `CompressError` for what is no number."""
    return _number("RANK", 0), max(1, _number("WORLD_SIZE", 1))


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if text and not text.isdecimal():
        raise CompressError(
            f"the environment variable {variable} is {text!r}, which is no number", fix="unset it; torchrun sets it"
        )
    return int(text) if text else default


@dataclass(frozen=True)
class Job:
    """What the other processes need to take part in a pass."""

    name: str
    settings: Any
    folder: Path
    original: Path
    trust_remote_code: bool
    ignore_auto_map: bool
    data: dict[str, Any]
    dtype: str
    device: str
    seed: int
    work: Path
    offline: bool


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """This process among those that torchrun started. Waiting has no limit: the first one may evaluate for hours."""
    from compress.distributed import ProcessGroup

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
    """The device of this process: with several GPUs one for each."""
    return f"cuda:{_number('LOCAL_RANK', 0)}" if device == "cuda" and launched()[1] > 1 else device


def worker_loop(processes: ProcessGroup) -> None:
    """What processes other than the first do: jobs, until there are no more."""
    from compress import passes
    from compress.checkpoint.open import open_checkpoint
    from compress.passes.base import Context
    from compress.progress import SilentProgress
    from compress.workspace import Workspace

    while (job := processes.broadcast_object(0, None)) is not None:
        checkpoint = open_checkpoint(
            job.folder, trust_remote_code=job.trust_remote_code, ignore_auto_map=job.ignore_auto_map
        )
        context = Context(
            original=open_checkpoint(
                job.original, trust_remote_code=job.trust_remote_code, ignore_auto_map=job.ignore_auto_map
            ),
            device=own_device(job.device),
            dtype=job.dtype,
            seed=job.seed,
            max_ram=None,
            data=lambda name, job=job: job.data[name],  # type: ignore[misc]
            progress=SilentProgress(),
            workspace=Workspace(job.work, processes),
            offline=job.offline,
        )
        passes.get(job.name).apply(checkpoint, job.settings, context)


def dispatch(processes: ProcessGroup, name: str, settings: Any, folder: Path | None, context: Context) -> None:
    """Tell the other processes to take part in a pass of this context."""
    if processes.world == 1:
        return
    from compress import passes

    assert folder is not None
    assert context.original.folder is not None
    data = {key: context.data(key) for key in passes.get(name).required_data(settings)}
    job = Job(
        name,
        settings,
        folder.resolve(),
        context.original.folder.resolve(),
        context.original.trust_remote_code,
        context.original.ignore_auto_map,
        data,
        context.dtype,
        context.device.partition(":")[0],  # each process takes its own
        context.seed,
        context.workspace.path.resolve(),
        context.offline,
    )
    processes.broadcast_object(0, job)
