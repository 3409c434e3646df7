"""What a run over the blocks needs to go on after it was killed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress.distributed import ProcessGroup


@dataclass
class RunnerState:
    """The block to work on next, and the report's row of each finished one."""

    next: int = 0
    details: list[dict[str, Any]] = field(default_factory=list)


class StateFile:
    """The state on the disk, ``state.json`` of the work folder, the same for all processes."""

    def __init__(self, work: Path, processes: ProcessGroup) -> None:
        self._path, self._processes = work / "state.json", processes

    def load(self) -> RunnerState | None:
        """The state that an earlier run left, as the first process reads it; None where there is none."""
        try:
            state = json.loads(self._path.read_text())
        except (OSError, ValueError):
            state = None
        state = self._processes.broadcast_object(0, state)
        return None if state is None else RunnerState(**state)

    def save(self, state: RunnerState) -> None:
        """Replace the state once all processes have written their activations."""
        self._processes.barrier()
        if self._processes.rank:
            return
        temp = self._path.with_name(".state.json.tmp")
        temp.parent.mkdir(parents=True, exist_ok=True)
        temp.write_text(json.dumps(asdict(state)))
        temp.replace(self._path)
