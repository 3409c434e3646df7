"""One record per model family, as transformers 5 names things. To add a family, add a record."""

from __future__ import annotations

from typing import Any

from compress.architectures.record import Architecture

_LLAMA_LIKE: dict[str, Any] = {
    "prefix": "model",
    "blocks": "layers",
    "embeddings": ("embed_tokens",),
    "kv_heads_key": "num_key_value_heads",
    "head_dim_key": "head_dim",
}

RECORDS: tuple[Architecture, ...] = (
    Architecture("llama", **_LLAMA_LIKE),
    Architecture("mistral", **_LLAMA_LIKE),
    Architecture("qwen2", **_LLAMA_LIKE, per_layer=("layer_types",)),
    Architecture("qwen3", **_LLAMA_LIKE, per_layer=("layer_types",)),
    Architecture(
        "gpt2",
        prefix="transformer",
        blocks="h",
        embeddings=("wte", "wpe"),
        depth_key="n_layer",
        hidden_key="n_embd",
        heads_key="n_head",
        input_axis=0,
        tie_default=True,
    ),
    Architecture(
        "gpt_neox",
        prefix="gpt_neox",
        blocks="layers",
        embeddings=("embed_in",),
        head="embed_out",
        head_tie="embed_out.weight",
    ),
    Architecture(
        "opt", prefix="model.decoder", blocks="layers", embeddings=("embed_tokens", "embed_positions"), tie_default=True
    ),
    Architecture(
        "bert",
        prefix="bert",
        blocks="encoder.layer",
        embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings"),
        head="cls.predictions.decoder",
        head_tie="cls.predictions.decoder.weight",
        causal=False,
        tie_default=True,
    ),
)
