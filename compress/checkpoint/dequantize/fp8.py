"""8-bit floats with scales by block, by channel or by tensor: ``fp8`` and ``fbgemm_fp8`` of transformers and vLLM.

A value is code · scale, computed in float32 and rounded to the dtype that is read. Scales named ``weight_scale_inv`` are
multipliers too. A block at the end of rows or columns may be smaller than the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.checkpoint.dequantize.base import Parts, Scheme, WeightFiles, check_finite, fill
from compress.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CODES = ("F8_E4M3", "F8_E5M2")
#: Dtypes of scales. Those of 8 bits are exponents: b means 2^(b - 127).
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
ENDS = ("_scale_inv", "_scale")
#: Arrays of inputs and caches.
UNUSED = (".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale")


class Fp8Scheme(Scheme):
    """E4M3 or E5M2 codes of matrices and of experts [E, O, I]."""

    methods = ("fp8", "fbgemm_fp8")
    unused = UNUSED
    marks = ENDS
    coded = CODES

    def find(self, files: WeightFiles) -> None:
        """A tensor for each array of codes with scales beside it."""
        add_fp8(files)


def add_fp8(files: WeightFiles) -> None:
    """Add a tensor for each array of 8-bit floats with scales beside it."""
    for name, key in _pairs(files):
        codes = files.entry(name, key, CODES)
        scale = files.entry(key, name, _SCALES)
        block = _block(files, name, key)
        label = "fp8" if codes.dtype == "F8_E4M3" else "fp8 (E5M2)"
        kind = f"{label} {_words(block, codes.shape)}"
        decode = partial(dequantize, block=block, exponents=scale.dtype == "U8")
        files.add(name, codes.shape, kind, {"codes": name, "scale": key}, decode)


def _pairs(files: WeightFiles) -> Iterator[tuple[str, str]]:
    """(name of codes, name of their scales)."""
    for end in ENDS:
        for name, _ in files.named(end):
            key = f"{name}{end}"
            if not key.endswith(UNUSED) and name in files.entries:
                yield name, key


def _block(files: WeightFiles, name: str, key: str) -> tuple[int, int]:
    """Outputs and inputs per scale. Raises `CheckpointError` where the scales fit no block that the config allows."""
    shape, scales = files.entries[name].shape, files.entries[key].shape
    if len(shape) not in (2, 3):
        raise CheckpointError(f"array {name} of 8-bit floats has {len(shape)} axes, not 2 or 3", where=files.where)
    (outputs, inputs), lead = shape[-2:], shape[:-2]
    if scales in ((), (1,), (1, 1), lead, (*lead, 1), (*lead, 1, 1)):
        return outputs, inputs
    if scales in ((*lead, outputs, 1), (*lead, outputs)):
        return 1, inputs
    said: Any = files.quantization.get("weight_block_size")
    if len(scales) == len(shape) and scales[:-2] == lead and all(scales[-2:]):
        rows, columns = scales[-2:]
        # without a size in the config: sizes are powers of two, and for two or more blocks one alone gives their number
        height, width = said if _is_block(said) else (_power(outputs, rows), _power(inputs, columns))
        if (-(-outputs // height), -(-inputs // width)) == (rows, columns):
            return height, width
    raise CheckpointError(
        f"array {key} has the shape {list(scales)}, which fits {name} {list(shape)} by no block"
        + (f" of {said[0]} × {said[1]}" if _is_block(said) else ": the config has no usable `weight_block_size`"),
        where=files.where,
    )


def _is_block(said: object) -> bool:
    return isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said)


def _power(size: int, blocks: int) -> int:
    """The smallest power of two that, as the size of a block, may give so many blocks."""
    return 1 << (-(-size // blocks) - 1).bit_length()


def _words(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    if block == shape[-2:]:
        return "by tensor"
    return "by channel" if block == (1, shape[-1]) else f"in blocks of {block[0]} × {block[1]}"


def dequantize(arrays: Parts, dtype: torch.dtype, block: tuple[int, int], exponents: bool) -> torch.Tensor:
    """Values of codes [.., O, I] with a scale for each block. ``exponents``: scales are bytes b that mean 2^(b - 127)."""
    import torch

    codes, scale = arrays["codes"], arrays["scale"]
    check_finite(scale)
    scale = (scale.float() - 127).exp2() if exponents else scale.float()
    outputs, inputs = codes.shape[-2:]
    height, width = block
    flat, out = codes.reshape(-1, outputs, inputs), torch.empty(codes.shape, dtype=dtype)
    scale = scale.reshape(-1, -(-outputs // height), -(-inputs // width)).expand(flat.shape[0], -1, -1)

    def values(rows: slice, one: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        own = scales[rows.start // height : -(-rows.stop // height)].repeat_interleave(height, 0)
        wide = own.repeat_interleave(width, 1) if scales.shape[1] > 1 else own
        return one[rows].float() * wide[: rows.stop - rows.start, : inputs if scales.shape[1] > 1 else 1]

    for part, one, scales in zip(out.view(flat.shape), flat, scale, strict=True):
        fill(part, partial(values, one=one, scales=scales), height)
    return out
