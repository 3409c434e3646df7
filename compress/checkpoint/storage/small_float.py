"""Codes that are small floats: ``float-quantized`` and ``mxfp8-quantized`` (E4M3), ``mxfp4-pack-quantized`` and
``nvfp4-pack-quantized`` (E2M1).

compressed-tensors has them all. Two codes of E2M1 share a byte, the even input in the low half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.checkpoint.storage.base import Arrays, Codec, codes_of, encoded_scale, format_of, scale_array
from compress.checkpoint.storage.packed import byte_zero_array, encoded_byte_zero
from compress.checkpoint.storage.reading import CodeReader
from compress.spec.formats import QuantFormat
from compress.spec.spec import Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Value

FP8: tuple[str, ...] = ("float-quantized",)
MXFP8: tuple[str, ...] = ("mxfp8-quantized",)
MXFP4: tuple[str, ...] = ("mxfp4-pack-quantized",)
NVFP4: tuple[str, ...] = ("nvfp4-pack-quantized",)


class Fp8(Codec):
    """Codes of 8 bits, with scales. Other tools may write zero points."""

    chain = FP8

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """E4M3."""
        return quant_format is not None and quant_format.format == "fp8"

    def static_inputs(self, tensor: Tensor) -> tuple[str, ...]:
        """Name suffixes of the static input scales that the number format has."""
        return format_of(tensor).static_inputs

    def arrays(self, tensor: Tensor) -> Arrays:
        """Codes, scales and zero points."""
        codes = format_of(tensor).rows(tensor.shape)
        return {"codes": (codes, "F8_E4M3"), **scale_array(tensor), **byte_zero_array(tensor)}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Codes, scales and zero points."""
        codes = codes_of(value).codes.contiguous()
        return {"codes": codes, **encoded_scale(value, tensor), **encoded_byte_zero(value, tensor)}


class Mxfp8(Codec):
    """Codes of 8 bits, with a power of two for each 32 inputs: the scale byte b means 2^(b - 127)."""

    chain = MXFP8

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """E4M3 with powers of two."""
        return quant_format is not None and quant_format.format == "mxfp8"

    def arrays(self, tensor: Tensor) -> Arrays:
        """Codes and scales."""
        quant_format = format_of(tensor)
        return {
            "codes": (quant_format.rows(tensor.shape), "F8_E4M3"),
            "scale": (quant_format.scales(tensor.shape), "U8"),
        }

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Codes and scales."""
        return {"codes": codes_of(value).codes.contiguous(), **encoded_scale(value, tensor)}


class Mxfp4(Codec):
    """Codes of 4 bits, with a power of two for each 32 inputs: the scale byte b means 2^(b - 127)."""

    chain = MXFP4
    scales: str = "U8"

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """E2M1 with powers of two."""
        return quant_format is not None and quant_format.format == "mxfp4"

    def static_inputs(self, tensor: Tensor) -> tuple[str, ...]:
        """Name suffixes of the static input scales that the number format has."""
        return format_of(tensor).static_inputs

    def arrays(self, tensor: Tensor) -> Arrays:
        """Codes, two to a byte, and scales."""
        outputs, inputs = format_of(tensor).rows(tensor.shape)
        return {
            "codes": ((outputs, inputs // 2), "U8"),
            "scale": (format_of(tensor).scales(tensor.shape), self.scales),
        }

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Codes, two to a byte, and scales."""
        codes = codes_of(value).codes
        return {"codes": (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous(), **encoded_scale(value, tensor)}


class Nvfp4(Mxfp4):
    """Codes of 4 bits, with an E4M3 scale for each 16 inputs and a global scale that these are divided by."""

    chain = NVFP4
    scales = "F8_E4M3"

    def stores(self, quant_format: QuantFormat | None) -> bool:
        """E2M1 with E4M3 scales."""
        return quant_format is not None and quant_format.format == "nvfp4"

    def arrays(self, tensor: Tensor) -> Arrays:
        """Codes, two to a byte, scales, and the global scale."""
        return {**super().arrays(tensor), "overall": ((1,), "F32")}

    def encode(self, value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
        """Codes, two to a byte, scales, and the global scale."""
        overall = codes_of(value).overall
        assert overall is not None, tensor
        return {**super().encode(value, tensor), "overall": overall}


# ---- reading: copied into the modelling file of compact checkpoints ----

#: Values of the 16 E2M1 codes: one sign bit, two exponent bits, one mantissa bit.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


class Fp8Reader(CodeReader):
    """Reads ``float-quantized``."""

    chain = ("float-quantized",)

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Codes, scales and zero points."""
        zero = {} if grid is None or grid["symmetric"] else {"zero": "_zero_point"}
        return {"codes": "", "scale": "_scale", **zero}

    def codes(
        self,
        parts: dict[str, torch.Tensor],
        rows: tuple[int, ...],
        bits: int,
        mask: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """The stored codes."""
        return parts["codes"]


class Mxfp8Reader(Fp8Reader):
    """Reads ``mxfp8-quantized``."""

    chain = ("mxfp8-quantized",)

    def dequantizes(self, codes: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether the scales are powers of two of E4M3 codes."""
        import torch

        return codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor, overall: torch.Tensor | None) -> torch.Tensor:
        """Values [O, I] in bfloat16."""
        import torch

        powers = 2.0 ** (scale.to(torch.int32) - 127).to(torch.bfloat16)
        values = codes.reshape(codes.shape[0], scale.shape[1], -1).to(torch.bfloat16)
        return (values * powers[..., None]).flatten(1)


class Mxfp4Reader(CodeReader):
    """Reads ``mxfp4-pack-quantized``; dequantises both kinds of E2M1."""

    chain = ("mxfp4-pack-quantized",)

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Codes and scales."""
        return {"codes": "_packed", "scale": "_scale"}

    def codes(
        self,
        parts: dict[str, torch.Tensor],
        rows: tuple[int, ...],
        bits: int,
        mask: torch.Tensor | None,
        zero: torch.Tensor | None,
    ) -> torch.Tensor:
        """Codes, a byte each."""
        import torch

        pairs = parts["codes"]
        return torch.stack((pairs & 15, pairs >> 4), 2).flatten(1)

    def dequantizes(self, codes: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether the codes are E2M1: no others are uint8."""
        import torch

        return codes.dtype == torch.uint8 and scale.ndim > 1

    def dequantize(self, codes: torch.Tensor, scale: torch.Tensor, overall: torch.Tensor | None) -> torch.Tensor:
        """Values [O, I] in bfloat16."""
        import torch

        values = torch.tensor(E2M1, device=codes.device)[codes.long()]
        if overall is None:
            scale = 2.0 ** (scale.to(torch.int32) - 127).to(torch.bfloat16)
        else:
            scale = scale.to(torch.bfloat16) / overall
        values = values.reshape(codes.shape[0], scale.shape[1], -1).to(scale.dtype)
        return (values * scale[..., None]).flatten(1).to(torch.bfloat16)


class Nvfp4Reader(Mxfp4Reader):
    """Reads ``nvfp4-pack-quantized``."""

    chain = ("nvfp4-pack-quantized",)

    def names(self, grid: dict[str, Any] | None) -> dict[str, str]:
        """Codes, scales, and the global scale."""
        return {"codes": "_packed", "scale": "_scale", "overall": "_global_scale"}
