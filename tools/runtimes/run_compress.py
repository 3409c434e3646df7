"""This package: logits of a checkpoint folder in float32, with inputs rounded as its config says or not.

python run_compress.py ASKED.json FOLDER OUT.npz [FOLDER OUT.npz …]
"""

import math
from pathlib import Path

import torch
from each import each

import compress

#: Tokens that are read in float64, too.
WIDE = 128


def outputs(folder, asked):
    """``logits`` and ``unrounded`` [tokens, vocabulary], or of an encoder its hidden states; ``greedy`` and ``bits_per_byte``
    of a causal model, ``embeddings`` [lines, width] of an encoder; ``wide``: the first of ``logits`` in float64, where no
    inputs are rounded.
    """
    ids, values = torch.tensor([asked["ids"]]), {}
    with torch.no_grad():
        model = compress.load(folder, dtype="float32", quantized_activations=False)
        values["unrounded"] = model(ids)[0][0].numpy()
        if asked["causal"]:
            prompt, count = torch.tensor([asked["prompt"]]), asked["new_tokens"]
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            values["greedy"] = tokens[0, prompt.shape[1] :].numpy()
        if '"input_activations": {' in Path(folder, "config.json").read_text():
            model = compress.load(folder, dtype="float32")
        else:
            values["wide"] = compress.load(folder, dtype="float64")(ids[:, :WIDE])[0][0].numpy()
        values["logits"] = model(ids)[0][0].numpy()
        if asked["causal"]:
            return values | {"bits_per_byte": bits_per_byte(model, asked)}
        means = [model(torch.tensor([line]))[0][0].mean(0) for line in asked["line_ids"]]
        return values | {"embeddings": torch.nn.functional.normalize(torch.stack(means)).numpy()}


def bits_per_byte(model, asked):
    """Of the lines, each after the token that ends a text."""
    nats = 0.0
    for ids in asked["line_ids"]:
        after = torch.tensor([[model.config.eos_token_id, *ids]])
        logprobs = model(after)[0][0, :-1].double().log_softmax(-1)
        nats -= float(logprobs.gather(1, after[0, 1:, None]).sum())
    return nats / math.log(2) / sum(len(line.encode()) for line in asked["lines"])


each(outputs)
