"""Decoding of stored arrays into logical tensors, for every storage codec. docs/format.md specifies the codecs.

This file imports only torch: its text is copied into the modelling file of compact checkpoints, which must not import this
package. `codecs` has the encoding half.

In a dense float array a removed weight is +0.0 and a kept zero is -0.0. So the array carries its keep-mask; the metadata say
which tensors have one.
"""

from __future__ import annotations

from typing import Any

import torch

#: Codes unpacked at a time; a multiple of 32.
_AT_ONCE = 1 << 22
_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_CODED = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
    "codebook",
)
#: Values of the 16 E2M1 codes: one sign bit, two exponent bits, one mantissa bit.
_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def part_names(name: str, storage: tuple[str, ...], quant_format: dict[str, Any] | None = None) -> dict[str, str]:
    """Array names by role, for a tensor with this storage chain. Raises ValueError for an unknown chain."""
    masked = storage[0] == "mask"
    if storage in (("dense",), ("mask", "dense")):
        return {"keep": f"{name}.keep", "values": f"{name}.values"} if masked else {"values": name}
    if quant_format is None or storage[-1] not in _CODED or len(storage) != 1 + masked:
        raise ValueError(f"tensor {name} is stored by {' ∘ '.join(storage)}, which this version cannot read")
    if storage[-1] == "codebook":
        names = {"codes": f"{name}.codes", "scale": f"{name}.codebook"}
        return names | {"keep": f"{name}.keep"} if masked else names
    names = {"scale": f"{name}_scale"}
    if masked:
        names |= {"keep": f"{name}.keep", "codes": f"{name}.codes"}
    elif storage[0] in ("int-quantized", "float-quantized"):
        names["codes"] = name
    else:
        names["codes"] = f"{name}_packed"
        if storage[0] == "pack-quantized":
            names["shape"] = f"{name}_shape"
    if not quant_format["symmetric"]:
        names["zero"] = f"{name}_zero_point"
    if storage[0] == "nvfp4-pack-quantized":
        names["overall"] = f"{name}_global_scale"
    return names


