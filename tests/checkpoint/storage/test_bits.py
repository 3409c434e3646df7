"""Bits packed in bytes, by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoint.storage.bits import pack_bits, unpack_bits


@given(st.integers(0, 100), st.integers(0, 10_000))
def test_unpack_bits_by_hand(count, seed):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    expected = [sum(bool(b) << i for i, b in enumerate(mask.tolist()[s : s + 8])) for s in range(0, count, 8)]
    assert packed.tolist() == expected
    assert torch.equal(unpack_bits(packed, (count,)), mask)
