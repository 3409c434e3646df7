"""Reads compressed-tensors checkpoints of other tools. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.architectures.model_map import model_map
from compress.checkpoint.headers import TensorEntry
from compress.checkpoint.patterns import Matcher
from compress.checkpoint.storage import parts
from compress.checkpoint.storage.compressed_tensors.write import KEY, METHOD, cache_of
from compress.checkpoint.storage.packed import INT8, PACKED
from compress.checkpoint.storage.small_float import FP8, MXFP4, MXFP8, NVFP4
from compress.errors import CheckpointError
from compress.spec.formats import ACTIVATIONS, BLOCK, FIXED_GROUPS, FLOATS, INTEGERS, QuantFormat
from compress.spec.spec import (
    CACHE_SCALES,
    FLOAT_DTYPES,
    Spec,
    Structure,
    Tensor,
)

#: Name suffixes of arrays that only a running model needs.
_RUNNING = tuple(f".{side}_{end}" for side in ("input", "output") for end in ("scale", "zero_point", "global_scale"))
#: Name suffixes of zero points. Older tools wrote zeros for symmetric schemes.
_ZEROS = (".weight_zero_point", ".input_zero_point", ".output_zero_point")
#: Name suffixes of scales and zero points of queries and of cached keys and values.
_CACHED = tuple(f".{part}_{end}" for part in "qkv" for end in ("scale", "zero_point"))


def parse(
    structure: Structure, entries: Mapping[str, TensorEntry], where: str
) -> tuple[dict[str, Tensor], set[str], tuple[str, ...]]:
    """Quantised tensors of a compressed-tensors checkpoint, names of arrays to leave out, and notes on these.

    Raises:
        CheckpointError: another quantisation method, an unusable pattern, or codes that `QuantFormat` cannot express.
    """
    groups = SchemeGroups(structure.config[KEY], where)
    mapped = model_map(Spec(structure))
    tensors: dict[str, Tensor] = {}
    for key, entry in entries.items():
        if not key.endswith(".weight_scale"):
            continue
        name = key.removesuffix("_scale")
        module = name.removesuffix(".weight")
        table = mapped.known and module.endswith(mapped.record.embeddings)
        scheme = groups.scheme(mapped.in_memory(module), "Embedding" if table else "Linear")
        if scheme is None:
            raise CheckpointError(f"has scales for {module}, which no group of its {KEY} targets", where=where)
        quant_format, chain = _format(scheme, module, where)
        packed = entries.get(f"{name}_packed") or entries.get(name)
        if packed is None or len(packed.shape) != 2 or (len(entry.shape) != 2 and not quant_format.whole):
            raise CheckpointError(f"lacks the codes of {module}, or has them in an unexpected shape", where=where)
        inputs = packed.shape[1]
        if chain == PACKED:
            inputs = (
                entry.shape[1] * quant_format.group if quant_format.group else packed.shape[1] * 32 // quant_format.bits
            )
        elif chain in (MXFP4, NVFP4):
            inputs *= 2
        dtype = "BF16" if chain in (MXFP8, MXFP4, NVFP4) else entry.dtype
        scale = entries.get(f"{module}.input_scale")
        if (
            scale is not None
            and "input_scale" in quant_format.static_inputs
            and scale.dtype in set(FLOAT_DTYPES) - {dtype}
        ):
            quant_format = replace(quant_format, given_dtype=scale.dtype)
        tensor = Tensor(name, (packed.shape[0], inputs), dtype, storage=chain, quant_format=quant_format)
        for part in parts(tensor):
            other = entries.get(part.key)
            if other is None or other.shape != part.shape or other.dtype != part.dtype:
                raise CheckpointError(f"array {part.key} does not match the {KEY}", where=where)
        tensors[name] = tensor
    owned = {part.key for tensor in tensors.values() for part in parts(tensor)}
    cached = CACHE_SCALES if cache_of(structure.config[KEY]) is not None else ()
    left = {
        key
        for key in entries.keys() - owned
        if (key.endswith(_ZEROS) and f"{key.rpartition('.')[0]}.weight" in tensors)
        or (key.endswith(_CACHED) and not key.endswith(cached))
    }
    if stray := next((key for key in entries if key.endswith(_RUNNING) and key not in owned | left), None):
        raise CheckpointError(f"has {stray}, which no group of its {KEY} uses", where=where)
    ends = sorted({key.rpartition(".")[2] for key in left})
    note = f"{len(left)} arrays that stock transformers does not read are left out: {', '.join(ends)}"
    return tensors, left, (note,) if left else ()


class SchemeGroups:
    """The ``config_groups`` of a quantization config, by target. `claims` has checked its types."""

    def __init__(self, quantization: Any, where: str) -> None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != METHOD:
            raise CheckpointError(
                f"has weights quantised by {method!r}, which this version cannot read",
                where=where,
                fix="start from the unquantised checkpoint",
            )
        self._matcher = Matcher(where)
        self._format = quantization.get("format")
        self._ignored: list[str] = quantization.get("ignore") or []
        self._targets: dict[str, Mapping[str, Any]] = {}
        for group in (quantization.get("config_groups") or {}).values():
            self._targets.update((target, group) for target in group.get("targets") or ())
        self._ordered = sorted(self._targets, key=lambda target: ("re:" in target, target))

    def scheme(self, module: str, kind: str = "Linear") -> Mapping[str, Any] | None:
        """Group of a layer, found as compressed-tensors does; None without one.

        Names take precedence over patterns and patterns over classes; among several the alphabetically first wins.

        Args:
            module: name of the layer in memory. kind: its class, ``Linear`` or ``Embedding``.
        """
        if kind in self._ignored or self._matcher.any(self._ignored, module):
            return None
        target = next((target for target in self._ordered if self._matcher.matches(target, module)), None)
        if target is None and kind not in self._targets:
            return None
        group = self._targets[target or kind]
        return {"format": self._format, **{k: v for k, v in group.items() if v is not None}}


#: Defaults of a scheme in compressed-tensors.
_DEFAULTS: Mapping[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "strategy": None,
    "dynamic": False,
    "scale_dtype": None,
}


def _filled(scheme: Mapping[str, Any]) -> dict[str, Any]:
    """Scheme of weights or inputs with defaults filled in."""
    filled = {**_DEFAULTS, **{k: v for k, v in scheme.items() if k in _DEFAULTS and v is not None}}
    for key in ("type", "strategy", "dynamic"):
        filled[key] = filled[key].lower() if isinstance(filled[key], str) else filled[key]
    group = filled["group_size"]
    if filled["strategy"] is None:
        filled["strategy"] = "tensor" if group is None else "channel" if group == -1 else "group"
    return filled


def _text(scheme: Mapping[str, Any]) -> str:
    """Scheme in words, for an error."""
    dynamics = "locally dynamic " if scheme["dynamic"] == "local" else "dynamic " if scheme["dynamic"] else ""
    return f"{dynamics}{scheme['num_bits']}-bit {scheme['type']} by {scheme['strategy']}"


def _format(config_group: Mapping[str, Any], module: str, where: str) -> tuple[QuantFormat, tuple[str, ...]]:
    """Number format and storage chain of a group. Raises `CheckpointError` for what they cannot express."""
    weights = config_group.get("weights") or {}
    scheme = _filled(weights)
    chain: tuple[str, ...] = (str(config_group.get("format")),)
    if chain == ("naive-quantized",):  # it has the same arrays
        chain = FP8 if scheme["type"] == "float" else INT8
    kind, bits, strategy, group = (scheme[key] for key in ("type", "num_bits", "strategy", "group_size"))
    name = {
        PACKED: f"int{bits}", INT8: f"int{bits}", FP8: "fp8", MXFP8: "mxfp8", MXFP4: "mxfp4", NVFP4: "nvfp4",
    }.get(chain, "")  # fmt: skip
    grouped = strategy in ("group", "tensor_group") and isinstance(group, int) and group > 0
    block = (
        chain == FP8 and strategy == "block" and weights.get("block_structure") in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}")
    )
    fits = block or grouped or strategy == "channel" or (strategy == "tensor" and chain in (INT8, FP8))
    expected = ("int" if name in INTEGERS else "float", INTEGERS.get(name) or FLOATS.get(name))
    fits = fits and (kind, bits) == expected and not scheme["dynamic"] and block == bool(weights.get("block_structure"))
    if name in FIXED_GROUPS and (group != FIXED_GROUPS[name] or not scheme["symmetric"]):
        fits = False
    if not fits or str(weights.get("actorder")).lower() in ("group", "dynamic", "true"):
        raise CheckpointError(
            f"stores {module} as {config_group.get('format')}, {_text(scheme)}, which this version cannot read",
            where=where,
        )
    if config_group.get("output_activations"):
        raise CheckpointError(f"quantises the outputs of {module}, which is not supported", where=where)
    activations = None
    if config_group.get("input_activations"):
        inputs = _filled(config_group["input_activations"])
        known = (n for n, a in ACTIVATIONS.items() if {**_DEFAULTS, **a} == inputs)
        activations = next(known, None)
        if activations is None:
            raise CheckpointError(
                f"quantises the inputs of {module} to {_text(inputs)}, which is not supported", where=where
            )
    whole = strategy == "tensor"
    size = BLOCK if block else group if grouped else 0
    return QuantFormat(name, size, bool(scheme["symmetric"]), activations=activations, whole=whole, block=block), chain
