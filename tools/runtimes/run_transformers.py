"""Stock transformers, without this package: logits and greedy tokens of checkpoint folders of causal models.

python run_transformers.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import time

import torch
import transformers
from each import each

#: Beginnings of formats with which compressed-tensors computes in bfloat16 alone.
NARROW = ("mxfp", "nvfp")


def outputs(folder, asked):
    """``logits`` [tokens, vocabulary], in float32 where that is possible, and ``greedy``."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    coded = getattr(config, "quantization_config", None) or {}
    formats = {group.get("format") or coded["format"] for group in coded.get("config_groups", {}).values()}
    dtype = "auto" if any(name.startswith(NARROW) for name in formats) else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()
    prompt, count = torch.tensor([asked["prompt"]]), asked["new_tokens"]
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    with torch.no_grad():
        logits = model(torch.tensor([asked["ids"]]))[0][0].float().numpy()
        start = time.perf_counter()
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :].numpy()
    seconds = time.perf_counter() - start
    return {"logits": logits, "greedy": tokens, "seconds": seconds, "version": transformers.__version__}


each(outputs)
