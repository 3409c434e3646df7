"""Stock transformers, without this package: logits and greedy tokens of checkpoint folders.

python run_transformers.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import time

import torch
import transformers
from each import each
from stock import load

#: As many as `run_vllm` gives.
LIKELIEST = 20


def outputs(folder, asked):
    """``logits`` [tokens, vocabulary], or of an encoder its hidden states; of a causal model ``greedy``, and in bfloat16
    ``top_ids`` and ``top_logprobs`` [places, 20], likeliest first.
    """
    ids, model = torch.tensor([asked["ids"]]), load(folder, asked["causal"])
    values = {"version": transformers.__version__}
    with torch.no_grad():
        values["logits"] = model(ids)[0][0].float().numpy()
        if not asked["causal"]:
            return values
        prompt, count = torch.tensor([asked["prompt"]]), asked["new_tokens"]
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        start = time.perf_counter()
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        values |= {"greedy": tokens.numpy(), "seconds": time.perf_counter() - start}
        model = load(folder, True, torch.bfloat16)
        likeliest = model(ids)[0][0, :-1].float().log_softmax(-1).topk(LIKELIEST)
        return {**values, "top_ids": likeliest.indices.numpy(), "top_logprobs": likeliest.values.numpy()}


each(outputs)
