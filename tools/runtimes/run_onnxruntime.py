"""onnxruntime: logits of a causal model with a KV cache, at once and in halves, or hidden states of an encoder.

python run_onnxruntime.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
from each import each


class Session:
    """A graph of `compress export --to onnx`, and its cache."""

    def __init__(self, folder):
        self.session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one.shape for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]
        caches = [name for name in self.inputs if name.startswith("past_key_values")]
        config = json.loads(Path(folder, "genai_config.json").read_text()) if caches else {}
        size = config["model"]["decoder"]["head_size"] if caches else 0
        self.empty = {name: np.zeros((1, self.inputs[name][1], 0, size), np.float32) for name in caches}

    def run(self, ids, seen, past):
        """Logits for ids that follow ``seen`` tokens, and the cache for the next call."""
        ids = np.array(ids, np.int64).reshape(1, -1)
        given = {"input_ids": ids, "attention_mask": np.ones((1, seen + ids.shape[1]), np.int64)}
        given |= {"token_type_ids": np.zeros_like(ids), **past}
        values = self.session.run(self.outputs, {k: v for k, v in given.items() if k in self.inputs})
        result = dict(zip(self.outputs, values, strict=True))
        return values[0][0], {name: result[name.replace("past_key_values", "present")] for name in past}


def outputs(folder, asked):
    """``logits`` [tokens, vocabulary]; with a cache also ``halves``, as many, and ``greedy``."""
    model, ids, prompt = Session(folder), asked["ids"], asked["prompt"]
    logits, _ = model.run(ids, 0, model.empty)
    values = {"version": onnxruntime.__version__, "logits": logits}
    if not model.empty:
        return values
    half = len(ids) // 2
    first, cache = model.run(ids[:half], 0, model.empty)
    values["halves"] = np.concatenate([first, model.run(ids[half:], half, cache)[0]])
    state, cache = model.run(prompt, 0, model.empty)
    tokens, start = [], time.perf_counter()
    for number in range(asked["new_tokens"]):
        tokens.append(int(state[-1].argmax()))
        state, cache = model.run([tokens[-1]], len(prompt) + number, cache)
    return {**values, "greedy": np.array(tokens), "seconds": time.perf_counter() - start}


each(outputs)
