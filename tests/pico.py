"""Pico models of every family with a record, built from configs, with random weights and a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 300
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 16},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bert": ("BertForMaskedLM", {}),
}


def config(family: str, **changes: Any) -> Any:
    """A config of 4 blocks of width 32."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None if family != "bert" else 0,
    }
    if family == "gpt2":
        sizes = {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 64, "bos_token_id": 0, "eos_token_id": 0,
        }  # fmt: skip
    if family == "opt":
        sizes["pad_token_id"] = 1
    return transformers.AutoConfig.for_model(family, **{**sizes, **FAMILIES[family][1], **changes})


def model(family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model of the family; weights large enough that removing one shows."""
    torch.manual_seed(seed)
    built = getattr(transformers, FAMILIES[family][0])(config(family, **changes))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    built.tie_weights()
    return built.to(dtype).eval()


def tokenizer() -> Any:
    """Byte-level BPE without merges beyond the alphabet: 257 tokens, <|endoftext|> first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def save(
    folder: Path, family: str = "llama", *, max_shard_size: str = "5GB", with_tokenizer: bool = True, **changes: Any
) -> Path:
    """Write a pico checkpoint with stock transformers."""
    built = model(family, **changes)
    built.save_pretrained(folder, max_shard_size=max_shard_size)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def logits(loaded: Any, length: int = 12) -> torch.Tensor:
    """Outputs for fixed token ids, [1, length, …]."""
    ids = (torch.arange(length) * 7 % 250)[None]
    with torch.no_grad():
        return loaded(input_ids=ids)[0]
