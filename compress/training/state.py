"""State of a training on disk, as torch's distributed checkpoints (DCP), from which a killed run continues.

A state is a folder that appears complete or not at all. ``train.json`` beside it names the current one.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from compress.errors import ResourceError, from_os
from compress.files import disk_errors, sha256
from compress.workspace import Workspace


class UnusableState(Exception):
    """A state that cannot be loaded. The tensors that it was read into are undefined."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the training state {name} does not load")
        self.name = name


@dataclass
class RunState:
    """The states of a training, in a workspace that all processes see.

    Each state is a folder. The value ``train`` names the current and the best one, with their digests.
    """

    workspace: Workspace
    _digests: dict[str, str] = field(default_factory=dict)

    def find(self) -> dict[str, Any] | None:
        """The value ``train``; None if there is none, or if one of its states differs from what was written."""
        saved: dict[str, Any] | None = self.workspace.read_json("train")
        if saved is None or any(
            _digest(self.workspace.file(name)) != digest for name, digest in saved["states"].items()
        ):
            return None
        self._digests = dict(saved["states"])
        return saved

    def save(self, name: str, tensors: Mapping[str, Any], progress: Mapping[str, Any] | None = None) -> None:
        """Write tensors as the state ``name``; with ``progress`` it becomes the current one.

        Raises `CompressError` if the disk is full, or cannot be written.
        """
        path = self.workspace.file(name)
        with disk_errors(path), self.workspace.new_folder(name) as temp, _quiet(), _cause():
            save_state(dict(tensors), checkpoint_id=str(temp))
        if self.workspace.processes.rank == 0:
            digest = _digest(path)
            assert digest is not None
            self._digests[name] = digest
        if progress is not None:
            names = {name, f"best-{progress['history']['best_step']}"}
            states = {n: d for n, d in self._digests.items() if n in names}
            self.workspace.write_json("train", {**progress, "state": name, "states": states})

    def load(self, name: str, tensors: dict[str, Any]) -> None:
        """Read a state into existing tensors. Raises `UnusableState`."""
        path = self.workspace.file(name)
        try:
            with _quiet(), torch.no_grad(), _cause():
                load_state(tensors, storage_reader=_Reader(path))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and isinstance(cause := from_os(error, str(path)), ResourceError):
                raise cause from error
            raise UnusableState(name) from error

    def keep(self, names: Sequence[str]) -> None:
        """Remove all other states."""
        self.workspace.keep_folders(names)

    def drop(self) -> None:
        """Remove all states."""
        self.workspace.remove()


class _Reader(FileSystemReader):
    """Reads metadata with an unpickler that loads only the classes it needs; torch's own would run any code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Metadata(file).load()
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_DESCRIBE = frozenset(
    [
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ]
)


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Load classes that describe tensors and files, and no others."""
        described = module == "torch.distributed.checkpoint.metadata" or module.partition(".")[0] == "pathlib"
        if "." in name or (not described and (module, name) not in _DESCRIBE):
            dtype = getattr(torch, name, None) if module == "torch" else None
            if not isinstance(dtype, torch.dtype):
                raise pickle.UnpicklingError(f"{module}.{name} does not belong in a training state")
        return super().find_class(module, name)


@contextmanager
def _cause() -> Iterator[None]:
    """DCP wraps every failure, signals too, in an exception of its own; raise the cause instead."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((c for c in causes if not isinstance(c, Exception)), causes[0]) from error


def _digest(state: Path) -> str | None:
    """SHA-256 over names and contents of a state's files; None if the folder is missing or unreadable."""
    whole = hashlib.sha256()
    try:
        for path in sorted(state.iterdir()):
            whole.update(f"{path.name} {sha256(path)}\n".encode())
    except OSError:
        return None
    return whole.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence DCP's warnings about a single process."""
    log = logging.getLogger("torch.distributed.checkpoint")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def optimizer_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """State tensors by optimizer, parameter and key. States that do not exist yet are initialised."""
    tensors: dict[str, torch.Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p not in optimizer.state for p in parameters):
            _initialise(optimizer, parameters)
        for place, parameter in enumerate(parameters):
            for key, value in sorted(optimizer.state[parameter].items()):
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer{number}.{place}.{key}"] = value
    return tensors


def _initialise(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> None:
    """Take a step with rate 0, after which every parameter has its state, and zero that state."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    # the state of a training before its first step
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
