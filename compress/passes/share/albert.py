"""A BERT whose neighbouring blocks share all tensors is an ALBERT, which stock transformers loads (arXiv 1909.11942)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.sidecars import safe_file
from compress.spec.spec import Spec, Tensor

if TYPE_CHECKING:
    from compress.checkpoint.open import Checkpoint

#: Beginning of a class's name here ▶ there, for the classes that compute the same.
_CLASSES = {
    f"Bert{kind}": f"Albert{kind}"
    for kind in (
        "Model",
        "ForMaskedLM",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForMultipleChoice",
    )
}
_BLOCK = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention.LayerNorm",
    "intermediate.dense": "ffn",
    "output.dense": "ffn_output",
    "output.LayerNorm": "full_layer_layer_norm",
}
_OUTSIDE = (
    (r"^bert\.", "albert."),
    (r"\bpooler\.dense\.", "pooler."),
    (r"^cls\.predictions\.transform\.", "predictions."),
    (r"^cls\.predictions\.", "predictions."),
)
#: Config fields that an ALBERT has too, by the same name.
_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "max_position_embeddings", "type_vocab_size", "initializer_range", "layer_norm_eps", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label",
    "label2id", "problem_type", "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip
#: What a BERT's config means where it does not say it, and an ALBERT's means otherwise.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
#: What stands between embeddings and blocks there, and does nothing.
_IDENTITY = "encoder.embedding_hidden_mapping_in"


def becomes_albert(spec: Spec, groups: Sequence[Sequence[int]], everything: bool, rank: int) -> bool:
    """Whether the blocks of a BERT, sharing so, are those of an ALBERT: all in equal runs, with all their tensors."""
    config = spec.structure.config
    if spec.structure.model_type != "bert" or not everything or rank or config.get("is_decoder"):
        return False
    size = len(groups[0])
    runs = [list(range(i * size, (i + 1) * size)) for i in range(len(groups))]
    whole = len(groups) * size == int(config["num_hidden_layers"])
    absolute = config.get("position_embedding_type", "absolute") == "absolute"
    return [list(g) for g in groups] == runs and whole and absolute and spec.structure.class_name in _CLASSES


def as_albert(checkpoint: Checkpoint, groups: int) -> Checkpoint:
    """The ALBERT that computes what a BERT does whose tensors are shared in so many runs of blocks."""
    import torch

    from compress.checkpoint.open import Derived, Value, torch_dtype

    spec, sources = albert_spec(checkpoint.spec, groups)

    def read(name: str) -> Value:
        if name in sources:
            return checkpoint.tensor(sources[name])
        tensor = spec.tensors[name]
        dtype = torch_dtype(tensor.dtype)
        return Value(
            torch.eye(tensor.shape[0], dtype=dtype)
            if len(tensor.shape) == 2
            else torch.zeros(tensor.shape, dtype=dtype)
        )

    result = Derived(checkpoint, spec, read)
    result.rewritten = {**checkpoint.rewritten, **_tokenizer(checkpoint)}
    return result


def albert_spec(spec: Spec, groups: int) -> tuple[Spec, dict[str, str]]:
    """The spec as an ALBERT's, and where each of its tensors comes from but the two that do nothing."""
    config = spec.structure.config
    base = "bert." if any(name.startswith("bert.") for name in spec.tensors) else ""
    size = int(config["num_hidden_layers"]) // groups
    tensors: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    new_base = "albert." if base else ""
    for name, tensor in spec.tensors.items():
        rest = name.removeprefix(f"{base}encoder.layer.")
        if rest != name:
            number, _, inside = rest.partition(".")
            if int(number) % size:
                continue
            module, _, last = inside.rpartition(".")
            new = f"{new_base}encoder.albert_layer_groups.{int(number) // size}.albert_layers.0.{_BLOCK[module]}.{last}"
        else:
            new = name
            for pattern, replacement in _OUTSIDE:
                new = re.sub(pattern, replacement, new)
        tensors[new], sources[new] = replace(tensor, name=new), name
    aliases = {old: new for new, old in sources.items()}
    for name, tensor in tensors.items():
        if tensor.alias_of is not None:
            tensors[name] = replace(tensor, alias_of=aliases[tensor.alias_of])
    width = int(config["hidden_size"])
    like = tensors[f"{new_base}embeddings.word_embeddings.weight"]
    for part, shape in (("weight", (width, width)), ("bias", (width,))):
        name = f"{new_base}{_IDENTITY}.{part}"
        tensors[name] = Tensor(name, shape, like.dtype)
    dropout = config.get("classifier_dropout")
    new_config = {
        **_DEFAULTS,
        **{key: config[key] for key in _FIELDS if key in config},
        "model_type": "albert",
        "architectures": [_CLASSES[str(spec.structure.class_name)]],
        "embedding_size": width,
        "num_hidden_groups": groups,
        "inner_group_num": 1,
        "classifier_dropout_prob": config.get("hidden_dropout_prob", 0.1) if dropout is None else dropout,
    }
    return replace(spec, structure=replace(spec.structure, config=new_config, edits=()), tensors=tensors), sources


def _tokenizer(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The tokenizer's config with its class, which the type of the model no longer tells."""
    folder = checkpoint.folder
    if folder is None or not any(safe_file(folder, name).exists() for name in ("tokenizer.json", "vocab.txt")):
        return {}
    path = safe_file(folder, "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config.setdefault("tokenizer_class", "BertTokenizer")
    return {"tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
