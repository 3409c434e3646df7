"""llama.cpp through its C library: logits, token ids, quantisation and speed of GGUF files. Needs numpy, and npm once.

The library is the prebuilt one of the npm package ``@node-llama-cpp/linux-x64`` (MIT), in ``build/runtimes/llama.cpp``.
As a command it reads and writes files, so that it can run in an environment of its own:

    python tools/runtimes/llama_cpp.py logits model.gguf ids.npy out.npy     # ids [samples, length] ▶ float32 logits
    python tools/runtimes/llama_cpp.py tokens model.gguf text.txt out.npy    # without special tokens around it
    python tools/runtimes/llama_cpp.py quantize in.gguf out.gguf Q4_K_M [imatrix.gguf]
    python tools/runtimes/llama_cpp.py speed model.gguf [tokens] [threads]   # decoded tokens per second
"""

from __future__ import annotations

import ctypes as C
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"
HOME = Path(__file__).resolve().parents[2] / "build" / "runtimes" / "llama.cpp"
#: Names of whole files' types ▶ their number (``llama_ftype``).
TYPES = {
    "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
    "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
_INT, _POINTER, _TEXT, _BYTES = C.c_int32, C.c_void_p, C.c_char_p, C.c_size_t


class Parameters(C.Structure):
    """Parameters of a model, a context or a quantisation: more bytes than any of them has."""

    _fields_ = [("i", _INT * 256)]


class Batch(C.Structure):
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


class Importance(C.Structure):
    """``llama_model_imatrix_data``: mean squares of the inputs of a matrix."""

    _fields_ = [("name", _TEXT), ("data", C.POINTER(C.c_float)), ("size", _BYTES)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_quantize_default_params": (Parameters, []),
    "llama_model_load_from_file": (_POINTER, [_TEXT, Parameters]),
    "llama_init_from_model": (_POINTER, [_POINTER, Parameters]),
    "llama_batch_init": (Batch, [_INT] * 3),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_INT, [_POINTER, Batch]),
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
_said: list[str] = []


@C.CFUNCTYPE(None, C.c_int, _TEXT, _POINTER)
def _log(level: int, text: bytes, _: Any) -> None:
    if level == 4:
        _said.append(text.decode(errors="replace").strip())


def libraries() -> Path:
    """Folder of the shared libraries; npm fetches the package on the first call."""
    folder = HOME / VERSION / "package" / "bins" / "linux-x64"
    if not folder.exists():
        (HOME / VERSION).mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=HOME, check=True, capture_output=True, text=True
        )
        archive = packed.stdout.split()[-1]
        subprocess.run(["tar", "xzf", str(HOME / archive), "-C", str(HOME / VERSION)], check=True)
    return folder


@cache
def library() -> Any:
    """The C library, with the CPU backend that fits this machine best."""
    folder = libraries()
    C.CDLL(str(folder / "libggml-base.so"), mode=C.RTLD_GLOBAL)
    ggml = C.CDLL(str(next(folder.glob("libggml.v*.so"))), mode=C.RTLD_GLOBAL)
    llama = C.CDLL(str(next(folder.glob("libllama.v*.so"))), mode=C.RTLD_GLOBAL)
    calls = {}
    for name, (result, arguments) in _SIGNATURES.items():
        calls[name.removeprefix("llama_")] = function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    calls["log_set"](_log, None)
    ggml.ggml_log_set(_log, None)
    ggml.ggml_backend_load_all_from_path.argtypes = [_TEXT]
    ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
    calls["backend_init"]()
    return SimpleNamespace(**calls)


class Model:
    """A GGUF file, loaded.

    Args:
        length: most tokens of a text. repacked: use kernels that store the codes in another order (`--no-repack` of the tools).
        wide_cache: keys and values in float32, attention without fused kernels.

    Raises:
        RuntimeError: it cannot be loaded; with llama.cpp's own message.
    """

    def __init__(
        self, path: str | Path, *, length: int = 512, threads: int = 1, repacked: bool = True, wide_cache: bool = False
    ) -> None:
        self.lib = lib = library()
        _said.clear()
        loading = lib.model_default_params()
        C.cast(C.byref(loading), C.POINTER(C.c_bool))[_REPACKED] = repacked
        self.model = lib.model_load_from_file(os.fsencode(path), loading)
        if not self.model:
            raise RuntimeError("; ".join(_said[:3]) or "the file cannot be loaded")
        options = lib.context_default_params()
        options.i[0] = options.i[1] = options.i[2] = length  # context, batch and what is computed at once
        options.i[7] = options.i[8] = threads
        if wide_cache:
            options.i[13] = options.i[26] = options.i[27] = 0  # fused attention; types of keys and values: float32
        self.context = lib.init_from_model(self.model, options)
        self._options = options
        if not self.context:
            raise RuntimeError("; ".join(_said[:3]) or "no context")
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

    def step(self, ids: list[int], start: int = 0) -> np.ndarray:
        """Logits [n, V] of tokens that follow ``start`` others."""
        batch = self.lib.batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, start + place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        status = self.lib.decode(self.context, batch)
        self.lib.batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        return np.ctypeslib.as_array(self.lib.get_logits(self.context), (len(ids), self.vocabulary)).copy()

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

    def speed(self, tokens: int) -> float:
        """Decoded tokens per second, one after another, after a prompt of 16."""
        self.renew()
        self.step([1] * 16)
        begin = time.perf_counter()
        for place in range(tokens):
            self.step([1 + place % 100], 16 + place)
        return tokens / (time.perf_counter() - begin)


def quantize(source: Path, target: Path, kind: str, imatrix: dict[str, np.ndarray] | None = None) -> None:
    """llama.cpp's own quantisation of a file. ``imatrix``: mean squares of inputs by the matrix's name."""
    lib = library()
    options = lib.model_quantize_default_params()
    options.i[0], options.i[1] = 1, TYPES[kind]
    kept = []
    if imatrix is not None:
        entries = (Importance * (len(imatrix) + 1))()
        for place, (name, values) in enumerate(imatrix.items()):
            kept.append(flat := np.ascontiguousarray(values, np.float32).ravel())
            entries[place] = Importance(name.encode(), flat.ctypes.data_as(C.POINTER(C.c_float)), flat.size)
        C.cast(C.byref(options, 24), C.POINTER(_POINTER))[0] = C.cast(entries, _POINTER)
    _said.clear()
    if lib.model_quantize(os.fsencode(source), os.fsencode(target), C.byref(options)):
        raise RuntimeError("; ".join(_said[:3]) or "the file cannot be quantised")


def main(arguments: list[str]) -> None:
    """The command line."""
    match arguments:
        case ["logits", file, ids, out]:
            samples = np.load(ids)
            with Model(file, length=max(32, samples.shape[1])) as model:
                np.save(out, model.logits(samples))
        case ["tokens", file, text, out]:
            with Model(file) as model:
                np.save(out, np.array(model.tokens(Path(text).read_text(encoding="utf-8"))))
        case ["quantize", source, target, kind, *rest]:
            means = None
            if rest:
                from compress.exports.gguf.imatrix import read_imatrix

                means = read_imatrix(Path(rest[0]))
            quantize(Path(source), Path(target), kind, means)
        case ["speed", file, *rest]:
            tokens, threads = (int(x) for x in [*rest, "64", "1"][:2]) if len(rest) != 1 else (int(rest[0]), 1)
            with Model(file, length=16 + tokens, threads=threads) as model:
                print(f"{model.speed(tokens):.2f} tokens per second")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
