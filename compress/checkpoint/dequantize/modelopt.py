"""``modelopt`` checkpoints of NVIDIA's Model Optimizer: fp8 by tensor, and NVFP4.

NVFP4 holds E2M1 codes, two to a byte with the even input in the low half, in ``weight`` [O, I / 2], an E4M3 scale for each 16
inputs in ``weight_scale`` [O, I / 16], and one float32 in ``weight_scale_2``. A value is code · (scale · scale_2), in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.checkpoint.dequantize.base import Parts, Scheme, WeightFiles, check_finite, fill
from compress.checkpoint.dequantize.fp8 import CODES, ENDS, UNUSED, add_fp8
from compress.checkpoint.storage.small_float import E2M1
from compress.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_GROUP, _ALGORITHMS = 16, ("FP8", "NVFP4")


class ModelOptScheme(Scheme):
    """Codes of 8 and of 4 bits."""

    methods = ("modelopt",)
    unused = UNUSED
    marks = (*ENDS, "_scale_2")
    coded = CODES

    def find(self, files: WeightFiles) -> None:
        """A tensor for each weight with scales beside it."""
        if (algorithm := files.quantization.get("quant_algo")) not in _ALGORITHMS:
            raise files.unknown("quant_algo", algorithm, " and ".join(_ALGORITHMS))
        if algorithm == "FP8":
            return add_fp8(files)
        for name, _ in files.named("_scale_2"):
            shape = files.entry(name, f"{name}_scale_2", ("U8",)).shape
            if len(shape) != 2 or shape[1] * 2 % _GROUP:
                raise CheckpointError(
                    f"array {name} has the shape {list(shape)}, which is not groups of {_GROUP} codes",
                    where=files.where,
                )
            arrays = {"codes": name, "scale": f"{name}_scale", "overall": f"{name}_scale_2"}
            files.entry(arrays["scale"], name, ("F8_E4M3",), [(shape[0], shape[1] * 2 // _GROUP)])
            files.entry(arrays["overall"], name, ("F32",), [(), (1,)])
            files.add(name, (shape[0], shape[1] * 2), "nvfp4", arrays, dequantize)
        return None


def dequantize(arrays: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Values [O, I] of NVFP4."""
    import torch

    check_finite(arrays["scale"])
    check_finite(arrays["overall"])
    codes, scale = arrays["codes"], arrays["scale"].float() * arrays["overall"]
    table = torch.tensor(E2M1)

    def values(rows: slice) -> torch.Tensor:
        pairs = torch.stack((codes[rows] & 15, codes[rows] >> 4), 2).reshape(len(codes[rows]), -1, _GROUP)
        return (table[pairs.long()] * scale[rows, :, None]).flatten(1)

    return fill(torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=dtype), values)
