"""The ``quantization_config`` of compressed-tensors checkpoints, rendered from a spec. Imports no torch.

Format: https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from compress.architectures.inferred import Inferred
from compress.architectures.model_map import ModelMap, model_map
from compress.checkpoint.storage import format_chain
from compress.spec.formats import ACTIVATIONS, BLOCK, SCALE_DTYPES, QuantFormat
from compress.spec.spec import Spec, Tensor

KEY = "quantization_config"
#: Value of its ``quant_method``.
METHOD = "compressed-tensors"
_EIGHT = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
#: Format of the KV cache ▶ scheme. vLLM accepts only these 8 bits (compressed_tensors.py, validate_kv_cache_scheme). Dynamic
#: means no scales in the file: vLLM then uses 1, and SGLang does not quantise.
_CACHES: Mapping[str, dict[str, Any]] = {
    "fp8": {**_EIGHT, "strategy": "tensor", "dynamic": True},
    "fp8-tensor": {**_EIGHT, "strategy": "tensor", "dynamic": False},
    "fp8-head": {**_EIGHT, "strategy": "attn_head", "dynamic": False},
}


def render(spec: Spec) -> dict[str, Any] | None:
    """Config for the number formats of a spec as stored; None if nothing is quantised.

    A single group targets all linear layers that are not ignored; several groups name their modules. Dense layers are always
    listed, because some servers refuse a linear layer that is in no list. Tables of tokens are a target by their class and
    heads by their names, because vLLM does not know their names, and its class of heads is no linear layer.
    """
    by_grid: dict[QuantFormat, list[Tensor]] = {}
    mapped = model_map(spec)
    coded = [(t, t.quant_format) for t in spec.stored() if t.quant_format is not None]
    # transformers takes the first group that names "experts" for the fused ones, and `shared_experts` are none of these
    for tensor, quant_format in sorted(coded, key=lambda pair: not mapped.is_expert(pair[0].name)):
        by_grid.setdefault(quant_format, []).append(tensor)
    if not by_grid:
        return None
    groups = {}
    for number, (quant_format, tensors) in enumerate(by_grid.items()):
        groups[f"group_{number}"] = {
            "targets": _targets(mapped, tensors, alone=len(by_grid) == 1),
            "weights": _weights(quant_format),
            "input_activations": _activations(quant_format),
            "output_activations": None,
            "format": format_chain(quant_format)[0],
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": _ignored(spec),
        "kv_cache_scheme": _CACHES[spec.structure.kv_cache] if spec.structure.kv_cache else None,
        "global_compression_ratio": None,
    }


def _targets(mapped: ModelMap, tensors: Sequence[Tensor], *, alone: bool) -> list[str]:
    """Targets of the group of these tensors; ``alone``: it is the only one."""
    roles = {t.name: mapped.linears[t.name].role for t in tensors}
    named = [t for t in tensors if roles[t.name] == "head" or not (alone or roles[t.name] == "embedding")]
    targets = [f"re:.*{re.escape(mapped.in_memory(t.module))}$" for t in named]
    targets += ["Linear"] * (alone and not set(roles.values()) <= {"embedding", "head"})
    return targets + ["Embedding"] * ("embedding" in roles.values())


def _weights(quant_format: QuantFormat) -> dict[str, Any]:
    strategy = "tensor" if quant_format.whole else "channel"
    if quant_format.block:
        strategy = "block"
    elif quant_format.group:
        strategy = "tensor_group" if quant_format.format == "nvfp4" else "group"
    result: dict[str, Any] = {
        "num_bits": quant_format.bits,
        "type": "int" if quant_format.is_integer else "float",
        "symmetric": quant_format.symmetric,
        "strategy": strategy,
        "group_size": None if quant_format.block else quant_format.group or None,
        "dynamic": False,
    }
    if quant_format.block:
        result["block_structure"] = [BLOCK, BLOCK]
    if (dtype := SCALE_DTYPES.get(quant_format.format)) is not None:
        result["scale_dtype"] = dtype
    return result


def _activations(quant_format: QuantFormat) -> dict[str, Any] | None:
    return None if quant_format.activations is None else dict(ACTIVATIONS[quant_format.activations])


def _ignored(spec: Spec) -> list[str]:
    """Modules to ignore: those with plain matrices, the head, which tied files leave out, and a pooler that the file lacks.

    First their names in memory, then the names in files that differ, for servers that use these.
    """
    modules = [
        t.module for t in spec.stored() if t.quant_format is None and len(t.shape) == 2 and t.name.endswith(".weight")
    ]
    mapped = model_map(spec)
    record = mapped.record
    if isinstance(record, Inferred):
        modules += record.absent
    else:
        if record.head is not None and not any(t.module == record.head and t.quant_format for t in spec.stored()):
            modules.append(record.head)
        if record.pooler is not None and record.is_base(spec.structure.class_name):
            modules += [record.pooler] * all(f".{record.pooler}." not in f".{name}" for name in spec.tensors)
    return list(dict.fromkeys([*(mapped.in_memory(module) for module in modules), *modules]))


def strip(spec: Spec) -> Spec:
    """Spec without the ``quantization_config``; tensors have its formats, and the structure its KV cache."""
    config = dict(spec.structure.config)
    cached = cache_of(config.pop(KEY, None))
    return replace(spec, structure=replace(spec.structure, config=config, kv_cache=cached))


def cache_of(said: Any) -> str | None:
    """KV-cache format of a quantization config; None for none and for an unknown one."""
    scheme = said.get("kv_cache_scheme") if isinstance(said, dict) else None
    if not isinstance(scheme, dict):
        return None
    full = {"group_size": None, "symmetric": True, "dynamic": False, **scheme}
    return next((name for name, known in _CACHES.items() if known.items() <= full.items()), None)