def decode(
    parts: dict[str, torch.Tensor],
    storage: tuple[str, ...],
    shape: tuple[int, ...],
    masked: bool,
    quant_format: dict[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values of ``shape``, with removed weights +0.0, and the keep-mask, bool of ``shape``; None without one."""
    if storage == ("dense",):
        values = parts["values"].reshape(shape)
        return values, (values.view(_INT[values.element_size()]) != 0) if masked else None
    if quant_format is not None:
        found, mask = decode_codes(parts, storage, shape, quant_format)
        return logical_values(found, mask, quant_format), mask
    mask = unpack_bits(parts["keep"], shape)
    values = torch.zeros(shape, dtype=parts["values"].dtype, device=parts["values"].device)
    if int(mask.sum()) != parts["values"].numel():
        raise ValueError(f"the keep-mask keeps {int(mask.sum())} weights, {parts['values'].numel()} are stored")
    values.masked_scatter_(mask, parts["values"])
    return values, mask


#: Codes [O, I] (int8, float8, or E2M1 codes as uint8), scales [O, G], zero points [O, G] or None, and the global scale [1] or
#: None. With a codebook: int8 indices less half their range, shaped like the tensor, and its values [2**bits] as scales.
_Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def decode_codes(
    parts: dict[str, torch.Tensor], storage: tuple[str, ...], shape: tuple[int, ...], quant_format: dict[str, Any]
) -> tuple[_Codes, torch.Tensor | None]:
    """Codes, zero for removed weights, and the keep-mask, bool of ``shape``; None without one."""
    rows = (shape[1], shape[0]) if quant_format["transposed"] else shape
    mask = unpack_bits(parts["keep"], rows) if storage[0] == "mask" else None
    bits, found, scale, zero = int(quant_format["bits"]), parts["codes"], parts["scale"], parts.get("zero")
    if quant_format.get("whole"):
        scale, zero = scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1)
    if storage[-1] == "codebook" and len(scale) != 1 << bits:
        raise ValueError(f"a codebook of {bits} bits has {1 << bits} values, {len(scale)} are stored")
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack_codes(zero.T.contiguous(), bits, rows[0]).T.contiguous()
    if storage[0] == "mask":
        assert mask is not None
        kept = int(mask.sum())
        if found.numel() != -(-kept * bits // 32):
            raise ValueError(f"the keep-mask keeps {kept} weights, {found.numel()} words of codes are stored")
        full = torch.zeros(rows, dtype=torch.int8)
        if zero is not None:
            full = full + zero.repeat_interleave(rows[1] // zero.shape[1], 1)
        found = full.masked_scatter_(mask, unpack_codes(found[None], bits, kept)[0])
    elif storage[0] == "codebook":
        count = torch.Size(shape).numel()
        if found.numel() != -(-count * bits // 32):
            raise ValueError(f"there are {count} weights, {found.numel()} words of codes are stored")
        found = unpack_codes(found[None], bits, count).reshape(shape)
    elif storage[0] == "pack-quantized":
        found = unpack_codes(found, bits, rows[1])
    elif found.dtype == torch.uint8:
        found = torch.stack((found & 15, found >> 4), 2).flatten(1)
    across = mask.T.contiguous() if mask is not None and quant_format["transposed"] else mask
    return (found, scale, zero, parts.get("overall")), across


def logical_values(codes: _Codes, mask: torch.Tensor | None, quant_format: dict[str, Any]) -> torch.Tensor:
    """Dequantised values in the tensor's shape, with removed weights +0.0."""
    values = dequantized(*codes)
    values = values.T.contiguous() if quant_format["transposed"] else values
    return values if mask is None else values.masked_fill(~mask, 0)


def dequantized(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, overall: torch.Tensor | None
) -> torch.Tensor:
    """(q - z) · s, [O, I], computed in the dtype of s as compressed-tensors does; bfloat16 for four-bit floats.

    A ``scale`` with one axis is a codebook, and codes, of any shape, are indices into it.
    """
    if scale.ndim == 1:
        values = torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)
        for part, into in zip(
            torch.split(codes.flatten(), _AT_ONCE), torch.split(values.view(-1), _AT_ONCE), strict=True
        ):
            torch.index_select(scale, 0, part.int() + len(scale) // 2, out=into)
        return values
    dtype = None
    if codes.dtype == torch.uint8:
        codes, dtype = torch.tensor(_E2M1, device=codes.device)[codes.long()], torch.bfloat16
        if overall is None:
            scale = 2.0 ** (scale.to(torch.int32) - 127).to(torch.bfloat16)
        else:
            scale = scale.to(torch.bfloat16) / overall
    values = codes.reshape(codes.shape[0], scale.shape[1], -1).to(scale.dtype)
    if zero is not None:
        values = values - zero[..., None].to(scale.dtype)
    values = (values * scale[..., None]).flatten(1)
    return values if dtype is None else values.to(dtype)


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [R, W] ▶ int8 [R, count]: codes of ``bits`` bits without gaps, lowest bit first, less half their range."""
    rows, words = packed.shape
    if rows * count > _AT_ONCE:  # intermediate arrays take many times the memory
        if rows > 1:
            return torch.cat(
                [unpack_codes(part, bits, count) for part in torch.split(packed, max(1, _AT_ONCE // count))]
            )
        parts = torch.split(packed, _AT_ONCE // 32 * bits, 1)
        sizes = [min(_AT_ONCE, count - i * _AT_ONCE) for i in range(len(parts))]
        return torch.cat([unpack_codes(part, bits, size) for part, size in zip(parts, sizes, strict=True)], 1)
    octets = packed.contiguous().flatten().view(torch.uint8).view(rows, 4 * words)
    if 8 % bits == 0:  # no code spans two bytes
        found = torch.stack([(octets >> (bits * place)) & ((1 << bits) - 1) for place in range(8 // bits)], 2)
        found = found.view(rows, 4 * words * (8 // bits))[:, :count]
        return (found ^ 128).view(torch.int8) if bits == 8 else found.to(torch.int8) - (1 << (bits - 1))
    eights = -(-4 * words // bits)
    octets = torch.nn.functional.pad(octets, (0, eights * bits - 4 * words)).view(rows, eights, bits)
    found = torch.empty(rows, eights, 8, dtype=torch.uint8, device=packed.device)
    for number, code in enumerate(found.unbind(2)):
        first, shift = divmod(number * bits, 8)
        torch.bitwise_right_shift(octets[:, :, first], shift, out=code)
        if shift + bits > 8:
            code |= octets[:, :, first + 1] << (8 - shift)
    found = (found & ((1 << bits) - 1)).view(torch.int8) - (1 << (bits - 1))
    return found.view(rows, 8 * eights)[:, :count]


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 [ceil(n / 8)] ▶ bool of ``shape`` with n elements."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    count = 1
    for size in shape:
        count *= size
    return ((packed[:, None] >> bits) & 1).bool().flatten()[:count].reshape(shape)
