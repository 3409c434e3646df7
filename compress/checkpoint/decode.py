"""Stored parts ▶ logical tensors: the reading half of every storage codec.

This file needs torch alone: its text is also placed at the top of the bundled modelling file of compact checkpoints,
which must not import this package. A codec that a later pass adds gets its `decode` here and its `encode` in `codecs`.

A chain lists codecs outermost first. ``("mask", "dense")``: part ``.keep`` holds the keep-mask, 8 weights a byte,
lowest bit first, padded with zeros; part ``.values`` the kept weights in row-major order. ``("dense",)``: one part with
the tensor's own name. In a dense part a removed weight is +0.0 and a kept weight that is zero is stored as -0.0, so a
keep-mask survives a dense float file without a byte of its own (the metadata say which tensors have one).
"""

from __future__ import annotations

import torch

_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def part_names(name: str, storage: tuple[str, ...]) -> dict[str, str]:
    """Role ▶ key in the file, for a tensor stored by this chain."""
    if storage == ("dense",):
        return {"values": name}
    if storage == ("mask", "dense"):
        return {"keep": f"{name}.keep", "values": f"{name}.values"}
    raise ValueError(f"tensor {name} is stored by {' ∘ '.join(storage)}, which this version cannot read")


def decode(
    parts: dict[str, torch.Tensor], storage: tuple[str, ...], shape: tuple[int, ...], masked: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values (of ``shape``, removed weights +0.0) and the keep-mask (bool, of ``shape``), None where there is none."""
    if storage == ("dense",):
        values = parts["values"].reshape(shape)
        return values, (values.view(_INT[values.element_size()]) != 0) if masked else None
    assert storage == ("mask", "dense"), storage
    mask = unpack_bits(parts["keep"], shape)
    values = torch.zeros(shape, dtype=parts["values"].dtype, device=parts["values"].device)
    if int(mask.sum()) != parts["values"].numel():
        raise ValueError(f"the keep-mask keeps {int(mask.sum())} weights, {parts['values'].numel()} are stored")
    values.masked_scatter_(mask, parts["values"])
    return values, mask


def unpack_bits(packed: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 [ceil(n / 8)] ▶ bool of ``shape`` with n elements."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    count = 1
    for size in shape:
        count *= size
    return ((packed[:, None] >> bits) & 1).bool().flatten()[:count].reshape(shape)
