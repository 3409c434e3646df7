"""Logits of a GGUF file in llama.cpp built with BLAS, which multiplies prompts in float32 and rounds no inputs.

    python -P tools/runtimes/llama_cpp_blas.py model.gguf ids.npy out.npy     # ids [samples, length] ▶ float32 logits

Run by an environment of its own:

    CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" pip install llama-cpp-python
"""

from __future__ import annotations

import sys

import llama_cpp
import numpy as np


def main(file: str, ids: str, output: str) -> None:
    """Write the logits [samples, length, vocabulary] of each sample alone. BLAS takes batches of 32 tokens and more."""
    samples = np.load(ids)
    length = samples.shape[1]
    model = llama_cpp.Llama(
        file,
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    logits = []
    for sample in samples:
        model.reset()
        model.eval(sample.tolist())
        logits.append(np.array(model.scores[:length], dtype=np.float32))
    np.save(output, np.stack(logits))


if __name__ == "__main__":
    main(*sys.argv[1:])
