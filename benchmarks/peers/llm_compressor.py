"""llm-compressor's one-shot methods: RTN, GPTQ and AWQ to int4 and int3, SparseGPT and Wanda."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache

from benchmarks.peers import worker

HEAD = ["re:.*lm_head.*"]  # a plain name does not match in its pruning modifiers, and a tied head would be pruned
GPT2 = [AWQMapping("re:.*ln_1$", ["re:.*c_attn$"]), AWQMapping("re:.*ln_2$", ["re:.*c_fc$"])]


def modifiers(model: Any, method: str, amount: str) -> list[Any]:
    """The recipe of a job."""
    if method in ("SparseGPT", "Wanda"):
        kind = SparseGPTModifier if method == "SparseGPT" else WandaPruningModifier
        pattern = amount if ":" in amount else "0:0"
        sparsity = 0.5 if ":" in amount else float(amount.rstrip("%")) / 100
        return [kind(sparsity=sparsity, mask_structure=pattern, ignore=HEAD)]
    symmetric = not method.endswith("asymmetric")
    weights = {"num_bits": int(amount[-1]), "symmetric": symmetric, "strategy": "group", "group_size": worker.GROUP}
    gptq = method.startswith("GPTQ")
    args = QuantizationArgs(**weights, **({"actorder": "static"} if gptq else {}))
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=args)}
    quantise = (GPTQModifier if gptq else QuantizationModifier)(config_groups=groups, ignore=HEAD)
    if not method.startswith("AWQ"):
        return [quantise]
    IntermediatesCache.pin_memory = lambda *_: None  # which it does without an accelerator too, and fails
    return [AWQModifier(**({"mappings": GPT2} if model.config.model_type == "gpt2" else {})), quantise]


def compress(model: Any, ids: torch.Tensor, request: dict[str, Any]) -> None:
    """Run the recipe, and put decoded codes in place of the weights."""
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = modifiers(model, request["method"], request["amount"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None and hasattr(module, "weight_scale"):
            zero = getattr(module, "weight_zero_point", None)
            group = getattr(module, "weight_g_idx", None)
            module.weight.data = fake_quantize(module.weight, module.weight_scale, zero, scheme.weights, group)


if __name__ == "__main__":
    worker.run(compress)
