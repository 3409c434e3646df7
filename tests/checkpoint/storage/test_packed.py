"""Packing is that of compressed-tensors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoint.storage import bits as packing
from compress.checkpoint.storage.bits import pack_codes, unpack_codes


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 75), st.integers(0, 10_000))
def test_pack_to_int32_matches_compressed_tensors(bits, rows, count, seed):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-half, half, (rows, count), generator=generator, dtype=torch.int8)
    packed = pack_codes(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_codes(packed, bits, count), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


def test_unpack_codes_of_long_rows_by_parts(monkeypatch):
    codes = torch.randint(-4, 4, (1, 200), dtype=torch.int8)
    tall = torch.randint(-4, 4, (9, 41), dtype=torch.int8)
    whole = pack_codes(codes, 3), pack_codes(tall, 3)
    monkeypatch.setattr(packing, "_AT_ONCE", 64)
    for given_, packed in zip((codes, tall), whole, strict=True):
        assert torch.equal(pack_codes(given_, 3), packed)
        assert torch.equal(unpack_codes(packed, 3, given_.shape[1]), given_)
