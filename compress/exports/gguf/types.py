"""The type of each tensor of a GGUF file. Imports neither torch nor gguf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compress.architectures.gguf import GgufPlace
from compress.exports.base import ExportError
from compress.exports.gguf.mixtures import MIXTURES, mixed_type
from compress.exports.gguf.settings import GgufSettings
from compress.spec.formats import QuantFormat
from compress.spec.spec import Spec, Tensor

#: Safetensors dtype ▶ type.
FLOATS: Mapping[str, str] = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
#: Bits of symmetric codes ▶ the narrowest type that holds them.
SYMMETRIC: Mapping[int, str] = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}
#: The same with zero points. Narrow codes less their zero point are codes of a symmetric type; Q4_1 and Q5_1 have minima.
ASYMMETRIC: Mapping[int, str] = {2: "Q4_0", 3: "Q4_0", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0"}
#: Values that share a scale in these types.
BLOCK = 32
#: Values of a block of NVFP4, which has four scales.
NVFP4_BLOCK = 64
#: Type ▶ the one that llama.cpp takes for rows that are not whole blocks of 256.
NARROWER: Mapping[str, str] = {
    **dict.fromkeys(("Q2_K", "Q3_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"), "IQ4_NL"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}  # fmt: skip
#: Types that `gguf` rounds to; libgguf does the others.
ROUNDED_BY_GGUF = frozenset({"F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"})
_TABLES = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The type of a tensor; ``exact``: whether it holds the values bit for bit; ``coded``: whether it holds the codes."""

    type: str
    exact: bool
    coded: bool = False


def chosen(tensor: Tensor, place: GgufPlace, spec: Spec, settings: GgufSettings) -> Chosen:
    """The type of a tensor. Raises `ExportError` where GGUF has none, with the setting that would do."""
    if len(tensor.shape) < 2 or place.wide:
        return Chosen("F32", exact=True)
    quantised = any(t.quant_format is not None for t in spec.stored()) or settings.type is not None
    if place.name in _TABLES:
        asked: str = settings.embeddings
        if asked == "auto" and settings.type is not None and settings.type in MIXTURES:
            asked = _mixed(settings.type, place, spec)
        elif asked == "auto":
            asked = "Q8_0" if quantised and tensor.quant_format is None else "keep"
    else:
        asked = settings.type or "keep"
        if asked in MIXTURES:
            asked = _mixed(asked, place, spec)
    if asked != "keep":
        return _rounded(asked, tensor, place)
    if tensor.quant_format is None:
        return Chosen(FLOATS[tensor.dtype], exact=True)
    return _coded(tensor, tensor.quant_format)


def _mixed(mixture: str, place: GgufPlace, spec: Spec) -> str:
    """The type of a matrix in a file of a mixture."""
    config = spec.structure.config
    blocks = int(config.get("num_hidden_layers") or config["n_layer"])
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    heads = [name for name in spec.tensors if name.endswith("lm_head.weight") and not spec.tensors[name].alias_of]
    return mixed_type(mixture, place.name, blocks, experts, tied=not heads)


def _rounded(kind: str, tensor: Tensor, place: GgufPlace) -> Chosen:
    """A type that the values are rounded to, or what llama.cpp takes in its place for rows of such a length."""
    inputs = tensor.shape[-2 if place.transposed else -1]
    if inputs % 256 and kind in NARROWER:
        kind = NARROWER[kind]
    if inputs % BLOCK and kind not in FLOATS.values():
        kind = "F16"
    return Chosen(kind, exact=kind == "F32" or (kind == FLOATS.get(tensor.dtype) and tensor.quant_format is None))


def _coded(tensor: Tensor, quant_format: QuantFormat) -> Chosen:
    """The type that holds the codes of a tensor. Raises `ExportError` where none does."""
    name, inputs = quant_format.format, quant_format.rows(tensor.shape)[1]
    if quant_format.is_integer:
        types = SYMMETRIC if quant_format.symmetric else ASYMMETRIC
        if quant_format.bits not in types:
            raise ExportError(
                f"GGUF has no {quant_format.bits}-bit codes with zero points",
                where=tensor.name,
                fix="cast with `symmetric: true`, or add `--type Q8_0` to round the values again",
            )
        group = quant_format.group or inputs
        if group % BLOCK or inputs % BLOCK:
            raise ExportError(
                f"GGUF has a scale for each 32 inputs, and this has groups of {group} of {inputs} inputs",
                where=tensor.name,
                fix="cast with `group_size: 32` (or a multiple), prune MLPs with `multiple_of: 32`",
            )
        kind = types[quant_format.bits]
        return Chosen(kind, exact=kind not in ("Q4_1", "Q5_1"), coded=True)
    if name == "mxfp4":
        return Chosen("MXFP4", exact=True, coded=True)
    if name == "nvfp4":
        if inputs % NVFP4_BLOCK:
            raise ExportError(
                f"GGUF has nvfp4 codes in blocks of {NVFP4_BLOCK}, and this has {inputs} inputs",
                where=tensor.name,
                fix=f"prune MLPs with `multiple_of: {NVFP4_BLOCK}`, or cast to int4, `group_size: 32`",
            )
        return Chosen("NVFP4", exact=False, coded=True)
    raise ExportError(
        f"GGUF has no {name} codes",
        where=tensor.name,
        fix="cast to int4 (Q4_0), int5 (Q5_0), int8 (Q8_0), mxfp4 or nvfp4, or add `--type Q4_K` to round the values again",
    )
