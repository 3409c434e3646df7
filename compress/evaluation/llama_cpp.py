"""llama.cpp through its C library: logits, token ids and speed of GGUF files. Needs numpy alone.

The layout of its structures is that of llama.cpp 0.5.0; a library with another one is refused.
"""

from __future__ import annotations

import ctypes as C
import os
import platform
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

#: The npm package of the prebuilt library (MIT) for this machine, and its version.
PACKAGE = f"@node-llama-cpp/linux-{'arm64' if platform.machine() == 'aarch64' else 'x64'}"
VERSION = "3.22.1"
_INT, _POINTER, _TEXT, _BYTES = C.c_int32, C.c_void_p, C.c_char_p, C.c_size_t


class Parameters(C.Structure):
    """Parameters of a model, a context or a quantisation: more bytes than any of them has."""

    _fields_ = [("i", _INT * 256)]


class LlamaBatch(C.Structure):
    """``llama_batch``."""

    _fields_ = [
        ("n_tokens", _INT),
        ("token", C.POINTER(_INT)),
        ("embd", _POINTER),
        ("pos", C.POINTER(_INT)),
        ("n_seq_id", C.POINTER(_INT)),
        ("seq_id", C.POINTER(C.POINTER(_INT))),
        ("logits", C.POINTER(C.c_int8)),
    ]


