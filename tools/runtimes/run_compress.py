"""This package: logits of a checkpoint folder in float32, with inputs rounded as its config says or not.

python run_compress.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

from pathlib import Path

import torch
from each import each

import compress


def outputs(folder, asked):
    """``logits`` and ``unrounded`` [tokens, vocabulary], ``greedy``."""
    ids, prompt = torch.tensor([asked["ids"]]), torch.tensor([asked["prompt"]])
    options = {"max_new_tokens": asked["new_tokens"], "min_new_tokens": asked["new_tokens"], "do_sample": False}
    values = {}
    with torch.no_grad():
        model = compress.load(folder, dtype="float32", quantized_activations=False)
        values["unrounded"] = model(ids)[0][0].numpy()
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        values["greedy"] = tokens[0, prompt.shape[1] :].numpy()
        if '"input_activations": {' in Path(folder, "config.json").read_text():
            model = compress.load(folder, dtype="float32")
        values["logits"] = model(ids)[0][0].numpy()
    return values


each(outputs)
