"""llama.cpp's library by ctypes: logits and token ids of a GGUF file. `LLAMA_LIBS` is the folder of the prebuilt library.

python run_llama_cpp.py FILE IDS.json OUT.npz
"""

import ctypes as c
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np

folder = Path(os.environ["LLAMA_LIBS"])


class Parameters(c.Structure):
    """Any of llama.cpp's structures of parameters, passed by value; larger than each of them."""

    _fields_ = [("words", c.c_int32 * 256)]


class Batch(c.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c.c_int32), ("token", c.POINTER(c.c_int32)), ("embd", c.c_void_p), ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)), ("seq_id", c.POINTER(c.POINTER(c.c_int32))), ("logits", c.POINTER(c.c_int8)),
    ]  # fmt: skip


SIGNATURES = {
    "llama_model_default_params": (Parameters, []),
    "llama_context_default_params": (Parameters, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, Parameters]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, Parameters]),
    "llama_batch_init": (Batch, [c.c_int32] * 3),
    "llama_decode": (c.c_int32, [c.c_void_p, Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_tokenize": (
        c.c_int32, [c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool],
    ),
}  # fmt: skip


def library():
    """The library with its fastest CPU kernels."""
    for name in ("libggml-base.so*", "libggml.*"):
        ggml = c.CDLL(str(next(iter(sorted(folder.glob(name))))), mode=c.RTLD_GLOBAL)
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    kernel = "icelake" if "avx512_vnni" in flags else "haswell" if "avx2" in flags else "x64"
    ggml.ggml_backend_load.restype = c.c_void_p
    assert ggml.ggml_backend_load(str(folder / f"libggml-cpu-{kernel}.so").encode()), "no kernels for this CPU"
    loaded = c.CDLL(str(next(folder.glob("libllama.v*"))), mode=c.RTLD_GLOBAL)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


path, source, target = sys.argv[1:]
asked = json.loads(Path(source).read_text())
llama, ids = library(), asked["ids"]
llama.llama_backend_init()
model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
assert model, "llama.cpp does not load the file"
options = llama.llama_context_default_params()
for place in range(3):  # n_ctx, n_batch, n_ubatch
    options.words[place] = len(ids)
context = llama.llama_init_from_model(model, options)
batch = llama.llama_batch_init(len(ids), 0, 1)
batch.n_tokens = len(ids)
for number, token in enumerate(ids):
    batch.token[number], batch.pos[number], batch.n_seq_id[number], batch.logits[number] = token, number, 1, 1
    batch.seq_id[number][0] = 0
assert llama.llama_decode(context, batch) == 0, "llama_decode fails"
vocabulary = llama.llama_model_get_vocab(model)
size = llama.llama_vocab_n_tokens(vocabulary)
logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), size)).copy()
text = asked["text"].encode()
buffer = (c.c_int32 * (len(text) + 8))()
count = llama.llama_tokenize(vocabulary, text, len(text), buffer, len(buffer), False, True)
version = next(folder.glob("libllama.v*")).name.removeprefix("libllama.v").removesuffix(".so")
np.savez(target, logits=logits, text_ids=np.array(buffer[:count]), version=version)
