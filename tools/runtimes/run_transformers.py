"""Stock transformers, without this package: logits and greedy tokens of a checkpoint folder.

python run_transformers.py FOLDER IDS.json OUT.npz
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

folder, source, target = sys.argv[1:]
asked = json.loads(Path(source).read_text())
dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}[asked.get("dtype", "float32")]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=asked.get("remote_code", False))
causal = any(name.endswith(("CausalLM", "LMHeadModel")) for name in config.architectures or ())
auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
model = auto.from_pretrained(folder, dtype=dtype, trust_remote_code=asked.get("remote_code", False)).eval()
results = {"version": transformers.__version__}
with torch.no_grad():
    results["logits"] = model(torch.tensor([asked["ids"]]))[0][0].float().numpy()
    if causal:
        prompt = torch.tensor([asked["prompt"]])
        options = {"max_new_tokens": asked["new_tokens"], "min_new_tokens": asked["new_tokens"], "do_sample": False}
        start = time.perf_counter()
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        results |= {"greedy": tokens.numpy(), "seconds": time.perf_counter() - start}
np.savez(target, **results)
