"""onnxruntime-genai: greedy tokens and ids of folders of `compress export --to onnx`.

python run_genai.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import time

import numpy as np
import onnxruntime_genai as og
from each import each


def outputs(folder, asked):
    """``greedy`` and ``text_ids``."""
    prompt, count = asked["prompt"], asked["new_tokens"]
    model = og.Model(folder)
    options, length = og.GeneratorParams(model), len(prompt) + count
    options.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
    generator = og.Generator(model, options)
    generator.append_tokens([prompt])
    start = time.perf_counter()
    while not generator.is_done():
        generator.generate_next_token()
    seconds = time.perf_counter() - start
    tokens = np.array(generator.get_sequence(0))[len(prompt) :]
    ids = og.Tokenizer(model).encode(asked["text"])
    return {"greedy": tokens, "text_ids": np.asarray(ids), "seconds": seconds, "version": og.__version__}


each(outputs)
