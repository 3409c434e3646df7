"""Number formats with scales, and codebooks: how the weights of a matrix become codes. No torch here.

Rows are outputs. Each row, or each group of consecutive inputs in it, has a scale s and, where the format is asymmetric, an
integer zero point z; a code q stands for (q - z) · s. Or codes number the values of a codebook, one for a whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

#: Formats of integer codes ▶ bits.
INTEGERS: Mapping[str, int] = MappingProxyType({f"int{bits}": bits for bits in (8, 6, 5, 4, 3, 2)})
#: Formats of float codes ▶ bits.
FLOATS: Mapping[str, int] = MappingProxyType({"fp8": 8, "mxfp4": 4, "nvfp4": 4})
#: Codes that number the values of a codebook ▶ bits.
CODEBOOKS: Mapping[str, int] = MappingProxyType({f"codebook{bits}": bits for bits in range(8, 1, -1)})
_E4M3 = "torch.float8_e4m3fn"
#: Formats whose groups are what their definition says.
FIXED_GROUPS: Mapping[str, int] = MappingProxyType({"mxfp4": 32, "nvfp4": 16})
#: Formats that inputs of a layer are cast to while running ▶ how compressed-tensors says so. The plain ones find a scale for
#: each token; ``-tensor`` have one in the file for all tokens, ``-dynamic`` find one for all, ``-zero`` have a zero point
#: beside it. ``nvfp4`` finds a scale for each 16, in E4M3 or, ``-wide``, unrounded, and has one in the file for those.
ACTIVATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: {"num_bits": bits, "type": kind, "symmetric": not name.endswith("-zero"), "strategy": strategy, **more}
        for name, bits, kind, strategy, more in (
            ("int8", 8, "int", "token", {"dynamic": True}),
            ("int8-zero", 8, "int", "token", {"dynamic": True}),
            ("int8-dynamic", 8, "int", "tensor", {"dynamic": True}),
            ("int8-tensor", 8, "int", "tensor", {"dynamic": False}),
            ("int8-tensor-zero", 8, "int", "tensor", {"dynamic": False}),
            ("fp8", 8, "float", "token", {"dynamic": True}),
            ("fp8-dynamic", 8, "float", "tensor", {"dynamic": True}),
            ("fp8-tensor", 8, "float", "tensor", {"dynamic": False}),
            ("nvfp4", 4, "float", "tensor_group", {"dynamic": "local", "group_size": 16, "scale_dtype": _E4M3}),
            ("nvfp4-wide", 4, "float", "tensor_group", {"dynamic": "local", "group_size": 16}),
        )
    }
)


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """The codes of one matrix.

    Attributes:
        format: ``int2`` … ``int8``, ``fp8`` (E4M3), ``mxfp4`` (OCP MX: E2M1 with a power of two for each 32), ``nvfp4`` (E2M1
            with an E4M3 scale for each 16 and one float32 for all), ``codebook2`` … ``codebook8``.
        group: inputs per scale; 0 for one scale per row.
        symmetric: no zero points.
        transposed: the checkpoint shapes the matrix [in, out] (GPT-2); codes and scales lie as [out, in] nonetheless. Never
            with a codebook, whose codes lie as the tensor does.
        activations: the format that inputs are meant to be cast to while running, of `ACTIVATIONS`; None for none.
        whole: one scale for the whole matrix.
        given_dtype: safetensors dtype of a static scale of inputs; None for that of the weights' scales.
    """

    format: str
    group: int = 0
    symmetric: bool = True
    transposed: bool = False
    activations: str | None = None
    whole: bool = False
    given_dtype: str | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return INTEGERS.get(self.format) or FLOATS.get(self.format) or CODEBOOKS[self.format]

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers."""
        return self.format in INTEGERS

    @property
    def is_codebook(self) -> bool:
        """Whether codes number the values of a codebook."""
        return self.format in CODEBOOKS

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the codes: outputs and inputs of a matrix; with a codebook that of the tensor."""
        if self.is_codebook:
            return shape
        return (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales in a file."""
        return (1,) if self.whole else (self.rows(shape)[0], self.groups(shape))

    @property
    def given(self) -> tuple[str, ...]:
        """What a file holds beside the codes so that inputs can be cast, by the ends of names: scales, a zero point."""
        said = ACTIVATIONS.get(self.activations or "", {})
        if said.get("dynamic") == "local":
            return ("input_global_scale",)
        if said.get("dynamic", True):
            return ()
        return ("input_scale",) if said["symmetric"] else ("input_scale", "input_zero_point")

    def groups(self, shape: tuple[int, ...]) -> int:
        """Scales per row."""
        return self.rows(shape)[1] // self.group if self.group else 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape can be made of such codes: a matrix, and whole groups; codebooks take any shape."""
        if self.is_codebook:
            return True
        if len(shape) != 2:
            return False
        inputs = self.rows(shape)[1]
        whole = inputs % self.group == 0 if self.group else True
        return whole and (inputs % 2 == 0 or self.format not in FIXED_GROUPS)

    def to_json(self) -> dict[str, Any]:
        """As the metadata of a weight file hold it."""
        return {
            "format": self.format,
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "transposed": self.transposed,
            "activations": self.activations,
            **({"whole": True} if self.whole else {}),
            **({"given_dtype": self.given_dtype} if self.given_dtype else {}),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> QuantFormat:
        """What `to_json` gave. Raises KeyError, TypeError or AssertionError for what is not."""
        keys = ("format", "group", "symmetric", "transposed", "activations")
        more: dict[str, Any] = {"whole": bool(row.get("whole", False)), "given_dtype": row.get("given_dtype")}
        quant_format = cls(**{k: row[k] for k in keys}, **more)
        assert quant_format.activations is None or quant_format.activations in ACTIVATIONS
        assert type(row["bits"]) is int
        assert quant_format.bits == row["bits"]
        assert type(quant_format.group) is int
        assert quant_format.group >= 0
        assert isinstance(quant_format.symmetric, bool)
        assert isinstance(quant_format.transposed, bool)
        assert FIXED_GROUPS.get(quant_format.format, quant_format.group) == quant_format.group
        assert quant_format.symmetric or quant_format.format not in FIXED_GROUPS
        assert not quant_format.is_codebook or quant_format == cls(quant_format.format)
        return quant_format
