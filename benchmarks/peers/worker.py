"""What the workers of all tools share. Imports neither `compress` nor anything else of this repository.

A worker is called with a request, JSON: the dense folder, a safetensors file with the calibration ``ids``, int64 [samples,
length], the job and the folder for the result. It prints one line of JSON at its end. The result is a dense float32 checkpoint
of the model's class with the weights as the tool has them, codes decoded, so that all tools are scored alike.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

GROUP = 64


def run(method: Callable[[Any, torch.Tensor, dict[str, Any]], None]) -> None:
    """Let a tool change the model in place; write it; print CPU and wall seconds of the tool alone, and the peak memory.

    The tool gets the model in float32, the ids and the request. GPT-2's Conv1D are given to it as equal linear layers.
    """
    request = json.loads(sys.argv[1])
    ids = load_file(request["ids"])["ids"]
    model = linear_model(request["model"])
    wall, cpu = time.perf_counter(), cpu_seconds()
    method(model, ids, request)
    answer = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall}
    write(model, request["model"], request["out"])
    answer["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({key: round(value, 1) for key, value in answer.items()}))


def cpu_seconds() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def linear_model(folder: str) -> Any:
    """The model in float32 and evaluation mode, each Conv1D replaced by the linear layer that computes the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = torch.nn.Linear(*module.weight.shape, bias=module.bias is not None)
            linear.weight.data = module.weight.data.T.contiguous()
            linear.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model.requires_grad_(False)


def write(model: Any, folder: str, out: str) -> None:
    """Write the weights of a model of `linear_model` as a float32 checkpoint of the original's class."""
    values = dict(model.named_parameters())
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in original.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            value = values[f"{name}.{key}"].detach() if f"{name}.{key}" in values else None
            if value is None:
                continue  # a tied one, which has one name
            parameter.data.copy_(value.T if isinstance(module, Conv1D) and key == "weight" else value)
    original.save_pretrained(out)
