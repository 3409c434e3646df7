"""llama.cpp: logits, greedy tokens and ids of GGUF files.

python run_llama_cpp.py ASKED.json FILE OUT.npz [FILE OUT.npz …]
"""

import time

import numpy as np
from each import each
from llama_cpp import VERSION, Model, libraries


def outputs(file, asked):
    """``logits`` [tokens, vocabulary], ``greedy`` and ``text_ids``."""
    ids, prompt = asked["ids"], asked["prompt"]
    with Model(file, length=len(ids)) as model:
        values = {"logits": model.step(ids)}
        model.renew()
        state, tokens, start = model.step(prompt), [], time.perf_counter()
        for number in range(asked["new_tokens"]):
            tokens.append(int(state[-1].argmax()))
            state = model.step(tokens[-1:], len(prompt) + number)
        values |= {"greedy": np.array(tokens), "seconds": time.perf_counter() - start}
        return {**values, "text_ids": np.array(model.tokens(asked["text"])), "version": version()}


def version():
    """Of llama.cpp, as the name of its library has it, and of the package that it comes in."""
    name = next(libraries().glob("libllama.v*.so")).name
    return f"{name.removeprefix('libllama.v').removesuffix('.so')} of node-llama-cpp {VERSION}"


each(outputs)
