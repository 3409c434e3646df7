"""Stock families with latent attention (MLA), and how a Llama-like checkpoint becomes one of them. No torch here.

All query heads read one rotary key and one latent of the values (DeepSeek-V2, arXiv 2405.04434). Here the whole key is rotary
(``qk_nope_head_dim: 0``), with frequencies that the config lists (``longrope``). One more channel of the latent is constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.architectures.conversions.windows import SOURCES, current_windows, rope_parameters
from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.spec.spec import Spec, Tensor

#: Kinds of rotary positions whose frequencies do not depend on the length of the text.
_STATIC = frozenset({"default", "linear", "yarn", "llama3"})
_ATTENTION = "self_attn"


@dataclass(frozen=True)
class LatentTarget:
    """A stock family to convert to.

    Attributes:
        prefix: how names of its classes begin. kinds: how they end. settings: its config fields besides those of all targets.
        mlp_biases: whether projections of its MLPs may have a bias. even: whether heads must divide the hidden size.
    """

    prefix: str
    kinds: tuple[str, ...]
    settings: Mapping[str, Any]
    mlp_biases: bool
    even: bool


TARGETS: Mapping[str, LatentTarget] = {
    "minicpm3": LatentTarget(
        "MiniCPM3", ("ForCausalLM",), {"scale_emb": 1, "scale_depth": None, "dim_model_base": None}, True, True
    ),
    "deepseek_v3": LatentTarget(
        "DeepseekV3", ("ForCausalLM",), {"rope_interleave": False, "num_nextn_predict_layers": 0}, False, False
    ),
}


@dataclass(frozen=True)
class LatentShape:
    """Numbers that a block caches per token.

    Attributes:
        keys: of the rotary key, an even number. values: of the latent, without its constant channel.
    """

    keys: int
    values: int

    @property
    def cached(self) -> int:
        """All of them, with the constant channel."""
        return self.keys + self.values + 1


DEFAULT_TARGET = next(iter(TARGETS))


def check_latent(spec: Spec, target: str) -> None:
    """Raise `PassError` for a checkpoint that cannot become that target, in one line."""
    if (problem := _obstacle(spec, target)) is not None:
        what, key, fix = problem
        raise PassError(what, key=key, fix=fix)


def _obstacle(spec: Spec, target: str) -> tuple[str, str | None, str | None] | None:
    """The obstacle, the setting that it belongs to, and what to do; None where nothing stands in the way."""
    structure, there = spec.structure, TARGETS[target]
    source = SOURCES.get(structure.model_type)
    if structure.auto_model is not None:
        return "a model with code of its own cannot become another stock model", None, None
    if source is None:
        known = ", ".join(SOURCES)
        return f"{structure.model_type} cannot become a model with latent attention; {known} can", None, None
    kind = (structure.class_name or "Model").removeprefix(source.prefix)
    if kind not in there.kinds:
        return f"{there.prefix} has no class like {structure.class_name or 'a base model'}", None, None
    mapped = model_map(spec)
    if structure.edits:
        return "its blocks are edited, and latent attention has a stock class alone", None, "put it before such passes"
    if any(window is not None for window in current_windows(spec)):
        return "latent attention has no class with sliding windows, and this model has them", None, None
    if not all(mapped.per_layer.get("no_rope_layers") or [True]):
        return "some of its blocks have no rotary positions, and in latent attention all have the same", None, None
    parameters = rope_parameters(structure.config, source.theta)
    if parameters["rope_type"] not in _STATIC:
        return f"its rotary frequencies ({parameters['rope_type']}) depend on the length of the text", None, None
    if mapped.record.rotary_entries(mapped.config) != mapped.head_dim:
        return "its rotary positions turn a part of each head", None, None
    if not there.mlp_biases and any("mlp." in name and name.endswith(".bias") for name in spec.tensors):
        other = next(name for name, one in TARGETS.items() if one.mlp_biases)
        return f"the MLPs of {target} have no biases", "target", f"set `target: {other}`"
    if there.even and mapped.hidden % mapped.heads:
        other = next(name for name, one in TARGETS.items() if not one.even)
        return f"{target} needs a hidden size that the number of heads divides", "target", f"set `target: {other}`"
    masked = (n for b in mapped.blocks for n, t in b.tensors.items() if _ATTENTION in n and t.kept is not None)
    if (name := next(masked, None)) is not None:
        return f"{name} has weights removed, and latent attention would fill them in", None, "prune weights after it"
    return None


def whole_cache(spec: Spec) -> LatentShape:
    """The shape without any reduction: as many numbers as the keys and values have."""
    mapped = model_map(spec)
    width = mapped.kv_heads * mapped.head_dim
    return LatentShape(width, width)


def query_rank(spec: Spec) -> int | None:
    """Inputs of the queries' second projection, with its constant channel; None where one projection is enough.

    Projections to queries have no bias in latent attention, unless there are two, one after the other.
    """
    mapped = model_map(spec)
    biased = any(f"{_ATTENTION}.q_proj.bias" in block.tensors for block in mapped.blocks)
    return mapped.heads * mapped.head_dim + 1 if biased else None


def latent(
    spec: Spec, shape: LatentShape, target: str, frequencies: Sequence[float], scale: float = 1.0
) -> tuple[Spec, frozenset[str]]:
    """The spec with latent attention, and the names of its tensors that are new; all others stay as they are.

    Args:
        frequencies: angles per position of the key's components, one for every two of its numbers.
        scale: factor of cosines and sines.
    """
    mapped = model_map(spec)
    heads, width, hidden = mapped.heads, mapped.head_dim, mapped.hidden
    rank, latent_width = query_rank(spec), shape.values + 1
    sizes = {
        "kv_a_proj_with_mqa.weight": (latent_width + shape.keys, hidden),
        "kv_a_proj_with_mqa.bias": (latent_width + shape.keys,),
        "kv_a_layernorm.weight": (latent_width,),
        "kv_b_proj.weight": (heads * width, latent_width),
        "o_proj.weight": (hidden, heads * width),
        "o_proj.bias": (hidden,),
    }
    if rank is None:
        sizes["q_proj.weight"] = (heads * shape.keys, hidden)
    else:
        sizes |= {
            "q_a_proj.weight": (rank, hidden),
            "q_a_proj.bias": (rank,),
            "q_a_layernorm.weight": (rank,),
            "q_b_proj.weight": (heads * shape.keys, rank),
        }
    tensors = {n: t for n, t in spec.tensors.items() if f".{_ATTENTION}." not in n or mapped.block_of(n) is None}
    new: set[str] = set()
    for block in mapped.blocks:
        dtype = block.tensors[f"{_ATTENTION}.o_proj.weight"].dtype
        for part, size in sizes.items():
            name = f"{block.path}{_ATTENTION}.{part}"
            tensors[name] = Tensor(name, size, dtype)
            new.add(name)
    config = _config(spec, shape, target, frequencies, scale)
    return replace(spec, structure=replace(spec.structure, config=config), tensors=tensors), frozenset(new)


#: Fields of the sources that the targets lack, or that are written anew.
_REPLACED = (
    "rope_theta", "rope_scaling", "partial_rotary_factor", "pretraining_tp", "max_window_layers", "use_sliding_window",
    "sliding_window", "layer_types", "no_rope_layers", "no_rope_layer_interval", "head_dim",
)  # fmt: skip


def _config(spec: Spec, shape: LatentShape, target: str, frequencies: Sequence[float], scale: float) -> dict[str, Any]:
    source, there, mapped = SOURCES[spec.structure.model_type], TARGETS[target], model_map(spec)
    given = {**source.defaults, **spec.structure.config}
    positions = int(given["max_position_embeddings"])
    kind = str(spec.structure.class_name).removeprefix(source.prefix)
    wavelengths = [wavelength(frequency) for frequency in frequencies]
    config = {
        **{key: value for key, value in given.items() if key not in _REPLACED},
        "model_type": target,
        "architectures": [there.prefix + kind],
        "num_key_value_heads": mapped.heads,
        "attention_bias": True,
        "q_lora_rank": query_rank(spec),
        "kv_lora_rank": shape.values + 1,
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": shape.keys,
        "v_head_dim": mapped.head_dim,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1.0,  # so that the lists alone are the frequencies
            "short_factor": wavelengths,
            "long_factor": wavelengths,
            "factor": 1.0,
            "attention_factor": scale,
            # both lists are equal, so it decides nothing; a value of `positions` draws a warning
            "original_max_position_embeddings": max(1, positions - 1),
        },
        **there.settings,
    }
    if target == "deepseek_v3":
        config["first_k_dense_replace"] = mapped.depth
        config.pop("mlp_bias", None)
    return config


def wavelength(frequency: float) -> float:
    """The number x, a float32, of which transformers computes 1 / x in float32 as close to the frequency as it can be."""
    import struct

    def single(value: float) -> float:
        return float(struct.unpack("f", struct.pack("f", value))[0])

    start = single(1 / frequency)
    (bits,) = struct.unpack("I", struct.pack("f", start))
    near = [struct.unpack("f", struct.pack("I", bits + step))[0] for step in (0, -1, 1)]
    return float(min(near, key=lambda value: abs(single(1 / value) - frequency)))
