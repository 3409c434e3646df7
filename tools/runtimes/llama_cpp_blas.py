"""Logits of a GGUF file in llama.cpp built with BLAS, which multiplies prompts in float32 and rounds no inputs.

    python -P tools/runtimes/llama_cpp_blas.py model.gguf ids.npy out.npy     # ids [samples, length] ▶ float32 logits

Run by an environment of its own:

    CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" pip install llama-cpp-python
"""

from __future__ import annotations

import sys

import llama_cpp.llama_cpp as core
import numpy as np
from llama_cpp import Llama


def main(file: str, ids: str, output: str) -> None:
    """Write the logits [samples, length, vocabulary] of each sample alone. BLAS takes batches of 32 tokens and more."""
    default = core.llama_model_default_params

    def params() -> core.llama_model_params:
        """Without repacked weights, which the kernels that round inputs read."""
        result = default()
        result.use_extra_bufts = False
        return result

    core.llama_model_default_params = params
    samples = np.load(ids)
    length = samples.shape[1]
    model = Llama(
        file,
        n_ctx=length,
        n_batch=length,
        n_ubatch=length,
        logits_all=True,
        type_k=core.GGML_TYPE_F32,
        type_v=core.GGML_TYPE_F32,
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
