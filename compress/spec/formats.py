"""Number formats of quantised weights: integers, small floats, codebooks and trellis codes. Imports no torch.

Rows are outputs. Each row, or each group of consecutive inputs of a row, has a scale s; asymmetric formats also have an
integer zero point z. A code q has the value (q - z) · s. With a codebook, codes are indices into the values of one codebook
per tensor. Trellis codes name states of a shift register, and each state has a value; see `checkpoint.storage.trellis`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

_E4M3, _E8M0 = "torch.float8_e4m3fn", "torch.uint8"
#: Integer formats ▶ bits.
INTEGERS: Mapping[str, int] = MappingProxyType({f"int{bits}": bits for bits in (8, 6, 5, 4, 3, 2)})
#: Float formats ▶ bits.
FLOATS: Mapping[str, int] = MappingProxyType({"fp8": 8, "mxfp8": 8, "mxfp4": 4, "nvfp4": 4})
#: Codebook formats ▶ bits of an index.
CODEBOOKS: Mapping[str, int] = MappingProxyType({f"codebook{bits}": bits for bits in range(8, 1, -1)})
#: Trellis formats ▶ bits of a code.
TRELLISES: Mapping[str, int] = MappingProxyType({f"trellis{bits}": bits for bits in (4, 3, 2)})
#: Fewest outputs of a matrix in a trellis format: with fewer, the states of a sequence would overlap.
LEAST_OUTPUTS = 16
#: Formats whose definition fixes the group size ▶ that size.
FIXED_GROUPS: Mapping[str, int] = MappingProxyType({"mxfp8": 32, "mxfp4": 32, "nvfp4": 16})
#: Formats whose definition fixes the dtype of scales ▶ that dtype.
SCALE_DTYPES: Mapping[str, str] = MappingProxyType({"mxfp8": _E8M0, "mxfp4": _E8M0, "nvfp4": _E4M3})
#: Outputs, and inputs, of a block that shares one scale.
BLOCK = 128
#: Formats that a runtime rounds a layer's inputs to ▶ their scheme in compressed-tensors. Without a suffix there is a dynamic
#: scale for each token; ``-dynamic``: one dynamic scale for all tokens; ``-tensor``: one static scale, stored in the file;
#: ``-zero``: with a zero point; ``-group``: one for each 128 inputs of a token. ``nvfp4`` has a dynamic E4M3 scale for each 16
#: inputs (``-wide``: an unrounded one) and one static scale for these; ``mxfp4`` and ``mxfp8`` have a power of two for each 32.
ACTIVATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: {"num_bits": bits, "type": kind, "symmetric": not name.endswith("-zero"), "strategy": strategy, **more}
        for name, bits, kind, strategy, more in (
            ("int4", 4, "int", "token", {"dynamic": True}),
            ("int8", 8, "int", "token", {"dynamic": True}),
            ("int8-zero", 8, "int", "token", {"dynamic": True}),
            ("int8-dynamic", 8, "int", "tensor", {"dynamic": True}),
            ("int8-tensor", 8, "int", "tensor", {"dynamic": False}),
            ("int8-tensor-zero", 8, "int", "tensor", {"dynamic": False}),
            ("fp8", 8, "float", "token", {"dynamic": True}),
            ("fp8-dynamic", 8, "float", "tensor", {"dynamic": True}),
            ("fp8-tensor", 8, "float", "tensor", {"dynamic": False}),
            ("fp8-group", 8, "float", "group", {"dynamic": True, "group_size": BLOCK}),
            ("mxfp8", 8, "float", "group", {"dynamic": True, "group_size": 32, "scale_dtype": _E8M0}),
            ("mxfp4", 4, "float", "group", {"dynamic": True, "group_size": 32, "scale_dtype": _E8M0}),
            ("nvfp4", 4, "float", "tensor_group", {"dynamic": "local", "group_size": 16, "scale_dtype": _E4M3}),
            ("nvfp4-wide", 4, "float", "tensor_group", {"dynamic": "local", "group_size": 16}),
        )
    }
)


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """Number format of one matrix.

    Attributes:
        format: ``int2`` … ``int8``, ``fp8`` (E4M3), ``mxfp8`` and ``mxfp4`` (OCP MX: E4M3 and E2M1 with a power of two for each
            32), ``nvfp4`` (E2M1 with an E4M3 scale for each 16 and one float32 for all), ``codebook2`` … ``codebook8``,
            ``trellis2`` … ``trellis4``.
        group: inputs per scale; 0 for one scale per row.
        symmetric: whether there are no zero points.
        transposed: whether the checkpoint shapes the matrix [in, out] (GPT-2). Codes and scales are stored as [out, in] all the
            same. Always False with a codebook, whose codes have the tensor's shape.
        activations: format of `ACTIVATIONS` that a runtime rounds the inputs to; None for none.
        whole: whether one scale serves the whole matrix.
        block: whether `BLOCK` outputs share their scales; then groups have `BLOCK` inputs.
        experts: number of matrices in a tensor with the axes experts, out, in (or in, out); 0 for a single matrix. Their rows
            are stored one after another.
        given_dtype: safetensors dtype of the static input scale; None for that of the weight's scales.
    """

    format: str
    group: int = 0
    symmetric: bool = True
    transposed: bool = False
    activations: str | None = None
    whole: bool = False
    block: bool = False
    given_dtype: str | None = None
    experts: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        for formats in (INTEGERS, FLOATS, TRELLISES):
            if self.format in formats:
                return formats[self.format]
        return CODEBOOKS[self.format]

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers."""
        return self.format in INTEGERS

    @property
    def is_codebook(self) -> bool:
        """Whether codes are indices into a codebook."""
        return self.format in CODEBOOKS

    @property
    def is_trellis(self) -> bool:
        """Whether codes are steps through a trellis."""
        return self.format in TRELLISES

    @property
    def compact_only(self) -> bool:
        """Whether compressed-tensors has no such format, so that only compact checkpoints hold it."""
        return self.is_codebook or self.is_trellis

    @property
    def fixed_scales(self) -> bool:
        """Whether scales stay as they are first fitted: those of a few values, and those that several outputs share."""
        return self.format in FIXED_GROUPS or self.block or self.whole

    def height(self, outputs: int) -> int:
        """Outputs that share a scale, of a matrix with so many outputs."""
        return outputs if self.whole else BLOCK if self.block else 1

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes: [out, in], of all experts together, a convolution's kernel with in = inputs x positions.

        With a codebook, the tensor's own shape.
        """
        if self.is_codebook:
            return shape
        if len(shape) > 2 and not self.experts:
            return shape[0], prod(shape[1:])
        outputs, inputs = (shape[-1], shape[-2]) if self.transposed else shape[-2:]
        return max(1, self.experts) * outputs, inputs

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales in a file."""
        outputs = self.rows(shape)[0]
        return (1,) if self.whole else (-(-outputs // self.height(outputs)), self.groups(shape))

    @property
    def static_inputs(self) -> tuple[str, ...]:
        """Name suffixes of the static input scales and zero points that files store beside the codes."""
        arguments = ACTIVATIONS.get(self.activations or "", {})
        if arguments.get("dynamic") == "local":
            return ("input_global_scale",)
        if arguments.get("dynamic", True):
            return ()
        return ("input_scale",) if arguments["symmetric"] else ("input_scale", "input_zero_point")

    def groups(self, shape: tuple[int, ...]) -> int:
        """Scales per row."""
        return self.rows(shape)[1] // self.group if self.group else 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape can have this format: matrices and kernels with whole groups; codebooks take any."""
        if self.is_codebook:
            return True
        if len(shape) < 2 or (self.experts and (len(shape) != 3 or self.experts != shape[0])):
            return False
        if self.transposed and len(shape) > 2 and not self.experts:
            return False
        outputs, inputs = self.rows(shape)
        if (self.is_trellis and (self.experts or outputs < LEAST_OUTPUTS)) or (self.block and self.experts):
            return False
        whole = inputs % self.group == 0 if self.group else True
        return whole and (inputs % 2 == 0 or self.format not in FIXED_GROUPS)

    def to_json(self) -> dict[str, Any]:
        """JSON object for the metadata of a weight file."""
        return {
            "format": self.format,
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "transposed": self.transposed,
            "activations": self.activations,
            **({"whole": True} if self.whole else {}),
            **({"block": True} if self.block else {}),
            **({"given_dtype": self.given_dtype} if self.given_dtype else {}),
            **({"experts": self.experts} if self.experts else {}),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> QuantFormat:
        """Inverse of `to_json`. Raises KeyError, TypeError or AssertionError for anything else."""
        keys = ("format", "group", "symmetric", "transposed", "activations")
        more: dict[str, Any] = {"whole": bool(row.get("whole", False)), "given_dtype": row.get("given_dtype")}
        more |= {"experts": row.get("experts", 0), "block": bool(row.get("block", False))}
        quant_format = cls(**{k: row[k] for k in keys}, **more)
        assert quant_format.activations is None or quant_format.activations in ACTIVATIONS
        assert type(row["bits"]) is int
        assert quant_format.bits == row["bits"]
        assert type(quant_format.group) is int
        assert quant_format.group >= 0
        assert type(quant_format.experts) is int
        assert quant_format.experts >= 0
        assert not (quant_format.experts and quant_format.whole)
        assert not quant_format.block or (quant_format.group == BLOCK and quant_format.format == "fp8")
        assert not quant_format.block or not (quant_format.whole or quant_format.experts)
        assert isinstance(quant_format.symmetric, bool)
        assert isinstance(quant_format.transposed, bool)
        assert FIXED_GROUPS.get(quant_format.format, quant_format.group) == quant_format.group
        assert quant_format.symmetric or quant_format.format not in FIXED_GROUPS
        assert not quant_format.is_codebook or quant_format == cls(quant_format.format)
        assert not quant_format.is_trellis or quant_format == cls(
            quant_format.format, transposed=quant_format.transposed
        )
        return quant_format
