"""The attention function ``compress_local`` of transformers: windows by slices, sinks as logits, no mask of all pairs.

Stock models with windows compute the same with it as with transformers' own functions, whose masks grow with the square of
the tokens. `register` makes it known to transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.checkpoint.attention.patterns import LocalPattern, attention

# ---- attention: copied into the modelling file of compact checkpoints ----

#: Name in transformers' tables of attention functions and of mask functions.
LOCAL = "compress_local"
#: Arguments of attention functions that change no output.
_WITHOUT_EFFECT = frozenset(
    {
        "cache",
        "cache_position",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "past_key_values",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)


def register() -> None:
    """Register ``compress_local`` in transformers: the attention function and its mask function."""
    import transformers

    transformers.AttentionInterface.register(LOCAL, local_attention)
    transformers.AttentionMaskInterface.register(LOCAL, local_mask)


def local_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask for `local_attention`, by the arguments of transformers' mask functions.

    Returns:
        None where all keys are tokens. [B, k] booleans where some are padding. A mask of all pairs [B, 1, q, k] for what is not
        causal attention or a window: packed texts, chunks, images, static caches.
    """
    window = getattr(config, "sliding_window", None)
    plain = local_size is None or (local_size == window and getattr(config, "attention_chunk_size", None) is None)
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length  # not so in static caches
    if not plain or not allow_is_causal_skip or not aligned:
        from transformers.masking_utils import sdpa_mask

        sizes = {"q_length": q_length, "q_offset": q_offset, "kv_length": kv_length, "kv_offset": kv_offset}
        kwargs = {**kwargs, **sizes, "local_size": local_size, "allow_is_causal_skip": False}
        whole: torch.Tensor | None = sdpa_mask(attention_mask=attention_mask, **kwargs)
        return whole
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    return padding if torch.compiler.is_compiling() or not padding.all() else None


def local_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a transformers module, by the arguments of transformers' attention functions.

    Args:
        query: [B, H, q, D]. key, value: [B, G, k, D]. attention_mask: as `local_mask` gives it.
        s_aux: [H], logits of sinks. kwargs: ``sliding_window``, and what changes no output.

    Returns:
        [B, q, H, D], and None for the weights, which are never made.

    Raises:
        ValueError: dropout, or an argument that this function does not know.
    """
    window = _window(module, kwargs)
    for name, given in (("dropout", dropout), *kwargs.items()):
        if (
            name not in _WITHOUT_EFFECT
            and given is not None
            and given is not False
            and not (name == "dropout" and not given)
        ):
            raise ValueError(f"{LOCAL} does not compute {name}: load the model with attn_implementation='eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is not None and attention_mask.ndim == 4
    if s_aux is None and (whole or not causal):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, 0.0, scaling, is_causal=causal)
        return output, None
    if not causal:
        raise ValueError(f"{LOCAL} computes sinks for causal attention alone: use attn_implementation='eager'")
    output = attention(
        query,
        key,
        value,
        LocalPattern() if whole else LocalPattern(window=window),
        scale=scaling,
        logits=s_aux,
        padding=None if whole else attention_mask,
        mask=attention_mask if whole else None,
    )
    return output.transpose(1, 2), None


def _window(module: Any, kwargs: dict[str, Any]) -> int | None:
    """Window of the module's layer: what it passes, or has, or what the config says of its layer; None for all tokens."""
    window: int | None
    if "sliding_window" in kwargs:
        window = kwargs.pop("sliding_window")
    elif hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        window = _window_by_config(module)
    return window


def _window_by_config(module: Any) -> int | None:
    """Window of the module's layer as its config has it, for modules that know none themselves."""
    config = getattr(module, "config", None)
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or types is None or getattr(module, "layer_idx", None) is None:
        return window
    return window if types[module.layer_idx] == "sliding_attention" else None
