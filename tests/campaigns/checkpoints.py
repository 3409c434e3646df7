"""Damaged checkpoints: a pico model of some family or store, a few things in it broken, and a command or two on it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.campaigns import damage
from tests.campaigns.trial import Trial

WEIGHTS = "model.safetensors"
TEXT = "".join(
    f"the {w} of {v} and {w}{v} is 1{i} <|doc|>\n" for i, (w, v) in enumerate(zip("abcdefgh", "stuvwxyz", strict=True))
)
README = "---\nlicense: mit\nlanguage: en\ntags:\n- tiny\n---\n# A model\n\nText | more `code`.\n"
_TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
}
#: Keys of configs that code of transformers looks at, whatever the family.
CONFIG_HINTS: tuple[tuple[str, Any], ...] = (
    *((key, 10**9) for key in ("num_hidden_layers", "num_labels", "n_layer", "vocab_size", "num_local_experts", "max_position_embeddings", "num_experts")),
    *((key, 10**18) for key in ("intermediate_size", "hidden_size", "n_inner", "head_dim", "sliding_window")),
    *(
        (key, ...)
        for key in (
            "num_hidden_layers", "num_labels", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "architectures",
            "model_type", "dtype", "torch_dtype", "id2label", "label2id", "layer_types", "rope_scaling", "rope_parameters", "rope_theta", "tie_word_embeddings", "pad_token_id",
            "bos_token_id", "eos_token_id", "hidden_act", "quantization_config", "auto_map", "_attn_implementation", "attn_implementation", "experts_implementation", "problem_type",
            "is_decoder", "is_encoder_decoder", "pruned_heads", "chunk_size_feed_forward", "gradient_checkpointing", "text_config", "vision_config", "transformers_version", "edits", "base",
            "format", "max_length", "num_return_sequences", "use_cache", "output_attentions", "return_dict", "attention_dropout", "initializer_range", "layer_norm_eps", "rms_norm_eps",
            "sliding_window", "use_sliding_window", "max_window_layers", "mlp_only_layers", "decoder_sparse_step", "embedding_size", "type_vocab_size", "position_embedding_type",
        )
    ),
    ("_attn_implementation", "flash_attention_2"), ("attn_implementation", "sdpa"), ("architectures", ["TrainingArguments"]), ("architectures", ["AutoModel"]), ("architectures", ["set_seed"]), ("architectures", ["__version__"]),
    ("architectures", ["BertModel"]), ("architectures", ["MambaForCausalLM"]), ("architectures", [3]), ("architectures", "LlamaForCausalLM"), ("architectures", []), ("architectures", {"0": "x"}),
    ("model_type", "mamba"), ("model_type", "t5"), ("model_type", "bert"), ("model_type", "compress"), ("model_type", "clip"), ("model_type", "encoder-decoder"), ("model_type", "timm_wrapper"), ("model_type", "gpt2"),
    ("dtype", "float8_e4m3fn"), ("dtype", "int8"), ("dtype", "float64"), ("torch_dtype", "bfloat16"), ("num_labels", 7), ("id2label", {"0": "a", "5": "b"}), ("id2label", {"x": "a"}), ("hidden_act", "nonsense"), ("tie_word_embeddings", True), ("tie_word_embeddings", False),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}), ("quantization_config", {"quant_method": "compressed-tensors"}), ("quantization_config", {"quant_method": "compressed-tensors", "config_groups": [1]}),
    ("quantization_config", {"quant_method": "fp8"}), ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}), ("quantization_config", "x"), ("quantization_config", [1]), ("quantization_config", 3),
    ("rope_scaling", {"type": "yarn"}), ("rope_scaling", {"rope_type": "nonsense"}), ("rope_parameters", {"rope_type": "llama3", "factor": "x"}), ("auto_map", {"AutoConfig": "evil--x.Y"}),
)  # fmt: skip
GENERATION_HINTS: tuple[tuple[str, Any], ...] = tuple(
    (key, ...) for key in ("temperature", "top_k", "top_p", "max_length", "eos_token_id", "do_sample", "num_beams", "cache_implementation", "watermarking_config", "compile_config", "stop_strings", "bad_words_ids")
)  # fmt: skip
TOKENIZER_HINTS: tuple[tuple[str, Any], ...] = (
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}), ("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 1000}), ("truncation", {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}), ("padding", ...), ("model", ...), ("added_tokens", ...), ("model", {"type": "WordLevel", "vocab": {}, "unk_token": "x"}),
    ("chat_template", ...), ("chat_template", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), ("chat_template", "{{ raise_exception('no') }}"), ("chat_template", "{{ messages[99].content }}"), ("chat_template", "{% if %}"), ("chat_template", {"default": 3}),
    ("chat_template", "{{ 'x' * 10**10 }}"), ("chat_template", "{{ 9 ** 9 ** 9 }}"), ("chat_template", "{{ '%999999999d' % 1 }}"), ("chat_template", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"), ("chat_template", [{"name": "default", "template": "{{ messages }}"}]),
    ("tokenizer_class", ...), ("tokenizer_class", "LlamaTokenizer"), ("tokenizer_class", "T5Tokenizer"), ("tokenizer_class", "set_seed"), ("model_max_length", ...), ("bos_token", ...), ("eos_token", ...), ("auto_map", ...), ("added_tokens_decoder", ...), ("extra_special_tokens", ...),
    ("padding_side", ...), ("truncation_side", ...), ("clean_up_tokenization_spaces", ...), ("vocab_size", ...), ("backend", ...),
)  # fmt: skip
_HINTS: dict[str, tuple[tuple[str, Any], ...]] = {
    "config.json": CONFIG_HINTS,
    "generation_config.json": GENERATION_HINTS,
    "tokenizer.json": TOKENIZER_HINTS,
    "tokenizer_config.json": TOKENIZER_HINTS,
}
#: Pico models by family; families without a record of ours among them.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_TINY, "num_key_value_heads": 1}),
    "wide": ("llama", {**_TINY, "hidden_size": 32, "head_dim": 16, "num_key_value_heads": 1, "dtype": torch.bfloat16}),
    "sharded": ("llama", {**_TINY, "num_key_value_heads": 1, "max_shard_size": "8KB"}),
    "qwen3_moe": ("qwen3_moe", {**_TINY, "num_key_value_heads": 1, "num_experts": 2, "moe_intermediate_size": 8, "mlp_only_layers": []}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32}),
    "bert": ("bert", {k: v for k, v in _TINY.items() if k != "head_dim"}),
    "classifier": ("bert", {**{k: v for k, v in _TINY.items() if k != "head_dim"}, "class_name": "BertForSequenceClassification", "num_labels": 3}),
    "encoder": ("bert", {**{k: v for k, v in _TINY.items() if k != "head_dim"}, "class_name": "BertModel"}),
    "t5": ("t5", {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "num_decoder_layers": 2}),
    "vit": ("vit", {k: v for k, v in _TINY.items() if k != "head_dim"}),
}  # fmt: skip
#: What sentence-transformers puts beside the encoder.
_SENTENCES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    },
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
}
#: Families without a record, built from configs of their own.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaForCausalLM", {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "expand": 1, "time_step_rank": 2, "pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}),
}  # fmt: skip
#: What `compress` makes of the pico Llama: pass, settings, store.
MADE: dict[str, tuple[str, dict[str, Any], str]] = {
    "masked": ("prune_unstructured", {"method": "magnitude", "sparsity": 0.6}, "compact"),
    "int4": ("cast", {"weights": "int4", "group_size": 8, "method": "rtn"}, "stock"),
    "int8": ("cast", {"weights": "int8", "method": "rtn", "activations": "int8"}, "stock"),
    "fp8": ("cast", {"weights": "fp8", "method": "rtn", "kv_cache": "fp8"}, "stock"),
    "nvfp4": ("cast", {"weights": "nvfp4", "method": "rtn"}, "stock"),
    "mxfp4": ("cast", {"weights": "mxfp4", "method": "rtn"}, "stock"),
    "asymmetric": ("cast", {"weights": "int4", "group_size": 8, "method": "rtn", "symmetric": False}, "compact"),
}


def prepare(folder: Path) -> None:
    """Write every sound checkpoint that cases begin with, and the texts that commands read."""
    import transformers
    from PIL import Image

    from compress import api
    from tests import pico

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    (folder / "text.txt").write_text(TEXT)
    (folder / "calibration.txt").write_text(TEXT.upper())
    lines = [line.strip() for line in TEXT.split("<|doc|>") if line.strip()]
    rows = ["text\tlabel", *(f"{line}\t{number % 3}" for number, line in enumerate(lines[:6]))]
    (folder / "rows.tsv").write_text("\n".join(rows) + "\n")
    (folder / "chats.jsonl").write_text(
        json.dumps({"text": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hi"}]})
        + "\n"
    )
    bases = folder / "bases"
    for name, (family, changes) in STOCK.items():
        pico.save(bases / name, family, **changes)
    for name, (class_name, values) in OTHERS.items():
        config = transformers.AutoConfig.for_model(name, **values)
        torch.manual_seed(0)
        getattr(transformers, class_name)(config).save_pretrained(bases / name)
        pico.tokenizer().save_pretrained(bases / name)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(bases / "vit")
    for number in range(3):
        (folder / f"images/LABEL_{number}").mkdir(parents=True)
        Image.new("RGB", (20, 20), (80 * number, 40, 200)).save(folder / f"images/LABEL_{number}/x.png")
    for name, value in _SENTENCES.items():
        (bases / "encoder" / name).parent.mkdir(exist_ok=True)
        (bases / "encoder" / name).write_text(json.dumps(value))
    for name, (pass_name, settings, store) in MADE.items():
        api.apply(pass_name, bases / ("wide" if "fp4" in name else "llama"), bases / name, store=store, **settings)
    _structured(bases)
    for base in bases.iterdir():
        (base / "README.md").write_text(README)
        if (base / "tokenizer_config.json").exists():
            tokens = json.loads((base / "tokenizer_config.json").read_text())
            tokens["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            (base / "tokenizer_config.json").write_text(json.dumps(tokens))


def _structured(bases: Path) -> None:
    """Checkpoints with changes of structure: factors, projections, shared blocks with residuals, a codebook."""
    from compress import api

    ids = torch.randint(1, 250, (8, 16), generator=torch.Generator().manual_seed(0))
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "factors": ("factorize", {"rank": 4, "reconstruction_epochs": 0}),
        "projected": ("share", {"embeddings": "factorize", "embedding_rank": 8}),
        "shared": ("share", {"groups": [[0, 1]], "residual_rank": 2}),
        "codebook": ("share", {"codebook_bits": 4}),
    }
    for name, (pass_name, settings) in wanted.items():
        api.apply(pass_name, bases / "llama", bases / name, store="compact", data=ids, samples=8, length=16, **settings)


#: File ▶ how often it is damaged, and the damage; patterns of names.
_TARGETS: dict[str, float] = {
    "config.json": 6, "model*.safetensors": 6, "generation_config.json": 1.5, "tokenizer.json": 1, "tokenizer_config.json": 1.5, "README.md": 1.5,
    "model.safetensors.index.json": 6, "preprocessor_config.json": 4, "chat_template.jinja": 1,
    "modules.json": 2, "1_Pooling/config.json": 2, "sentence_bert_config.json": 2,
}  # fmt: skip


def break_some(rng: random.Random, folder: Path) -> list[str]:
    """Damage one to three files of a checkpoint; says which, and how."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        if rng.random() < 0.04:
            done.append(_add_file(rng, folder))
            continue
        found = [
            (path, weight)
            for pattern, weight in _TARGETS.items()
            for path in sorted(folder.glob(pattern))
            if path.is_file() and not path.is_symlink()
        ]
        if not found:
            break
        path = rng.choices([p for p, _ in found], [w for _, w in found])[0]
        if rng.random() < 0.04:
            damage.damage_place(rng, path)
            done.append(f"{path.name}: place")
            continue
        data = path.read_bytes()
        try:
            path.write_bytes(_damaged(rng, path.name, data))
        except (
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            RecursionError,
        ):  # it was damaged before, and is no longer what that damage needs
            path.write_bytes(damage.damage_bytes(rng, data))
        done.append(path.name)
    return done


