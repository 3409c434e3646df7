"""Memory of this process and of the machine, in bytes."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Peak resident memory since the last `reset_peak`, or since the process started where the peak cannot be reset."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Reset the peak (Linux: proc(5), clear_refs). Returns whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_memory() -> int:
    """Resident memory of this process now; the peak where the system tells no more."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_memory()


def give_back_freed() -> None:
    """Return freed memory to the system, where the allocator has a call for it (glibc, malloc_trim(3))."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def available_memory() -> int:
    """Memory available without swapping, within the limits of the container (cgroup v2)."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass
    return available


def keep_freed(size: int) -> None:
    """Let the allocator keep up to ``size`` freed bytes, where it has such a setting (glibc, mallopt(3)).

    By default it returns memory to the system early. A loop over tensors of a few MiB then spends a sixth of its time on
    zeroing fresh pages.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the largest it takes; larger tensors are always given back
            mallopt(-1, size)  # M_TRIM_THRESHOLD


def compares_logits(parameters: int, max_ram: int | None) -> bool:
    """Whether there is memory to compare the logits of a written model with so many parameters.

    Args:
        max_ram: memory for two models in float32; None for half of what is available.
    """
    room = available_memory() // 2 if max_ram is None else max_ram - resident_memory()
    return 2 * 4 * parameters < room
