"""Schemes: settings of `cast` by their names in llm-compressor and compressed-tensors, and those it cannot write. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

SchemeName: TypeAlias = Literal[
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "FP8_DYNAMIC",
    "NVFP4A16",
    "MXFP4A16",
    "W6A16",
    "W5A16",
    "W3A16",
    "W2A16",
]


@dataclass(frozen=True)
class CastScheme:
    """Settings of `cast` that a scheme stands for.

    Attributes:
        weights, symmetric, activations: as in the settings.
        group: default group size, which may be smaller in matrices that it does not divide; None for that of the format.
    """

    weights: str
    group: int | None = None
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
        "FP8_DYNAMIC": CastScheme("fp8", activations="fp8"),
        "NVFP4A16": CastScheme("nvfp4"),
        "MXFP4A16": CastScheme("mxfp4"),
        "W6A16": CastScheme("int6", 128),
        "W5A16": CastScheme("int5", 128),
        "W3A16": CastScheme("int3", 128),
        "W2A16": CastScheme("int2", 128),
    }
)
#: Other spellings ▶ the scheme.
_SAME = {"W8A8_INT": "W8A8", "W8A8_INT8": "W8A8", "W8A8_FP": "FP8_DYNAMIC", "W8A8_FP8": "FP8_DYNAMIC"}
_SAME |= {"W8AFP8": "FP8_DYNAMIC", "FP8_DYN": "FP8_DYNAMIC"}
#: Schemes that `cast` cannot write ▶ why, and the nearest that it can.
_REFUSED = {
    "FP8": ("scales of inputs that are measured beforehand", "FP8_DYNAMIC"),
    "FP8_BLOCK": ("a scale for each block of 128 x 128 weights", "FP8_DYNAMIC"),
    "NVFP4": ("inputs in nvfp4", "NVFP4A16"),
    "MXFP4": ("inputs in mxfp4", "MXFP4A16"),
    "MXFP4XFP8": ("inputs in mxfp8", "MXFP4A16"),
    "MXFP6A16": ("weights in mxfp6", "W6A16"),
    "MXFP6A8": ("weights in mxfp6", "W6A16"),
    "MXFP8A16": ("weights in mxfp8", "W8A16"),
    "MXFP8": ("weights in mxfp8", "FP8_DYNAMIC"),
    "W7A16": ("7-bit weights", "W8A16"),
    "W4AFP8": ("inputs in fp8 beside 4-bit weights", "W4A16"),
}
_INTEGERS = re.compile(r"W([2-7])A([48])")


def find(name: str) -> SchemeName | None:
    """The scheme that a name means, in any spelling of it; None for a name of none, or of one that `cast` cannot write."""
    spelled = name.upper().replace("-", "_")
    spelled = _SAME.get(spelled, spelled)
    return next((scheme for scheme in SCHEMES if scheme == spelled), None)


def refusal(name: str) -> str | None:
    """Why `cast` cannot write a scheme, and which is nearest; None for a name of none, or of one that it can write."""
    spelled = name.upper().replace("-", "_")
    what, nearest = _REFUSED.get(spelled, ("", ""))
    if match := _INTEGERS.fullmatch(spelled):
        what, nearest = f"{match[2]}-bit inputs beside {match[1]}-bit weights", f"W{match[1]}A16"
        nearest = nearest if nearest in SCHEMES else "W8A16"
    return f"{spelled} has {what}, which `cast` cannot write yet: use `scheme: {nearest}`" if what else None
