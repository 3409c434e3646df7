"""Stock families whose blocks see everything or a sliding window, and how a Llama-like checkpoint becomes one of them.

Blocks of all these families compute what Llama's do. They differ in config fields, in biases, and in whether heads have sinks:
one logit per head in the denominator of the softmax, as in GPT-OSS. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compress.architectures.model_map import ModelBlock, model_map
from compress.errors import PassError
from compress.spec.spec import Spec, Tensor

FULL, SLIDING = "full_attention", "sliding_attention"
#: A sink that changes nothing: exp(-1e4) is zero, and a logit of minus infinity would give NaN.
NO_SINK = -1e4
#: Kinds of rotary positions that all families here compute alike.
_ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})
_KINDS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class WindowSource:
    """A family that converts to the targets here.

    Attributes:
        prefix: how names of its classes begin. defaults: config fields that it may leave out and whose default differs between
            families. theta: its default base of rotary positions. tokenizer_class: the class that its model type implies; None
            where it implies none.
    """

    prefix: str
    defaults: Mapping[str, Any]
    theta: float = 10_000.0
    tokenizer_class: str | None = None


@dataclass(frozen=True)
class WindowTarget:
    """A stock family to convert to.

    Attributes:
        model_type, prefix: model type, and how names of its classes begin. kinds: how they end.
        sinks: whether heads have a logit.
        biases: config field ▶ projections that have a bias when it is true; where a checkpoint lacks one, zeros are written.
        always: projections that always have a bias.
        even: whether the number of heads must divide the hidden size.
        no_positions: whether a block may have no rotary positions.
        settings: (config, head width, per block whether it has rotary positions) ▶ further config fields.
    """

    model_type: str
    prefix: str
    kinds: tuple[str, ...]
    settings: Callable[[Mapping[str, Any], int, Sequence[bool]], Mapping[str, Any]]
    sinks: bool = False
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    always: tuple[str, ...] = ()
    even: bool = False
    no_positions: bool = False


def _granite(config: Mapping[str, Any], head_dim: int, rotary: Sequence[bool]) -> dict[str, Any]:
    ones = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0)
    theta = config["rope_parameters"]["rope_theta"]
    return {
        **ones,
        "attention_multiplier": head_dim**-0.5,
        "layer_rope_theta": [theta if turned else 0 for turned in rotary],
    }


def _smollm3(config: Mapping[str, Any], head_dim: int, rotary: Sequence[bool]) -> dict[str, Any]:
    return {"use_sliding_window": True, "no_rope_layers": [int(turned) for turned in rotary]}


_BIASES = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
#: Targets by preference: the first that can express a model is the default.
TARGETS: tuple[WindowTarget, ...] = (
    WindowTarget(
        "granite_swa", "GraniteSWA", ("Model", "ForCausalLM"), _granite, sinks=True, biases=_BIASES, no_positions=True
    ),
    WindowTarget("ministral", "Ministral", _KINDS, lambda config, head_dim, rotary: {}),
    WindowTarget("smollm3", "SmolLM3", _KINDS, _smollm3, biases=_BIASES, no_positions=True),
    WindowTarget(
        "qwen2", "Qwen2", _KINDS, lambda config, head_dim, rotary: {"use_sliding_window": True}, always=_ATTENTION[:3]
    ),
    WindowTarget(
        "cwm",
        "Cwm",
        ("Model", "ForCausalLM"),
        lambda config, head_dim, rotary: {},
        biases={"mlp_bias": _MLP},
        even=True,
    ),
)

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MISTRAL = {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN2 = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SMOLLM3 = {
    **_LLAMA,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "pad_token_id": 128004,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": True,
}
#: Model type ▶ how it converts. Projections have the same names in all of them.
SOURCES: Mapping[str, WindowSource] = {
    "llama": WindowSource("Llama", _LLAMA),
    "mistral": WindowSource("Mistral", _MISTRAL),
    "ministral": WindowSource("Ministral", _MISTRAL),
    "qwen2": WindowSource("Qwen2", _QWEN2, tokenizer_class="Qwen2Tokenizer"),
    "smollm3": WindowSource("SmolLM3", _SMOLLM3, theta=2_000_000.0),
}


@dataclass(frozen=True)
class OwnWindows:
    """A family whose own class has full blocks and sliding ones.

    Attributes:
        switch: config fields without which it ignores its windows.
        by_kind: whether rotary positions may differ between full blocks and sliding ones (`rope_parameters` by kind).
        sinks: whether its heads have a logit.
    """

    switch: Mapping[str, Any] = field(default_factory=dict)
    by_kind: bool = False
    sinks: bool = False


_SWITCH = {"use_sliding_window": True}
#: Model type ▶ its windows. Cohere2 and EXAONE 4 are not here: there a block has rotary positions if and only if it slides.
OWN: Mapping[str, OwnWindows] = {
    "granite_swa": OwnWindows(sinks=True),
    "ministral": OwnWindows(),
    "cwm": OwnWindows(),
    "qwen2": OwnWindows(_SWITCH),
    "qwen3": OwnWindows(_SWITCH),
    "qwen2_moe": OwnWindows(_SWITCH),
    "smollm3": OwnWindows(_SWITCH),
    "gemma2": OwnWindows(),
    "gemma3_text": OwnWindows(by_kind=True),
    "olmo3": OwnWindows(by_kind=True),
}


def current_windows(spec: Spec) -> tuple[int | None, ...]:
    """Tokens that each block of a decoder sees, the token itself among them; None where it sees everything.

    Raises:
        PassError: the config names other kinds of attention, or not one for each block.
    """
    mapped = model_map(spec)
    kinds = mapped.per_layer.get("layer_types")
    if kinds is not None and (len(kinds) != mapped.depth or any(kind not in (FULL, SLIDING) for kind in kinds)):
        raise PassError("`layer_types` of the config does not say full or sliding attention for each block")
    window = mapped.record.window(mapped.config)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        return (None,) * mapped.depth
    if kinds is None:  # one window for all blocks
        return (window,) * mapped.depth
    return tuple(window if kind == SLIDING else None for kind in kinds)


def unlike_positions(spec: Spec) -> bool:
    """Whether full blocks have other rotary positions than sliding ones, so that no full block can become a sliding one."""
    config, own = spec.structure.config, OWN.get(spec.structure.model_type)
    if own is None or not own.by_kind:
        return False
    nested = config.get("rope_parameters")
    if isinstance(nested, dict) and (FULL in nested or SLIDING in nested):
        return bool(nested.get(FULL) != nested.get(SLIDING))
    # older configs: Gemma 3 has another base in its sliding blocks, and scaling is for full blocks alone
    return spec.structure.model_type == "gemma3_text" or bool(config.get("rope_scaling"))


def target_of(spec: Spec, *, sinks: bool, named: str | None) -> WindowTarget | None:
    """The family that a checkpoint becomes; None where it stays in its own.

    Args:
        sinks: whether heads get a logit. named: model type that the user asks for; None for the best.

    Raises:
        PassError: no such family can express the model.
    """
    here = spec.structure.model_type
    own = OWN.get(here)
    if own is not None and named in (None, here) and (own.sinks or not sinks):
        return None
    if spec.structure.auto_model is not None:
        raise PassError(
            "a model with code of its own cannot become another stock model", fix="set `sinks: 0`" * sinks or None
        )
    problems = []
    for target in TARGETS:
        if (
            named not in (None, target.model_type)
            or (sinks and not target.sinks)
            or (named is None and not sinks and target.sinks)
        ):
            continue
        if (problem := _obstacle(spec, target)) is None:
            return target
        problems.append(f"{target.model_type}: {problem}")
    if not problems and any(target.model_type == named for target in TARGETS):
        raise PassError(f"`{named}` has no logits of sinks", key="target", fix="set `sinks: 0`, or leave `target` out")
    if not problems:
        names = ", ".join(t.model_type for t in TARGETS if t.sinks or not sinks)
        raise PassError(f"there is no target `{named}`", key="target", fix=f"set one of {names}")
    alone = " with sinks" if sinks else ""
    raise PassError(
        f"no stock family can express this {here}{alone} ({problems[0]})",
        key="sinks" if sinks else "target",
        fix="set `sinks: 0`, and repair the loss by `distill`" if sinks and (own is not None or _open(spec)) else None,
    )


def _open(spec: Spec) -> bool:
    return any(not target.sinks and _obstacle(spec, target) is None for target in TARGETS)


def _obstacle(spec: Spec, target: WindowTarget) -> str | None:
    """Why a checkpoint cannot become a target; None where it can."""
    here, config = spec.structure.model_type, spec.structure.config
    source = SOURCES.get(here)
    if source is None:
        known = ", ".join(SOURCES)
        return f"only {known} convert to it"
    name = spec.structure.class_name or f"{source.prefix}Model"
    kind = name.removeprefix(source.prefix)
    if not name.startswith(source.prefix) or kind not in target.kinds:
        return f"it has no class like {name}"
    allowed = {m for modules in target.biases.values() for m in modules} | set(target.always)
    if bias := next((m for m in sorted(_biases(spec)) if m not in allowed), None):
        return f"its {bias} has no bias"
    rotary = _rotary(spec)
    if not all(rotary) and not target.no_positions:
        return "all of its blocks have rotary positions"
    parameters = rope_parameters(config, source.theta)
    if not isinstance(base := parameters["rope_theta"], (int, float)) or not base > 0:
        return f"the base of rotary positions is {base!r} here"
    if parameters["rope_type"] not in _ROPE_TYPES or parameters.get("partial_rotary_factor", 1) != 1:
        return f"it does not compute rotary positions of the kind {parameters['rope_type']}" + (
            " on a part of each head" if parameters.get("partial_rotary_factor", 1) != 1 else ""
        )
    mapped = model_map(spec)
    if target.even and mapped.hidden % mapped.heads:
        return "its number of heads divides the hidden size"
    if target.model_type == "cwm" and _value(config, source, "eos_token_id") is None:
        return "it needs an `eos_token_id`"
    return None


def _value(config: Mapping[str, Any], source: WindowSource, key: str) -> Any:
    return config[key] if key in config else source.defaults.get(key)


def _biases(spec: Spec) -> set[str]:
    """The projections of blocks that have a bias, by the last part of their names."""
    mapped = model_map(spec)
    return {m for m in (*_ATTENTION, *_MLP) if any(_bias_of(block, m) in block.tensors for block in mapped.blocks)}


def _bias_of(block: ModelBlock, module: str) -> str:
    """Name inside a block of a projection's bias; of two factors the second one has it."""
    path = f"{'mlp' if module in _MLP else 'self_attn'}.{module}"
    return f"{path}.up.bias" if f"{path}.up.weight" in block.tensors else f"{path}.bias"


