"""onnxruntime: logits of a causal model with a KV cache, at once and in halves, or hidden states of an encoder.

python run_onnxruntime.py FOLDER IDS.json OUT.npz
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

folder, source, target = sys.argv[1:]
asked = json.loads(Path(source).read_text())
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx", providers=["CPUExecutionProvider"])
inputs = {each.name: each.shape for each in session.get_inputs()}
outputs = [each.name for each in session.get_outputs()]
caches = [name for name in inputs if name.startswith("past_key_values")]


def run(ids, seen, past):
    """Outputs by name for ids that follow ``seen`` tokens."""
    ids = np.array(ids, np.int64).reshape(1, -1)
    given = {"input_ids": ids, "attention_mask": np.ones((1, seen + ids.shape[1]), np.int64)}
    given |= {"token_type_ids": np.zeros_like(ids), **past}
    return dict(zip(outputs, session.run(outputs, {k: v for k, v in given.items() if k in inputs}), strict=True))


def following(result):
    """The cache for the next call."""
    return {name: result[name.replace("past_key_values", "present")] for name in caches}


results, ids = {"version": onnxruntime.__version__}, asked["ids"]
size = json.loads(Path(folder, "genai_config.json").read_text())["model"]["decoder"]["head_size"] if caches else 0
empty = {name: np.zeros((1, inputs[name][1], 0, size), np.float32) for name in caches}
whole = run(ids, 0, empty)
results["logits"] = whole[outputs[0]][0]
if caches:
    half = len(ids) // 2
    first = run(ids[:half], 0, empty)
    results["halves"] = np.concatenate([first["logits"][0], run(ids[half:], half, following(first))["logits"][0]])
    state, tokens, start = run(asked["prompt"], 0, empty), [], time.perf_counter()
    for number in range(asked["new_tokens"]):
        tokens.append(int(state["logits"][0, -1].argmax()))
        state = run([tokens[-1]], len(asked["prompt"]) + number, following(state))
    results |= {"greedy": np.array(tokens), "seconds": time.perf_counter() - start}
np.savez(target, **results)
