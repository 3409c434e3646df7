"""The machine of a run: its device, number formats, and facts for the report."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

from compress.errors import CompressError

#: Number formats of computation.
DTYPES = ("float32", "bfloat16", "float16")


def resolve_device(device: str) -> str:
    """The device as torch names it; ``auto`` is the first GPU where there is one. Raises `CompressError` for an absent one."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device) is None:
        raise CompressError(f"there is no device {device!r}", where="device", fix="use auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    number = device.partition(":")[2] or "0"
    if not number.isdigit() or int(number) >= count:
        here = (
            f"there are cpu and cuda:0 to cuda:{count - 1}"
            if count
            else "there is only the cpu: this torch has no CUDA"
        )
        raise CompressError(f"the device {device} is not here", where="device", fix=here)
    return device


def check_dtype(dtype: str) -> None:
    """Check that models can be computed in a number format. Raises `CompressError`."""
    if dtype not in DTYPES:
        raise CompressError(f"unknown dtype {dtype!r}", where="dtype", fix=f"use {', '.join(DTYPES)}")


def machine(device: str) -> dict[str, Any]:
    """The machine that figures were measured on: system, cpu, number of usable cores, device."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": f"{platform.system()} {platform.machine()}", "cpu": cpu, "cores": cores, "device": device}