def _damaged(rng: random.Random, name: str, data: bytes) -> bytes:
    if name.endswith(".safetensors"):
        return damage.damage_tensors(rng, data)
    if name == "README.md":
        return damage.damage_front(rng, data)
    if rng.random() < 0.12 or not name.endswith(".json"):
        return damage.damage_bytes(rng, data)
    return damage.damage_json(rng, data, _HINTS.get(name, ()))


def _add_file(rng: random.Random, folder: Path) -> str:
    name, data = rng.choice(
        (
            ("pytorch_model.bin", b"\x80\x04."), ("adapter_config.json", b"{}"), ("chat_template.jinja", b"{% for m in messages %}{{ m }}{% endfor %}"), ("chat_template.jinja", b"{% for"),
            ("special_tokens_map.json", b'{"eos_token": 3}'), ("added_tokens.json", b"[]"), ("modules.json", b'[{"path": "../x"}]'), ("1_Pooling/config.json", b"{}"), ("sentence_bert_config.json", b"[1]"),
            ("vocab.json", b"{}"), ("merges.txt", b"a"), ("vocab.txt", b""), ("tokenizer.model", b"x"), ("model.safetensors.index.json", b"{}"), ("model.safetensors", b""), ("processor_config.json", b"3"),
            ("x\x1b[31m.txt", b""), ("compress.json", b"[]"), ("modeling_compress.py", b"raise SystemExit(7)"), ("custom_generate/generate.py", b"raise SystemExit(7)"), ("additional_chat_templates/x.jinja", b"{{"),
        )
    )  # fmt: skip
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if not (folder / name).is_dir():
        (folder / name).write_bytes(data)
    return f"added {name!r}"


