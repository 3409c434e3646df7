"""The fields of a config that a record names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compress.architectures.inference.skeleton import Skeleton
from compress.architectures.inferred import BlockList
from compress.spec.spec import Spec

#: Names in transformers ▶ field of a record.
_KEYS = {"hidden_size": "hidden_key", "num_attention_heads": "heads_key"}
_EXPERTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "n_experts",
)
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "num_selected_experts")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_SUM = ("norm_topk_prob", "moe_norm_topk_prob", "normalize_expert_weights")


def config_fields(
    skeleton: Skeleton, part: Any, lists: Sequence[BlockList], lengths: Mapping[str, int], count: int
) -> dict[str, Any]:
    """Fields of `Inferred` that the config tells.

    Args:
        part: the config of the main list. lengths: config field ▶ number of blocks. count: blocks of the main list.
    """
    aliases = dict(getattr(part, "attribute_map", {}) or {})
    values: dict[str, Any] = part.to_dict()
    main = lists[0] if lists else None
    section = main.section if main else ""
    depth = main.depth_key.rpartition(".")[2] if main and main.depth_key else None
    fields: dict[str, Any] = {"section": section, "depth_key": depth or ""}
    for name, field in _KEYS.items():
        key = aliases.get(name, name)
        fields[field] = key if type(getattr(part, key, None)) is int else ""
    for name, field in (("num_key_value_heads", "kv_heads_key"), ("head_dim", "head_dim_key")):
        key = aliases.get(name, name)
        fields[field] = key if type(values.get(key)) is int else None
    for names, field in ((_EXPERTS, "experts_key"), (_ACTIVE, "active_experts_key"), (_SUM, "expert_sum_key")):
        named = (aliases.get(name, name) for name in names)
        fields[field] = next((k for k in named if values.get(k) is not None), None)
    if fields["experts_key"] is None:
        fields["active_experts_key"] = None
    fields["spellings"] = {k: v for k, v in aliases.items() if v in values}
    fields["per_layer"] = tuple(k for k, v in values.items() if isinstance(v, list) and _by_block(k, v, count))
    fields["dense_first_key"] = next((k for k in _DENSE_FIRST if type(values.get(k)) is int), None)
    if type(values.get("decoder_sparse_step")) is int and isinstance(values.get("mlp_only_layers"), list):
        fields["dense_blocks_key"], fields["sparse_step_key"] = "mlp_only_layers", "decoder_sparse_step"
    fields["numbers"] = tuple(k for k, v in values.items() if isinstance(v, list) and _are_numbers(k, v, count))
    fields["per_layer"] = tuple(k for k in fields["per_layer"] if k not in fields["numbers"])
    known = {*fields["per_layer"], *fields["numbers"], *(v for k, v in fields.items() if k.endswith("_key") and v)}
    fields["defaults"] = {
        **{k: values[k] for k in sorted(known) if values.get(k) is not None},
        **{k: v for k, v in lengths.items() if "." in k or section == ""},
    }
    fields["causal"] = _decodes(skeleton, part)
    fields["tie_default"] = bool(getattr(skeleton.config, "tie_word_embeddings", False))
    fields["eager"] = not getattr(skeleton.model, "_supports_sdpa", False)
    return fields


def _are_numbers(key: str, value: list[Any], count: int) -> bool:
    """Whether a list of a config holds numbers of blocks; the list of dense ones is known otherwise."""
    if key == "mlp_only_layers" or not value or not all(type(v) is int and 0 <= v < count for v in value):
        return False
    named = re.search(r"(idxs|indexes|indices|layer_ids|_layers)$", key) and "out_indices" not in key
    flags = len(value) == count and {*value} <= {0, 1} and count > 2
    return bool(named) and not flags and value == sorted(set(value))


def _by_block(key: str, value: list[Any], count: int) -> bool:
    """Whether a list of a config has one entry per block."""
    if not count or len(value) != count:
        return False
    if re.search(r"layer|block|pattern", key):
        return True
    return count > 4 and all(isinstance(v, (int, float, str, bool)) for v in value)


def _decodes(skeleton: Skeleton, part: Any) -> bool:
    """Whether a model decodes with a cache."""
    from transformers.models.auto import modeling_auto as tables

    if getattr(skeleton.config, "is_encoder_decoder", False):
        return False
    both = part.model_type in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both and not getattr(part, "is_decoder", False):
        return False
    causal = {*tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return part.model_type in causal or bool(skeleton.model.can_generate())


def cache_kind(spec: Spec, lists: Sequence[BlockList], fields: Mapping[str, Any]) -> str:
    """Kind of the blocks' cache: ``keys and values`` where every block has projections of just these widths; else empty."""
    heads, kv = (fields["defaults"].get(fields[key]) for key in ("heads_key", "kv_heads_key"))
    hidden = fields["defaults"].get(fields["hidden_key"])
    if not lists or not heads or not hidden or not fields["causal"]:
        return ""
    width = fields["defaults"].get(fields["head_dim_key"]) or hidden // heads
    groups, blocks = (kv or heads) * width, set[str]()
    start = f"{lists[0].path}."
    numbers = {name[len(start) :].partition(".")[0] for name in spec.tensors if name.startswith(start)}
    for tensor in spec.tensors.values():
        match = re.search(r"\.(?:k_proj|key|wk|k|qkv_proj|c_attn|query_key_value|qkv|Wqkv)\.weight$", tensor.name)
        if match and tensor.name.startswith(start) and len(tensor.shape) == 2:
            fused = heads * width + 2 * groups
            if not {groups, fused} & {*tensor.shape}:
                return ""
            blocks.add(tensor.name[len(start) :].partition(".")[0])
    return "keys and values" if blocks == numbers else ""
