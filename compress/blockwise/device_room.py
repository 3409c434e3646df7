"""Room in a GPU's memory for hidden states, beside the work on a block. What finds none waits in files.

On a CPU there is none: its files are in memory already, as long as the system has some for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Share of the free memory that a run uses where `max_vram` says nothing.
_USED = 0.9


class DeviceRoom:
    """Counts the bytes of a device that hidden states take.

    The work on a block comes first: nothing is held until the first block has shown how much that takes.

    Args:
        limit: bytes that hidden states and the work on a block may take together.
        peak: the most bytes that were allocated on the device in this run.
    """

    def __init__(self, limit: int, peak: Callable[[], int]) -> None:
        self._limit, self._peak = limit, peak
        self._work: int | None = None
        self._held = self._most = 0

    @property
    def left(self) -> int:
        """Bytes that `take` gives."""
        return 0 if self._work is None else max(0, self._limit - self._work - self._held)

    def take(self, size: int) -> bool:
        """Whether there is room for ``size`` bytes; from then on they count."""
        if size > self.left:
            return False
        self._held += size
        self._most = max(self._most, self._held)
        return True

    def give(self, size: int) -> None:
        """Bytes that were taken are free again."""
        self._held -= size

    def learn(self) -> None:
        """A block was worked on: what that took beside hidden states stays free from now on."""
        if self._limit:
            self._work = max(self._work or 0, self._peak() - self._most)


def room_on(device: str, max_vram: int | None) -> DeviceRoom:
    """The room on a device, of which a run may use ``max_vram`` bytes; None for nearly all that is free."""
    if not device.startswith("cuda"):
        return DeviceRoom(0, int)
    torch.cuda.reset_peak_memory_stats(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limit = int(_USED * free) if max_vram is None else max_vram
    return DeviceRoom(limit, lambda: torch.cuda.max_memory_allocated(device))


class HeldStates:
    """Hidden states of samples in a device's memory, where there is room for all of them.

    Args:
        like: an empty tensor of the device and dtype. shape: of all of them, samples first.
    """

    def __init__(self, room: DeviceRoom, like: torch.Tensor, shape: tuple[int, ...]) -> None:
        self._room, self._size = room, torch.Size(shape).numel() * like.element_size()
        self._states = like.new_empty(shape) if room.take(self._size) else None
        self._written: set[int] = set()

    def write(self, rows: list[int], values: torch.Tensor) -> None:
        """Hold those samples' values."""
        if self._states is not None:
            self._states[rows] = values.detach().to(self._states)
            self._written.update(rows)

    def read(self, rows: list[int]) -> torch.Tensor | None:
        """A copy of those samples' values; None where one of them is not held."""
        if self._states is None or not self._written.issuperset(rows):
            return None
        return self._states[rows]

    def close(self) -> None:
        """Free the memory."""
        if self._states is not None:
            self._states = None
            self._room.give(self._size)
