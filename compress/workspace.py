"""Workspaces: the one way to cache results, to resume work and to write files atomically.

A workspace is a folder that outlives the process. A killed run that starts again reads there what it had finished:

- `cached` computes a JSON value once; a resumed run reads it.
- `write_json` and `read_json` keep the position of a loop; `finish` and `done` mark work without a result of its own.
- `save_tensors` writes tensors, `new_folder` a folder of files; `folder` gives a part of the work its own workspace.

A file appears whole under its name or not at all. JSON values lie in records with their digest; a damaged record counts as
absent. With several processes (torchrun) all of them call the same methods in the same order: the first process reads and
writes, and all get its values.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.distributed import ProcessGroup
from compress.files import aside, read_record, remove, remove_leftovers, replacing, write_record

if TYPE_CHECKING:
    import torch

#: Kind of the records, and the version of their shape.
KIND = "compress.work/1"


@dataclass(frozen=True)
class Workspace:
    """A folder of durable state.

    Attributes:
        path: the folder; it is made when something is written.
        processes: the processes that work here together.
        kind: kind of its records, as `files.write_record` names it.
    """

    path: Path
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    kind: str = KIND

    def folder(self, name: str) -> Workspace:
        """The workspace of a part of the work: the folder ``name`` in this one."""
        return replace(self, path=self.path / name)

    def alone(self) -> Workspace:
        """The same folder for one process that works by itself while the others wait."""
        return replace(self, processes=ProcessGroup())

    def file(self, name: str) -> Path:
        """Path of a file here, for readers and for files that are written in place."""
        return self.path / name

    # ---- JSON values ----

    def read_json(self, name: str) -> Any | None:
        """The JSON value ``name``, the same for all processes; None where it is absent or damaged."""
        record = self._record(name)
        return None if record is None else record["value"]

    def write_json(self, name: str, value: Any) -> None:
        """Keep the value of the first process, once all processes have arrived; returns when it is written."""
        self.processes.barrier()
        if self.processes.rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            write_record(self._json(name), self.kind, {"name": name, "value": value})
        self.processes.barrier()

    def cached(self, name: str, compute: Callable[[], Any], *, fresh: bool = False) -> Any:
        """The JSON value ``name``: as an earlier run left it, or else from ``compute``, and kept.

        Args:
            compute: gives JSON values. All processes call it together; the first one's value is kept and returned to all.
            fresh: compute it in any case.
        """
        record = None if fresh else self._record(name)
        if record is not None:
            return record["value"]
        value = compute()
        if self.processes.rank == 0:
            value = json.loads(json.dumps(value))  # as a resumed run reads it: tuples are lists, keys are text
        value = self.processes.broadcast_object(0, value)
        self.write_json(name, value)
        return value

    def _json(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any] | None:
        record = read_record(self._json(name), self.kind) if self.processes.rank == 0 else None
        if record is not None and (record.get("name") != name or "value" not in record):
            record = None
        shared: dict[str, Any] | None = self.processes.broadcast_object(0, record)
        return shared

    # ---- marks ----

    def done(self, name: str) -> bool:
        """Whether `finish` was called for ``name``, in this run or an earlier one."""
        return self.read_json(name) is True

    def finish(self, name: str) -> None:
        """Mark work as done, once all processes have done their part."""
        self.write_json(name, True)

    # ---- tensors ----

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the first process's tensors to ``<name>.safetensors``. It does not wait for other processes."""
        if self.processes.rank == 0:
            from safetensors.torch import save_file

            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(self.tensors(name)) as temp:
                save_file(dict(tensors), temp)

    def tensors(self, name: str) -> Path:
        """Path of the file that `save_tensors` writes."""
        return self.path / f"{name}.safetensors"

    # ---- folders ----

    @contextlib.contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """A folder to be made by all processes, under a temporary name; it becomes ``name`` when all have left the block."""
        path, first = self.path / name, self.processes.rank == 0
        if first:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
        temp = Path(self.processes.broadcast_object(0, str(aside(path))))
        try:
            yield temp
        except BaseException:
            if first:
                with contextlib.suppress(OSError):
                    remove(temp)
            raise
        self.processes.barrier()
        if first:
            remove(path)
            temp.rename(path)
        self.processes.barrier()

    def keep_folders(self, names: Collection[str]) -> None:
        """Remove all folders here but those named. It does not wait for other processes."""
        if self.processes.rank == 0:
            for path in sorted(self.path.iterdir()):
                if path.is_dir() and path.name not in names:
                    remove(path)

    def remove(self) -> None:
        """Remove the folder; returns when it is gone."""
        self.processes.barrier()
        if self.processes.rank == 0:
            remove(self.path)
        self.processes.barrier()