class InputMeans(C.Structure):
    """``llama_model_imatrix_data``: mean squares of the inputs of a matrix."""

    _fields_ = [("name", _TEXT), ("data", C.POINTER(C.c_float)), ("size", _BYTES)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_quantize_default_params": (Parameters, []),
    "llama_model_load_from_file": (_POINTER, [_TEXT, Parameters]),
    "llama_init_from_model": (_POINTER, [_POINTER, Parameters]),
    "llama_batch_init": (LlamaBatch, [_INT] * 3),
    "llama_batch_free": (None, [LlamaBatch]),
    "llama_decode": (_INT, [_POINTER, LlamaBatch]),
    "llama_get_logits": (C.POINTER(C.c_float), [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_tokenize": (_INT, [_POINTER, _TEXT, _INT, C.POINTER(_INT), _INT, C.c_bool, C.c_bool]),
    "llama_model_quantize": (C.c_uint32, [_TEXT, _TEXT, C.POINTER(Parameters)]),
    "llama_free": (None, [_POINTER]),
    "llama_model_free": (None, [_POINTER]),
    "llama_log_set": (None, [_POINTER, _POINTER]),
    "llama_backend_init": (None, []),
}
#: Byte of ``use_extra_bufts`` in ``llama_model_params``.
_REPACKED = 74
#: Places in ``llama_context_params`` ▶ their defaults: batches, threads, fused attention, types of the cache.
_DEFAULTS = {0: 512, 1: 2048, 2: 512, 7: 4, 8: 4, 13: -1, 26: 1, 27: 1}
#: Errors of the last call.
said: list[str] = []


def _keep_error(level: int, text: bytes, _: Any) -> None:
    if level == 4:
        said.append(text.decode(errors="replace").strip())


_log = C.CFUNCTYPE(None, C.c_int, _TEXT, _POINTER)(_keep_error)


def find_libraries(place: Path) -> Path | None:
    """The folder of the shared libraries: ``place`` or one in it; None where there are none."""
    return next((file.parent for file in sorted(place.glob("**/libllama.*")) if file.suffix != ".a"), None)


@cache
def library(libraries: Path) -> Any:
    """The C library in a folder, with the CPU backend that fits this machine best.

    Raises:
        RuntimeError: it is not laid out as llama.cpp 0.5.0.
    """
    for pattern in ("libggml-base.*", "libggml.*"):
        ggml = C.CDLL(str(min(libraries.glob(pattern))), mode=C.RTLD_GLOBAL)
    llama = C.CDLL(str(file := min(libraries.glob("libllama.*"))), mode=C.RTLD_GLOBAL)
    calls = {}
    for name, (result, arguments) in _SIGNATURES.items():
        calls[name.removeprefix("llama_")] = function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    calls["log_set"](_log, None)
    ggml.ggml_log_set(_log, None)
    ggml.ggml_backend_load_all_from_path.argtypes = [_TEXT]
    ggml.ggml_backend_load_all_from_path(os.fsencode(libraries))
    calls["backend_init"]()
    defaults = calls["context_default_params"]().i
    if tuple(defaults[i] for i in _DEFAULTS) != tuple(_DEFAULTS.values()):
        raise RuntimeError(f"{file} is not laid out as llama.cpp 0.5.0 ({PACKAGE} {VERSION})")
    version = file.name.removeprefix("libllama.v").removesuffix(".so")
    return SimpleNamespace(**calls, version=version if version != file.name else "of unknown version")


class Model:
    """A GGUF file, loaded.

    Args:
        libraries: folder of the shared libraries. length: most tokens of a text.
        repacked: use kernels that store the codes in another order (`--no-repack` of the tools).
        wide_cache: keys and values in float32, attention without fused kernels.

    Raises:
        RuntimeError: it cannot be loaded; with llama.cpp's own message.
    """

    def __init__(
        self,
        path: str | Path,
        libraries: Path,
        *,
        length: int = 512,
        threads: int = 1,
        repacked: bool = True,
        wide_cache: bool = False,
    ) -> None:
        self.lib = lib = library(libraries)
        said.clear()
        loading = lib.model_default_params()
        C.cast(C.byref(loading), C.POINTER(C.c_bool))[_REPACKED] = repacked
        self.model = lib.model_load_from_file(os.fsencode(path), loading)
        if not self.model:
            raise RuntimeError("; ".join(said[:3]) or "the file cannot be loaded")
        options = lib.context_default_params()
        options.i[0] = options.i[1] = options.i[2] = length  # context, batch and what is computed at once
        options.i[7] = options.i[8] = threads
        if wide_cache:
            options.i[13] = options.i[26] = options.i[27] = 0  # fused attention; types of keys and values: float32
        self.context = lib.init_from_model(self.model, options)
        self._options = options
        if not self.context:
            raise RuntimeError("; ".join(said[:3]) or "no context")
        self.vocab = lib.model_get_vocab(self.model)
        self.vocabulary = lib.vocab_n_tokens(self.vocab)
        self.length = length

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: Any) -> None:
        self.lib.free(self.context)
        self.lib.model_free(self.model)

    def renew(self) -> None:
        """Forget the cache."""
        self.lib.free(self.context)
        self.context = self.lib.init_from_model(self.model, self._options)

    def step(self, ids: list[int], start: int = 0, *, last: bool = False) -> np.ndarray:
        """Logits [n, V] of tokens that follow ``start`` others; ``last``: [1, V] of the last one alone."""
        batch = self.lib.batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, start + place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, not last or place == len(ids) - 1
        status = self.lib.decode(self.context, batch)
        self.lib.batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        return np.ctypeslib.as_array(
            self.lib.get_logits(self.context), (1 if last else len(ids), self.vocabulary)
        ).copy()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits [samples, length, V] of samples [samples, length], each by itself."""
        result = []
        for sample in ids:
            self.renew()
            result.append(self.step([int(x) for x in sample]))
        return np.stack(result)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text; ``special``: with the tokens that the file puts around it. Their texts are read as such."""
        data = text.encode()
        buffer = (_INT * (len(data) + 16))()
        count = self.lib.tokenize(self.vocab, data, len(data), buffer, len(buffer), special, True)
        return list(buffer[:count])

    def seconds(self, prompt: int, generated: int) -> tuple[float, float]:
        """Seconds to read a prompt, and for each of the tokens that are decoded after it, one after another."""
        self.renew()
        ids = [1 + place % 100 for place in range(prompt + generated)]
        begin = time.perf_counter()
        self.step(ids[:prompt], last=True)
        read = time.perf_counter()
        for place in range(prompt, prompt + generated):
            self.step([ids[place]], place)
        return read - begin, (time.perf_counter() - read) / generated