_PASSES: tuple[dict[str, Any], ...] = (
    {"cast": {"weights": "fp16"}},
    {"cast": {"weights": "int8", "method": "rtn"}},
    {"prune_unstructured": {"method": "magnitude", "sparsity": 0.5}},
    {"prune_structured": {"layers": 1, "compensation": "none"}},
)


def case(trial: Trial) -> None:
    """Damage a checkpoint, and run one command on it that reads headers, or now and then one that builds the model."""
    rng = trial.rng
    base = rng.choice(sorted(p.name for p in (trial.sound / "bases").iterdir()))
    folder = trial.work / "model"
    shutil.copytree(trial.sound / "bases" / base, folder)
    trial.notes.append(f"{base}: {', '.join(break_some(rng, folder))}")
    weights = {
        name: weight * (3 if name == "eval" and base in ("vit", "encoder") else 1)
        for name, (_, weight) in _OPERATIONS.items()
    }
    operation = rng.choices(list(weights), list(weights.values()))[0]
    _OPERATIONS[operation][0](trial, folder, base)


def _inspect(trial: Trial, folder: Path, base: str) -> None:
    options = trial.rng.choice(((), ("--tensors",), ("--json",), ("--zeros",)))
    trial.run("inspect", str(folder), *options, keep=[folder], one_line=True)