def _rotary(spec: Spec) -> list[bool]:
    """By block, whether it has rotary positions."""
    mapped = model_map(spec)
    marks = mapped.per_layer.get("no_rope_layers")
    if marks is not None and len(marks) < mapped.depth:
        raise PassError(f"`no_rope_layers` of the config has {len(marks)} entries for {mapped.depth} blocks")
    return [True] * mapped.depth if marks is None else [bool(mark) for mark in marks[: mapped.depth]]


def rope_parameters(config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Rotary positions of a config in the form of transformers 5: one mapping, with base and kind.

    Args:
        theta: the family's default base.
    """
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    given.setdefault("rope_theta", config.get("rope_theta", theta))
    given.setdefault("rope_type", given.pop("type", "default"))
    if config.get("partial_rotary_factor") is not None:
        given.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return given


def windowed(
    spec: Spec, windows: Sequence[int | None], target: WindowTarget | None, *, values: bool = False
) -> tuple[Spec, dict[str, float]]:
    """The spec with those windows, in its own family or in a target.

    Args:
        windows: by block, tokens or None; one window at most. values: whether attention gets biases, for sinks' values.

    Returns:
        The spec, and the tensors that it has more than before ▶ the value that fills them: zero, or `NO_SINK` for sinks.
    """
    sizes = {window for window in windows if window is not None}
    assert len(sizes) == 1, sizes
    config = dict(spec.structure.config)
    kinds = [FULL if window is None else SLIDING for window in windows]
    if target is None:
        config |= {**OWN[spec.structure.model_type].switch, "layer_types": kinds, "sliding_window": sizes.pop()}
        config |= {"attention_bias": True} if values else {}
        return _with(spec, config, _added(spec, _ATTENTION * values, False))
    flags = {k: bool(_biases(spec).union(_ATTENTION * values) & set(m)) for k, m in target.biases.items()}
    config = {**_config(spec, target), **flags, "layer_types": kinds, "sliding_window": sizes.pop()}
    wanted = [*target.always, *(m for key, modules in target.biases.items() if flags[key] for m in modules)]
    return _with(spec, config, _added(spec, wanted, target.sinks))


def _with(spec: Spec, config: dict[str, Any], added: Sequence[tuple[Tensor, float]]) -> tuple[Spec, dict[str, float]]:
    """The spec with another config and more tensors, and what fills those."""
    tensors, structure = {**spec.tensors, **{t.name: t for t, _ in added}}, replace(spec.structure, config=config)
    return replace(spec, structure=structure, tensors=tensors), {t.name: value for t, value in added}


#: Fields of the sources that the targets lack, or that are written anew.
_REPLACED = (
    "rope_theta", "rope_scaling", "partial_rotary_factor", "pretraining_tp", "max_window_layers", "use_sliding_window",
    "no_rope_layers", "no_rope_layer_interval", "attention_bias", "mlp_bias",
)  # fmt: skip


def _config(spec: Spec, target: WindowTarget) -> dict[str, Any]:
    """The target's config but for windows and biases."""
    source, mapped = SOURCES[spec.structure.model_type], model_map(spec)
    name = spec.structure.class_name or f"{source.prefix}Model"
    given = {**source.defaults, **spec.structure.config}
    config = {
        **{key: value for key, value in given.items() if key not in _REPLACED},
        "model_type": target.model_type,
        "architectures": [target.prefix + name.removeprefix(source.prefix)],
        "head_dim": mapped.head_dim,
        "num_key_value_heads": mapped.kv_heads,
        "rope_parameters": rope_parameters(spec.structure.config, source.theta),
    }
    return {**config, **target.settings(config, mapped.head_dim, _rotary(spec))}


def _added(spec: Spec, biased: Sequence[str], sinks: bool) -> list[tuple[Tensor, float]]:
    """The tensors that a target has more, with the value that fills them."""
    mapped = model_map(spec)
    dtype = spec.tensors[str(mapped.embedding)].dtype
    sizes = {
        **dict.fromkeys((*_ATTENTION[1:3],), mapped.kv_heads * mapped.head_dim),
        "q_proj": mapped.heads * mapped.head_dim,
        **dict.fromkeys(_MLP, int(mapped.config.get("intermediate_size", 0))),
        **dict.fromkeys(("o_proj", "down_proj"), mapped.hidden),
    }
    added: list[tuple[Tensor, float]] = []
    for block in mapped.blocks:
        for module in biased:
            name = _bias_of(block, module)
            if name not in block.tensors:
                weight = block.tensors.get(f"{name.removesuffix('.bias')}.weight")
                size = sizes[module] if weight is None else weight.shape[0]  # MLPs may have widths of their own
                added.append((Tensor(block.path + name, (size,), dtype), 0.0))
        if sinks and "self_attn.sinks" not in block.tensors:
            added.append((Tensor(f"{block.path}self_attn.sinks", (mapped.heads,), dtype), NO_SINK))
    return added
