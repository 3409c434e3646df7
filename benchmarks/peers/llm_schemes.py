"""llm-compressor's own checkpoint of a scheme by name: GPTQ for integers, rounding for floats, as its examples do.

``W4A16:64`` is the scheme with another group size. ``SmoothQuant=0.5+GPTQ`` smooths first, ``SpinQuant=R1,R2+GPTQ`` rotates.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def transforms(text: str) -> list[Modifier]:
    """The modifiers before rounding: ``SmoothQuant=0.5``, ``SpinQuant=R1,R2`` or both, with a semicolon between them."""
    kinds = {
        "SmoothQuant": lambda value: SmoothQuantModifier(smoothing_strength=float(value)),
        "SpinQuant": lambda value: SpinQuantModifier(rotations=value.split(",")),
    }
    parts = (part.partition("=") for part in text.split(";") if part)
    return [kinds[name](value) for name, _, value in parts]


def main() -> None:
    """Read the request, write the compressed checkpoint, print CPU seconds of the tool alone and the peak memory."""
    request = json.loads(sys.argv[1])
    ids = load_file(request["ids"])["ids"]
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto").eval()
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    transform, _, method = request["method"].rpartition("+")
    kind = GPTQModifier if method == "GPTQ" else QuantizationModifier
    name, _, group = request["amount"].partition(":")
    scheme = preset_name_to_scheme(name, ["Linear"])
    if group:
        scheme.weights.group_size = int(group)
    recipe = [*transforms(transform), kind(config_groups={"group_0": scheme}, ignore=["re:.*lm_head.*"])]
    cpu = time.process_time()
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
    answer = {"cpu_s": round(time.process_time() - cpu, 1)}
    model.save_pretrained(request["out"], save_compressed=True)
    answer["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
