"""Schemes: settings of `cast` by their names in llm-compressor and compressed-tensors, and those it cannot write. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

SchemeName: TypeAlias = Literal[
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4A16",
    "NVFP4",
    "MXFP4A16",
    "MXFP4",
    "MXFP4XFP8",
    "MXFP8A16",
    "MXFP8",
    "W6A16",
    "W5A16",
    "W3A16",
    "W2A16",
    "W6A8",
    "W5A8",
    "W4A8",
    "W4AFP8",
    "W3A8",
    "W2A8",
    "W4A4",
    "W3A4",
    "W2A4",
]


@dataclass(frozen=True)
class CastScheme:
    """Settings of `cast` that a scheme stands for.

    Attributes:
        weights, symmetric, activations: as in the settings.
        group: default `group_size`, which may be another in matrices that it does not fit; None for that of the format.
    """

    weights: str
    group: int | Literal["block", "tensor"] | None = None
    symmetric: bool = True
    activations: str | None = None

    def settings(self) -> dict[str, Any]:
        """The settings that it fixes."""
        return {"weights": self.weights, "symmetric": self.symmetric, "activations": self.activations}


#: Schemes as in compressed-tensors 0.20, `quantization/quant_scheme.py`.
SCHEMES: Mapping[SchemeName, CastScheme] = MappingProxyType(
    {
        "W4A16": CastScheme("int4", 128),
        "W4A16_ASYM": CastScheme("int4", 128, symmetric=False),
        "W8A16": CastScheme("int8", 128),
        "W8A8": CastScheme("int8", activations="int8"),
        "FP8": CastScheme("fp8", "tensor", activations="fp8-tensor"),
        "FP8_DYNAMIC": CastScheme("fp8", activations="fp8"),
        "FP8_BLOCK": CastScheme("fp8", "block", activations="fp8-group"),
        "NVFP4A16": CastScheme("nvfp4"),
        "NVFP4": CastScheme("nvfp4", activations="nvfp4"),
        "MXFP4A16": CastScheme("mxfp4"),
        "MXFP4": CastScheme("mxfp4", activations="mxfp4"),
        "MXFP4XFP8": CastScheme("mxfp4", activations="fp8-group"),
        "MXFP8A16": CastScheme("mxfp8"),
        "MXFP8": CastScheme("mxfp8", activations="mxfp8"),
        "W6A16": CastScheme("int6", 128),
        "W5A16": CastScheme("int5", 128),
        "W3A16": CastScheme("int3", 128),
        "W2A16": CastScheme("int2", 128),
        "W6A8": CastScheme("int6", 128, activations="int8"),
        "W5A8": CastScheme("int5", 128, activations="int8"),
        "W4A8": CastScheme("int4", 128, activations="int8"),
        "W4AFP8": CastScheme("int4", 128, activations="fp8"),
        "W3A8": CastScheme("int3", 128, activations="int8"),
        "W2A8": CastScheme("int2", 128, activations="int8"),
        "W4A4": CastScheme("int4", 128, activations="int4"),
        "W3A4": CastScheme("int3", 128, activations="int4"),
        "W2A4": CastScheme("int2", 128, activations="int4"),
    }
)
#: Other spellings ▶ the scheme.
_SAME = {"W8A8_INT": "W8A8", "W8A8_INT8": "W8A8", "W8A8_FP": "FP8_DYNAMIC", "W8A8_FP8": "FP8_DYNAMIC"}
_SAME |= {"W8AFP8": "FP8_DYNAMIC", "FP8_DYN": "FP8_DYNAMIC"}
#: Schemes that `cast` cannot write ▶ why, and the nearest that it can.
_REFUSED = {
    "MXFP6A16": ("weights in mxfp6", "W6A16"),
    "MXFP6A8": ("weights in mxfp6", "W6A8"),
    "W7A16": ("7-bit weights", "W8A16"),
    "W7A8": ("7-bit weights", "W8A8"),
}


def find(name: str) -> SchemeName | None:
    """The scheme that a name means, in any spelling of it; None for a name of none, or of one that `cast` cannot write."""
    spelled = name.upper().replace("-", "_")
    spelled = _SAME.get(spelled, spelled)
    return next((scheme for scheme in SCHEMES if scheme == spelled), None)


def refusal(name: str) -> str | None:
    """Why `cast` cannot write a scheme, and which is nearest; None for a name of none, or of one that it can write."""
    spelled = name.upper().replace("-", "_")
    what, nearest = _REFUSED.get(spelled, ("", ""))
    return f"{spelled} has {what}, which `cast` cannot write yet: use `scheme: {nearest}`" if what else None
