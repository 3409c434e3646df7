"""A BERT whose neighbouring blocks share all tensors is an ALBERT (arXiv 1909.11942), which stock transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.architectures.conversions.shared_blocks import SharedBlocks


def _fits(config: Mapping[str, Any]) -> bool:
    return not config.get("is_decoder") and config.get("position_embedding_type", "absolute") == "absolute"


def _settings(config: Mapping[str, Any], groups: int) -> dict[str, Any]:
    dropout = config.get("classifier_dropout")
    return {
        "embedding_size": int(config["hidden_size"]),
        "num_hidden_groups": groups,
        "inner_group_num": 1,
        "classifier_dropout_prob": config.get("hidden_dropout_prob", 0.1) if dropout is None else dropout,
    }


ALBERT = SharedBlocks(
    source="bert",
    target="albert",
    classes=("Bert", "Albert"),
    kinds=(
        "Model",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForMultipleChoice",
    ),
    fits=_fits,
    inside="albert_layers.0",
    modules={
        "attention.self.query": "attention.query",
        "attention.self.key": "attention.key",
        "attention.self.value": "attention.value",
        "attention.output.dense": "attention.dense",
        "attention.output.LayerNorm": "attention.LayerNorm",
        "intermediate.dense": "ffn",
        "output.dense": "ffn_output",
        "output.LayerNorm": "full_layer_layer_norm",
    },
    outside=(
        (r"\bpooler\.dense\.", "pooler."),
        (r"^cls\.predictions\.transform\.", "predictions."),
        (r"^cls\.predictions\.", "predictions."),
    ),
    identities=("encoder.embedding_hidden_mapping_in",),
    fields=(
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label",
        "label2id", "problem_type", "dtype", "torch_dtype", "transformers_version",
    ),
    defaults={
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    settings=_settings,
    tokenizer_class="BertTokenizer",
)  # fmt: skip
