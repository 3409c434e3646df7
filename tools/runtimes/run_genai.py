"""onnxruntime-genai: greedy tokens of a folder of `compress export --to onnx`.

python run_genai.py FOLDER IDS.json OUT.npz
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

folder, source, target = sys.argv[1:]
asked = json.loads(Path(source).read_text())
prompt, count = asked["prompt"], asked["new_tokens"]
model = og.Model(folder)
options = og.GeneratorParams(model)
options.set_search_options(
    max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False, batch_size=1
)
generator = og.Generator(model, options)
generator.append_tokens([prompt])
start = time.perf_counter()
while not generator.is_done():
    generator.generate_next_token()
seconds = time.perf_counter() - start
tokens = np.array(generator.get_sequence(0))[len(prompt) :]
text = asked.get("text")
ids = og.Tokenizer(model).encode(text) if text else np.zeros(0, np.int64)
np.savez(target, greedy=tokens, text_ids=np.asarray(ids), seconds=seconds, version=og.__version__)