def _diff(trial: Trial, folder: Path, base: str) -> None:
    pair = [str(trial.sound / "bases" / base), str(folder)]
    trial.rng.shuffle(pair)
    trial.run("diff", *pair, *trial.rng.choice(((), ("--headers",), ("--json",))), keep=[folder], one_line=True)


def _check(trial: Trial, folder: Path, base: str) -> None:
    recipe = _recipe(trial, folder)
    trial.run(
        trial.rng.choice(("check", "check", "plan")),
        str(recipe),
        *trial.rng.choice(((), (), ("--json",))),
        keep=[folder],
    )


def _run(trial: Trial, folder: Path, base: str) -> None:
    recipe = _recipe(trial, folder)
    done = trial.run(
        "run",
        str(recipe),
        "-q",
        *trial.rng.choice(((), ("--json",))),
        allowed=(0, 1, 2, 3) if "gates" in recipe.read_text() else (0, 2),
        keep=[folder],
    )
    if done.status == 0 and trial.rng.random() < 0.2:
        trial.run("run", str(recipe), "-q", keep=[folder, trial.work / "out"])
    if done.status == 2 and (trial.work / "out").exists():
        trial.failures.append("run ended with 2 and left an output")


def _recipe(trial: Trial, folder: Path) -> Path:
    rng = trial.rng
    recipe: dict[str, Any] = {
        "model": str(folder),
        "output": str(trial.work / "out"),
        "passes": [rng.choice(_PASSES)],
        "store": rng.choice(("stock", "compact")),
        "evaluate": [],
    }
    if rng.random() < 0.4:
        recipe |= {
            "document_separator": "<|doc|>",
            "data": {"evaluation": {"files": [str(trial.sound / "text.txt")], "window": 32, "max_documents": 2}},
            "evaluate": ["bits_per_byte"],
        }
        if rng.random() < 0.5:
            recipe["gates"] = {"size": {"max_ratio": 2.0}, "bits_per_byte": {"max_increase": "500%"}}
    if rng.random() < 0.2:
        recipe["passes"] = [{"prune_structured": {"layers": 1, "compensation": "none"}}, {"cast": {"weights": "bf16"}}]
    if any("prune_structured" in step for step in recipe["passes"]):
        recipe.setdefault("data", {})["calibration"] = {
            "files": [str(trial.sound / "calibration.txt")],
            "samples": 2,
            "length": 8,
        }
        recipe["document_separator"] = "<|doc|>"
    path = trial.work / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def _eval(trial: Trial, folder: Path, base: str) -> None:
    rng, data = trial.rng, trial.sound / ("text.txt" if trial.rng.random() < 0.6 else "chats.jsonl")
    options = ["--data", str(data), "--separator", "<|doc|>", "--window", "32", "--max-documents", "2"]
    if base == "classifier":
        options = ["--data", str(trial.sound / "rows.tsv"), "--text", "text", "--label", "label"]
    elif base == "vit":
        options = ["--data", str(trial.sound / "images")]
    if rng.random() < 0.3 or base == "encoder":
        options += ["--baseline", str(trial.sound / "bases" / base)]
    trial.run("eval", str(folder), *options, "-q", keep=[folder], one_line=True)


def _gate(trial: Trial, folder: Path, base: str) -> None:
    pair = [str(trial.sound / "bases" / base), str(folder)]
    trial.run(
        "gate",
        pair[0],
        "--baseline",
        pair[1],
        "--gate",
        "size.max_ratio=2",
        "-q",
        allowed=(0, 1, 2, 3),
        keep=[folder],
        one_line=True,
    )


def _unpack(trial: Trial, folder: Path, base: str) -> None:
    out = trial.work / "dense"
    done = trial.run("unpack", str(folder), str(out), "-q", keep=[folder], one_line=True)
    if done.status != 0 and out.exists():
        trial.failures.append(f"unpack ended with {done.status} and left an output")
    if done.status == 0 and trial.rng.random() < 0.3:
        trial.run("inspect", str(out))


#: Operation ▶ function, weight. Those that build no model come often.
_OPERATIONS: dict[str, Any] = {
    "inspect": (_inspect, 40), "diff": (_diff, 10), "check": (_check, 20), "eval": (_eval, 9), "gate": (_gate, 3), "unpack": (_unpack, 10), "run": (_run, 8),
}  # fmt: skip
