"""Bits in files: codes of 1 to 8 bits packed into 32-bit words, keep-masks packed into bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def words(count: int, bits: int) -> int:
    """Number of 32-bit words for ``count`` codes."""
    return -(-count * bits // 32)


def pack_codes(codes_RC: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes [R, C] ▶ int32 [R, ceil(C · bits / 32)].

    Codes are offset to be non-negative and packed without gaps, lowest bit first, as ``pack_to_int32`` of compressed-tensors
    does.
    """
    import torch

    rows, count = codes_RC.shape
    if rows * count > _AT_ONCE:  # intermediate arrays take many times the memory
        if rows > 1:
            return torch.cat([pack_codes(part, bits) for part in torch.split(codes_RC, max(1, _AT_ONCE // count))])
        return torch.cat([pack_codes(part, bits) for part in torch.split(codes_RC, _AT_ONCE, 1)], 1)
    half = 1 << (bits - 1)
    offset = (codes_RC ^ -128 if bits == 8 else codes_RC + half).contiguous().view(torch.uint8)
    words, eights = -(-count * bits // 32), -(-count // 8)
    offset = torch.nn.functional.pad(offset, (0, -count % 8))
    if 8 % bits == 0:  # no code spans two bytes
        per = 8 // bits
        parts = offset.view(rows, eights * bits, per).unbind(2)
        octets = parts[0].clone()
        for place, part in enumerate(parts[1:], 1):
            octets |= part << (bits * place)
    else:  # eight codes make `bits` whole bytes
        eight = offset.view(rows, eights, 8).unbind(2)
        octets = torch.zeros(rows, eights, bits, dtype=torch.uint8, device=offset.device)
        for place, octet in enumerate(octets.unbind(2)):
            for number, code in enumerate(eight):
                shift = number * bits - 8 * place
                if -bits < shift < 8:
                    octet |= code << shift if shift >= 0 else code >> -shift
        octets = octets.view(rows, eights * bits)
    octets = torch.nn.functional.pad(octets[:, : 4 * words], (0, max(0, 4 * words - octets.shape[1])))
    return octets.flatten().view(torch.int32).view(rows, words)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Bool mask of n elements ▶ uint8 [ceil(n / 8)], lowest bit first."""
    import torch

    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    weights = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    return (flat * weights).sum(1, dtype=torch.uint8)


# ---- reading: copied into the modelling file of compact checkpoints ----

#: Codes packed or unpacked at a time; a multiple of 32, so no word of a long row spans two pieces.
_AT_ONCE = 1 << 22


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [R, W] ▶ int8 [R, count]: codes of ``bits`` bits without gaps, lowest bit first, less half their range."""
    import torch

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
        codes = torch.stack([(octets >> (bits * place)) & ((1 << bits) - 1) for place in range(8 // bits)], 2)
        codes = codes.view(rows, 4 * words * (8 // bits))[:, :count]
        return (codes ^ 128).view(torch.int8) if bits == 8 else codes.to(torch.int8) - (1 << (bits - 1))
    eights = -(-4 * words // bits)
    octets = torch.nn.functional.pad(octets, (0, eights * bits - 4 * words)).view(rows, eights, bits)
    codes = torch.empty(rows, eights, 8, dtype=torch.uint8, device=packed.device)
    for number, code in enumerate(codes.unbind(2)):
        first, shift = divmod(number * bits, 8)
        torch.bitwise_right_shift(octets[:, :, first], shift, out=code)
        if shift + bits > 8:
            code |= octets[:, :, first + 1] << (8 - shift)
    codes = (codes & ((1 << bits) - 1)).view(torch.int8) - (1 << (bits - 1))
    return codes.view(rows, 8 * eights)[:, :count]


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 [ceil(n / 8)] ▶ bool of ``shape`` with n elements."""
    import torch

    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    count = 1
    for size in shape:
        count *= size
    return ((packed[:, None] >> bits) & 1).bool().flatten()[:count].reshape(shape)
