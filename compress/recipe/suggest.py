"""Suggestions for wrong keys and values: words of other tools, schemes such as W4A16, percentages, spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from compress import passes
from compress.passes.cast import schemes
from compress.passes.cast.settings import Format

_KEYS_SHOWN = 12


def _table(**words: str) -> dict[str, tuple[str, ...]]:
    """``right="wrong wrong"`` turned round; two right words are joined by ``__or__``."""
    return {wrong: tuple(right.split("__or__")) for right, wrongs in words.items() for wrong in wrongs.split()}


_OF_PASSES = _table(skip="ignore exclude modules_to_not_convert", only="targets include modules")
_OF_METRICS = _table(
    bits_per_byte="bpb bits_per_char bpc",
    perplexity="ppl",
    accuracy="acc",
    f1="macro_f1 f1_macro",
    kl="kl_divergence kl_div kld",
    agreement="top1 top_1 top1_agreement",
    similarity="cosine cosine_similarity",
)
_OF_FILES = _table(
    files="path file",
    dataset="datasets dataset_id",
    subset="dataset_config_name config_name",
    split="dataset_split",
    samples="num_samples num_calibration_samples nsamples",
    length="max_seq_length max_length sequence_length seq_len seqlen",
    field="column text_column",
)

#: Words of other tools by section ▶ the keys they mean here.
SYNONYMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "passes": passes.WORDS,
    "": _table(
        evaluate="metrics",
        model="checkpoint model_name model_id model_path",
        output="output_dir out",
        threads="num_threads",
        max_ram="max_memory",
        max_vram="max_gpu_memory",
        passes="modifiers pipeline stages steps",
        dtype="torch_dtype",
    ),
    "data": _table(training="train", calibration="calib calibrate", evaluation="eval valid validation test evaluate"),
    "data.training": {k: v for k, v in _OF_FILES.items() if v != ("samples",)},
    "data.calibration": _OF_FILES,
    "data.evaluation": _table(window="max_length", max_documents="limit", files="path file", dataset="datasets"),
    "evaluate": _OF_METRICS
    | _table(
        latency="speed time",
        throughput="tokens_per_second tok_s runtime",
        memory="ram peak_memory vram",
    ),
    "gates": _OF_METRICS
    | _table(
        prefill__or__decode="latency speed",
        memory="ram peak_memory vram",
        size="bytes disk",
        parameters="params num_parameters",
    ),
    "cast": _OF_PASSES
    | _table(
        weights="format precision dtype weight_format",
        weights__or__bits="num_bits wbits w_bits w_bit",
        group_size="groupsize q_group_size",
        symmetric="sym",
        activations="input_activations act_format",
        smoothing="smoothquant smoothing_strength",
        rotations="spinquant quarot hadamard transform_config",
        kv_cache="kv_cache_scheme kv_cache_dtype",
        method="algorithm",
    ),
    "prune_unstructured": _OF_PASSES
    | _table(sparsity="amount ratio sparsity_ratio", pattern="mask_structure n_m nm", method="algorithm"),
    "prune_structured": _OF_PASSES
    | _table(
        layers="blocks num_layers depth drop_layers",
        mlp="neurons ffn intermediate_size",
        heads="num_heads",
        kv_heads="num_key_value_heads",
        hidden="hidden_size channels",
        keep_parameters="ratio amount sparsity",
        multiple_of="round_to",
    ),
    "factorize": _OF_PASSES | _table(keep_parameters="ratio", rank="ranks"),
    "share": _OF_PASSES | _table(groups="num_groups", codebook_bits="bits num_bits"),
    "distill": _table(
        learning_rate="lr",
        epochs="num_train_epochs num_epochs",
        steps="max_steps num_steps",
        batch_size="train_batch_size global_batch_size",
        micro_batch_size="per_device_train_batch_size gradient_accumulation_steps",
        schedule="lr_scheduler_type scheduler lr_schedule",
        warmup_ratio="warmup_steps",
        losses="loss",
        ema_decay="ema",
        evaluate_every="eval_steps",
        autocast="bf16 fp16 mixed_precision",
        optimizer="optim",
        patience="early_stopping_patience",
        teacher="teacher_model",
    ),
}

#: Values of other tools by key ▶ the values they mean here.
VALUES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "device": _table(cuda="gpu nvidia"),
    "dtype": _table(bfloat16="bf16", float16="fp16 half", float32="fp32 float"),
    "weights": _table(
        bf16="bfloat16",
        fp16="float16 half",
        fp32="float32 float",
        fp8="e4m3 float8 fp8_e4m3 float8_e4m3fn",
        mxfp4__or__nvfp4="fp4",
    ),
    "evaluate": SYNONYMS["evaluate"],
    "method": _table(gptq="optq", rtn="round_to_nearest"),
    "rotations": _table(residual="r1", values="r2"),
    "error_correction": _table(asymmetric="gptaq", alternating="quantease", curvature="yaqa"),
    "importance": _table(obs="ziplm optimal_brain_surgeon", activation="minitron", magnitude="l1 l2"),
    "layer_importance": _table(block_influence="shortgpt bi", kl="perplexity ppl"),
    "optimizer": _table(adamw="adam adamw_torch"),
    "schedule": _table(wsd="warmup_stable_decay"),
}
#: Keys whose values are formats of weights.
_FORMATS = ("weights", "format", "formats", "overrides", "scheme", "precision")
#: ``q4_k_m``, ``IQ3_XS``: types of llama.cpp.
_GGUF = re.compile(r"i?q([2-8])_[0-9a-z_]+", re.IGNORECASE)


def choices(given: str, names: Sequence[str], section: str) -> str | None:
    """A hint for an unknown key: the one that was probably meant, and the keys there are if they are few or none is near."""
    if not names:
        return None
    meant, expected = meant_key(given, names, section), f"expected one of: {', '.join(names)}"
    if not meant:
        return expected
    if len(names) <= _KEYS_SHOWN:
        return f"{expected}; {_question(meant)}"
    return _question(meant) + (f" (all: `compress passes {section}`)" if section in passes.names() else "")


def meant_key(given: str, names: Sequence[str], section: str) -> tuple[str, ...]:
    """The keys of a section that an unknown one probably means, one or two; empty where none is near."""
    return _meant(given, SYNONYMS.get(section, {}), names)


def value_hint(key: str, given: Any, allowed: Sequence[str]) -> str | None:
    """A hint for a wrong value of a key; ``allowed`` are the values it takes, where they are words."""
    if key in _FORMATS and isinstance(given, str):
        named = schemes.find(given)
        if key in ("formats", "overrides") and (named is not None or given.lower() in allowed):
            return _question((given.lower() if named is None else schemes.SCHEMES[named].weights,))
        if (answer := scheme(given)) is not None:
            return answer
        if key == "scheme" and given in get_args(Format):
            return f"write `weights: {given}`"
    if key in _FORMATS:
        key = "weights"
        given = f"int{given}" if isinstance(given, int) and not isinstance(given, bool) else given
    word = str(given)
    if key == "pattern" and (match := re.fullmatch(r"(\d+):(\d+)", word)) and int(match[1]) > int(match[2]) > 0:
        return _question((f"{match[2]}:{match[1]}",))
    if key == "device" and (match := re.fullmatch(r"gpu(:\d+)", word, re.IGNORECASE)):
        return _question((f"cuda{match[1]}",))
    known = {w: m for w, m in VALUES.get(key, {}).items() if not allowed or {*m} <= {*allowed}}
    meant = _meant(word, known, allowed)
    return _question(meant) if meant else None


def scheme(name: str) -> str | None:
    """Hint for the name of a scheme, or of a type of llama.cpp; None for other names."""
    if (known := schemes.find(name)) is not None:
        return f"did you mean `scheme: {known}`?"
    if (refused := schemes.refusal(name)) is not None:
        return refused
    if match := _GGUF.fullmatch(name):
        bits = {"7": "6"}.get(match[1], match[1])
        return f"{name} is a type of llama.cpp, whose files are not written: the nearest is `weights: int{bits}`"
    return f"write `weights: {name.lower()}`" if re.fullmatch(r"INT[2-8]|[BF]P?F?16|FP32", name) else None


def percentage(value: Any) -> str | None:
    """A hint for a number that was probably meant as a percentage."""
    number = float(value) if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value) else value
    if isinstance(number, (int, float)) and not isinstance(number, bool) and 1 <= number <= 100:
        return _question((f"{str(value).strip()}%",))
    return None


def _meant(given: str, synonyms: Mapping[str, tuple[str, ...]], names: Sequence[str]) -> tuple[str, ...]:
    known = synonyms.get(given.lower())
    if known is not None:
        return known
    return tuple(difflib.get_close_matches(given, names, n=1))


def _question(meant: Sequence[str]) -> str:
    return f"did you mean {' or '.join(f'`{name}`' for name in meant)}?"
