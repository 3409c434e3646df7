"""Storage chains: choice of the chain, exact names and shapes of the stored arrays, and encoding.

Planning needs no torch. `decode` has the decoding half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

from compress.architectures.model_map import model_map
from compress.spec.formats import QuantFormat
from compress.spec.spec import (
    CODEBOOK,
    DENSE,
    DTYPE_BITS,
    FP8,
    INT8,
    MASKED,
    MXFP4,
    NVFP4,
    PACKED,
    Spec,
    Tensor,
)

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Value

Store = Literal["stock", "compact"]
#: Codes packed at a time; a multiple of 32, so no word of a long row spans two pieces.
_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One array of a file, which stores part of a logical tensor. ``role``: its name in `encode` and `decode`."""

    key: str
    role: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def parts(tensor: Tensor) -> list[StoredPart]:
    """Arrays that the tensor's storage chain writes, with names, dtypes and shapes."""
    name = tensor.name
    if tensor.storage == DENSE:
        return [StoredPart(name, "values", tensor.shape, tensor.dtype)]
    if tensor.quant_format is None:
        assert tensor.storage == MASKED, tensor
        assert tensor.kept is not None, tensor
        return [_keep(tensor), StoredPart(f"{name}.values", "values", (tensor.kept,), tensor.dtype)]
    quant_format, chain = tensor.quant_format, tensor.storage[-1:]
    assert quant_format.is_codebook == (chain == CODEBOOK), tensor
    if quant_format.is_codebook:
        masked = tensor.storage[0] == "mask"
        assert masked == (tensor.kept is not None), tensor
        count = tensor.count if tensor.kept is None else tensor.kept
        return ([_keep(tensor)] if masked else []) + [
            StoredPart(f"{name}.codes", "codes", (_words(count, quant_format.bits),), "I32"),
            StoredPart(f"{name}.codebook", "scale", (1 << quant_format.bits,), tensor.dtype),
        ]
    outputs, inputs = quant_format.rows(tensor.shape)
    scales = quant_format.scales(tensor.shape)
    beside = [_given(tensor, name) for name in quant_format.given]
    zero = not quant_format.symmetric
    if tensor.storage[0] == "mask":
        assert tensor.kept is not None, tensor
        found = [_keep(tensor), StoredPart(f"{name}.codes", "codes", (_words(tensor.kept, quant_format.bits),), "I32")]
        found.append(StoredPart(f"{name}_scale", "scale", scales, tensor.dtype))
        return found + ([_packed_zero(name, scales, quant_format)] if zero else [])
    if chain == PACKED:
        found = [
            StoredPart(f"{name}_packed", "codes", (outputs, _words(inputs, quant_format.bits)), "I32"),
            StoredPart(f"{name}_scale", "scale", scales, tensor.dtype),
            StoredPart(f"{name}_shape", "shape", (2,), "I64"),
        ]
        return found + ([_packed_zero(name, scales, quant_format)] if zero else [])
    if chain in (INT8, FP8):
        found = [
            StoredPart(name, "codes", (outputs, inputs), "I8" if chain == INT8 else "F8_E4M3"),
            StoredPart(f"{name}_scale", "scale", scales, tensor.dtype),
        ]
        return found + ([StoredPart(f"{name}_zero_point", "zero", scales, "I8")] if zero else []) + beside
    found = [
        StoredPart(f"{name}_packed", "codes", (outputs, inputs // 2), "U8"),
        StoredPart(f"{name}_scale", "scale", scales, "U8" if chain == MXFP4 else "F8_E4M3"),
    ]
    return found + ([StoredPart(f"{name}_global_scale", "overall", (1,), "F32")] if chain == NVFP4 else []) + beside


def _keep(tensor: Tensor) -> StoredPart:
    return StoredPart(f"{tensor.name}.keep", "keep", ((tensor.count + 7) // 8,), "U8")


def _given(tensor: Tensor, name: str) -> StoredPart:
    """Static scale or zero point of a layer's inputs, stored beside its weight."""
    assert tensor.quant_format is not None
    dtype = {
        "input_scale": tensor.quant_format.given_dtype or tensor.dtype,
        "input_zero_point": "I8",
        "input_global_scale": "F32",
    }[name]
    return StoredPart(f"{tensor.module}.{name}", name, (1,), dtype)


def _packed_zero(name: str, scales: tuple[int, ...], quant_format: QuantFormat) -> StoredPart:
    """Zero points packed along the outputs."""
    return StoredPart(f"{name}_zero_point", "zero", (_words(scales[0], quant_format.bits), scales[1]), "I32")


def _words(count: int, bits: int) -> int:
    """Number of 32-bit words for ``count`` codes."""
    return -(-count * bits // 32)


def with_storage(spec: Spec, store: Store) -> Spec:
    """Spec with the smallest storage chain that ``store`` allows for each tensor; dense wins ties.

    Stock files cannot store the keep-mask of quantised weights, so the zeros are written and the mask is lost. Codes that stock
    loaders cannot read are written as floats. A codebook may lack the value zero, so its keep-mask is always stored.
    """

    holds = stock_holds(spec)

    def choose(tensor: Tensor) -> Tensor:
        masked = store == "compact" and tensor.kept is not None
        if store == "stock" and not holds(tensor):
            return replace(tensor, quant_format=None, kept=None, storage=DENSE)
        if tensor.quant_format is not None:
            plain = stock_chain(tensor.quant_format)
            candidates = [plain, ("mask", *plain)] if masked and tensor.quant_format.is_integer else [plain]
            if masked and tensor.quant_format.is_codebook:
                candidates = [("mask", *plain)]
        else:
            candidates = [DENSE, MASKED] if masked else [DENSE]
        options = [replace(tensor, storage=chain) for chain in candidates]
        best = min(options, key=lambda t: sum(part.bytes for part in parts(t)))
        return best if best.quant_format is None or best.storage[0] == "mask" else replace(best, kept=None)

    return spec.map(choose)


def stock_chain(quant_format: QuantFormat) -> tuple[str, ...]:
    """Storage chain of a number format: its format in compressed-tensors, or the codebook chain."""
    if quant_format.is_codebook:
        return CODEBOOK
    if quant_format.is_integer:
        return (
            INT8 if quant_format.bits == 8 and (quant_format.activations is not None or quant_format.whole) else PACKED
        )
    return {"fp8": FP8, "mxfp4": MXFP4, "nvfp4": NVFP4}[quant_format.format]


def needs_code(spec: Spec) -> bool:
    """Whether only the bundled modelling file can load the spec as stored, so that the checkpoint is a compact one."""
    holds = stock_holds(spec)
    return bool(spec.structure.edits) or any(t.storage[0] == "mask" or not holds(t) for t in spec.stored())


def stock_holds(spec: Spec) -> Callable[[Tensor], bool]:
    """Predicate: whether stock loaders read a tensor of the spec as stored. They read plain values and codes of linear layers.

    Tried with transformers 5.24 and compressed-tensors 0.20. They refuse packed zero points, although the format defines them.
    Experts are fused in memory and decoded on loading, so all must have one format. Dense experts are not found beside codes of
    any format but fp8.
    """
    mapped = model_map(spec)
    coded = [t for t in spec.stored() if t.quant_format is not None]
    if not mapped.known or not coded:
        return lambda tensor: tensor.quant_format is None
    record = mapped.record
    outside = [*record.embeddings, *filter(None, [record.head])]
    experts = {t.quant_format for t in spec.stored() if len(t.shape) == 2 and mapped.is_expert(t.name)}
    fused = {quant_format and fusible(quant_format) for quant_format in experts} == {True} and len(experts) == 1
    beside = (
        not experts
        or fused
        or (experts == {None} and all(t.quant_format and stock_chain(t.quant_format) == FP8 for t in coded))
    )

    def holds(tensor: Tensor) -> bool:
        quant_format = tensor.quant_format
        if quant_format is None:
            return True
        if (
            not beside
            or quant_format.transposed
            or quant_format.is_codebook
            or (stock_chain(quant_format) == PACKED and not quant_format.symmetric)
        ):
            return False
        if not record.packable and stock_chain(quant_format) not in (INT8, FP8):
            return False
        return not any(f".{module}." in f".{tensor.name}" for module in outside)

    return holds


def fusible(quant_format: QuantFormat) -> bool:
    """Whether transformers, which fuses experts in memory, reads experts of this format; it ignores their input scales."""
    return (
        quant_format.activations is None
        and quant_format.symmetric
        and not quant_format.is_codebook
        and quant_format.format != "nvfp4"
    )


def stock_value(value: Value, tensor: Tensor) -> Value:
    """The value without the parts that the tensor's storage drops: codes, or the keep-mask of codes."""
    if value.codes is None or (tensor.quant_format is not None and tensor.kept is not None):
        return value
    from compress.checkpoint.values import Value

    return Value(lambda: value.data, None, None if tensor.quant_format is None else value.codes)


def encode(value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
    """Contiguous arrays by role, as `parts` lists them, of a value in canonical form (see `canonical`)."""
    if tensor.storage == DENSE:
        return {"values": value.data.contiguous()}
    if tensor.quant_format is None:
        assert value.mask is not None
        return {"keep": pack_bits(value.mask), "values": value.data[value.mask]}
    import torch

    found, bits = value.codes, tensor.quant_format.bits
    assert found is not None, tensor
    result = {"scale": found.scale.flatten() if tensor.quant_format.whole else found.scale.contiguous(), **found.given}
    if tensor.storage[0] == "mask":
        assert value.mask is not None
        mask = value.mask.T if tensor.quant_format.transposed else value.mask
        result |= {"keep": pack_bits(mask), "codes": pack_codes(found.codes[mask][None], bits)[0]}
    elif tensor.storage == CODEBOOK:
        result["codes"] = pack_codes(found.codes.reshape(1, -1), bits)[0]
    elif tensor.storage == PACKED:
        result |= {"codes": pack_codes(found.codes, bits), "shape": torch.tensor(found.codes.shape)}
    elif tensor.storage in (INT8, FP8):
        result["codes"] = found.codes.contiguous()
    else:
        result["codes"] = (found.codes[:, 0::2] | (found.codes[:, 1::2] << 4)).contiguous()
    if found.zero is not None:
        plain = tensor.storage == INT8
        zero = found.zero.flatten() if tensor.quant_format.whole else found.zero
        result["zero"] = zero.contiguous() if plain else pack_codes(found.zero.T, bits).T.contiguous()
    if found.overall is not None:
        result["overall"] = found.overall
    return result


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
