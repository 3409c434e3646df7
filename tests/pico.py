"""Pico models of every family with a record, built from configs, with random weights and a byte-level tokenizer."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

VOCABULARY = 300
#: Where `folder` keeps what it has written; set by the session's fixture.
CACHE = Path(tempfile.gettempdir()) / "pico-cache"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 6},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": ("Phi3ForCausalLM", {"num_key_value_heads": 2}),
    "mixtral": ("MixtralForCausalLM", {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [2],
        },
    ),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        {
            "q_lora_rank": 24,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "scale_emb": 2,
            "dim_model_base": 16,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "q_lora_rank": None,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "num_nextn_predict_layers": 0,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {}),
    "bloom": ("BloomForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bert": ("BertForMaskedLM", {}),
    "albert": ("AlbertForMaskedLM", {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 1}),
    "roberta": ("RobertaForMaskedLM", {}),
    "electra": ("ElectraForMaskedLM", {"embedding_size": 16}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "t5": (
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3, "decoder_start_token_id": 0},
    ),
    "vit": ("ViTForImageClassification", {"image_size": 16, "patch_size": 4, "num_labels": 5}),
}
#: Families whose blocks are like others' in `FAMILIES`. Their own tests build them; no matrix of families has them.
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral": ("MinistralForCausalLM", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": None}),
    "granite_swa": (
        "GraniteSWAForCausalLM",
        {"num_key_value_heads": 2, "sliding_window": 6, "attention_multiplier": 0.35},
    ),
    "cwm": ("CwmForCausalLM", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}),
    "smollm3": ("SmolLM3ForCausalLM", {"num_key_value_heads": 2}),
    "olmoe": ("OlmoeForCausalLM", {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmo3": ("Olmo3ForCausalLM", {"num_key_value_heads": 2, "sliding_window": 6}),
    # without a written record; their files hold all experts in one tensor, [E, I, O] (Granite MoE: [E, O, I])
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "sliding_window": 6,
        },
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 1,
        },
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        {
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
        },
    ),
}
#: Families with one list of blocks, which sweeps follow and of which some can go by number.
ONE_LIST = [family for family in FAMILIES if family not in ("t5", "albert")]
#: Families with sizes of their own: all others take the ones in `config`.
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 64},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "t5": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 4, "num_heads": 4},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 4, "n_heads": 4, "max_position_embeddings": 64},
}
#: One of each kind of block. What differs among the other families is their records, which tests of records and of exactness hold.
TIER = ("llama", "gemma3_text", "phi3", "gpt2", "gpt_neox", "bloom", "qwen3_moe", "bert", "t5", "vit")
PADDING = {"opt": 1, "albert": 0, "bert": 0, "roberta": 0, "electra": 0, "distilbert": 0, "t5": 0}


def families(names: Iterable[str] = FAMILIES, *, tier: Iterable[str] = TIER) -> list[Any]:
    """For `parametrize`: families outside the tier are slow, so that `make test-all` alone runs them."""
    return [name if name in tier else pytest.param(name, marks=pytest.mark.slow) for name in names]


def known(family: str) -> tuple[str, dict[str, Any]]:
    """Class and config fields of a family."""
    return FAMILIES[family] if family in FAMILIES else FURTHER[family]


def config(family: str, **changes: Any) -> Any:
    """A config of 4 blocks of width 32."""
    widths = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": PADDING.get(family),
        **SIZES.get(family, widths),
    }
    if family == "vit":
        sizes = {key: value for key, value in widths.items() if key != "max_position_embeddings"}
    return transformers.AutoConfig.for_model(family, **{**sizes, **known(family)[1], **changes})


def model(
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    class_name: str | None = None,
    **changes: Any,
) -> Any:
    """A random model of the family, of its class here or another one; weights large enough that removing one shows."""
    torch.manual_seed(seed)
    built = getattr(transformers, class_name or known(family)[0])(config(family, **changes))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    built.tie_weights()
    return built.to(dtype).eval()


def tokenizer(*, begins: bool = False) -> Any:
    """Byte-level BPE without merges beyond the alphabet: 257 tokens, <|endoftext|> first.

    ``begins``: token 257, <bos>, is put before every text, as Llama's and Gemma's tokenizers do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if begins:
        raw.add_special_tokens(["<bos>"])
        raw.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 257)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>" if begins else "<|endoftext|>", eos_token="<|endoftext|>"
    )


def folder(family: str = "llama", *, max_shard_size: str = "5GB", with_tokenizer: bool = True, **changes: Any) -> Path:
    """A pico checkpoint that is written once in a run of the tests; read only."""
    asked = repr((family, max_shard_size, with_tokenizer, sorted(changes.items())))
    place = CACHE / f"{family}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=CACHE))
        built = model(family, **changes)
        built.save_pretrained(made / "files", max_shard_size=max_shard_size)
        if with_tokenizer and built.main_input_name == "input_ids":
            tokenizer().save_pretrained(made / "files")
        torch.save(torch.get_rng_state(), made / "random.pt")
        try:
            made.rename(place)
        except OSError:  # another worker was faster
            shutil.rmtree(made)
    torch.set_rng_state(torch.load(place / "random.pt"))  # what is drawn next is as if the model had been built
    return place / "files"


def save(
    to: Path, family: str = "llama", *, max_shard_size: str = "5GB", with_tokenizer: bool = True, **changes: Any
) -> Path:
    """A pico checkpoint written by stock transformers, to be changed at will; where it is only read, `folder` is enough."""
    made = folder(family, max_shard_size=max_shard_size, with_tokenizer=with_tokenizer, **changes)
    shutil.copytree(made, to, dirs_exist_ok=True)
    return to


def save_cold(folder: Path, family: str = "qwen3_moe") -> Path:
    """A pico checkpoint with 8 experts in each block, of which the last 4 are never among a token's 2.

    The router's rows are v, -v, w, -w and zeros: two of the first four are positive for any token.
    """
    from safetensors.torch import load_file, save_file

    options = {"num_experts": 8, "mlp_only_layers": []} if family == "qwen3_moe" else {"num_local_experts": 8}
    save(folder, family, num_experts_per_tok=2, **options)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            v, w = torch.randn(2, 32, generator=generator)
            tensors[name] = torch.cat([torch.stack([v, -v, w, -w]), torch.zeros(4, 32)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def inputs(loaded: Any, length: int = 12) -> dict[str, torch.Tensor]:
    """Fixed arguments for a forward pass: token ids [1, length], of a second text too where the model reads two, or an image."""
    if loaded.main_input_name == "pixel_values":
        shape = (1, loaded.config.num_channels, loaded.config.image_size, loaded.config.image_size)
        return {"pixel_values": torch.linspace(-1, 1, math.prod(shape)).reshape(shape).sin()}
    ids = {"input_ids": (torch.arange(length) * 7 % 250)[None]}
    return {**ids, "decoder_input_ids": ids["input_ids"].flip(1)} if loaded.config.is_encoder_decoder else ids


def logits(loaded: Any, length: int = 12) -> torch.Tensor:
    """Outputs for those inputs, [1, length, …]."""
    with torch.no_grad():
        return loaded(**inputs(loaded, length))[0]


def save_expected(loaded: Any, path: Path) -> None:
    """Write ``(inputs, logits)`` for a process that cannot import this module."""
    torch.save((inputs(loaded), logits(loaded)), path)
