"""``mxfp4`` experts: E2M1 codes with a power of two for each 32 inputs (OCP Microscaling Formats 1.0), fused in three axes.

WeightFiles hold ``…_blocks`` [E, O, I/32, 16] and ``…_scales`` [E, O, I/32]; the model holds the transposed matrices [E, I, O].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.checkpoint.dequantize.base import Parts, Scheme, WeightFiles, all_finite, fill
from compress.checkpoint.storage.small_float import E2M1
from compress.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_GROUP = 32


class Mxfp4Scheme(Scheme):
    """Fused experts of 4 bits."""

    methods = ("mxfp4",)
    marks = ("_blocks", "_scales")

    def find(self, files: WeightFiles) -> None:
        """A tensor [E, I, O] for each pair of blocks and scales."""
        for name, blocks in files.named("_blocks"):
            files.entry(f"{name}_blocks", name, ("U8",))
            shape = blocks.shape
            if len(shape) != 4 or shape[3] != _GROUP // 2:
                raise CheckpointError(
                    f"array {name}_blocks has the shape {list(shape)}, not [experts, outputs, groups, {_GROUP // 2}]",
                    where=files.where,
                )
            files.entry(f"{name}_scales", name, ("U8", "F8_E8M0"), [shape[:3]])
            arrays = {"codes": f"{name}_blocks", "scale": f"{name}_scales"}
            files.add(name, (shape[0], shape[2] * _GROUP, shape[1]), "mxfp4", arrays, dequantize)


def dequantize(arrays: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Values [E, I, O] of blocks [E, O, G, 16], the even input in the low half of a byte. They are exact in bfloat16."""
    import torch

    blocks, scale = arrays["codes"], arrays["scale"].view(torch.uint8)
    if bool((scale == 255).any()):
        raise ValueError("its scales are NaN (255): the checkpoint is damaged")
    table = torch.tensor(E2M1)
    experts, outputs, groups, half = blocks.shape
    out = torch.empty(experts, groups * half * 2, outputs, dtype=dtype)
    for part, one, exponents in zip(out, blocks, scale, strict=True):

        def values(rows: slice, one: torch.Tensor = one, exponents: torch.Tensor = exponents) -> torch.Tensor:
            codes = torch.stack((one[rows] & 15, one[rows] >> 4), 3).flatten(2)
            return torch.ldexp(table[codes.long()], exponents[rows, :, None].int() - 127).flatten(1)

        fill(part.T, values)
    if not all_finite(out):
        raise ValueError(f"its values are beyond the range of {str(dtype).removeprefix('torch.')}")
    return out
