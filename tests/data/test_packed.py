"""Packed text is read in pieces, and no more of it than its size lets expect."""

from __future__ import annotations

import gzip
import os
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from compress.data import packed
from compress.data.documents import read_documents
from compress.errors import DataError


def bomb(packing: str, size: int) -> bytes:
    """So many bytes of one word, packed."""
    if packing == ".gz":
        return gzip.compress(b"word " * (size // 5))
    return zstandard.ZstdCompressor().compress(b"word " * (size // 5))


@pytest.mark.parametrize("packing", [pytest.param(".gz", marks=pytest.mark.slow), ".zst"])
def test_read_documents_refuses_decompression_bombs(packing, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "ROOM", 1 << 20)
    (tmp_path / f"x.txt{packing}").write_bytes(bomb(packing, 100 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"unpack to more than .* MB, which no text does; unpack it yourself"):
        read_documents([str(tmp_path / f"x.txt{packing}")])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (100 << 20) // 2
    ordinary = b" ".join(random.Random(0).randbytes(4).hex().encode() for _ in range(20_000))
    data = gzip.compress(ordinary) if packing == ".gz" else zstandard.ZstdCompressor().compress(ordinary)
    (tmp_path / f"y.txt{packing}").write_bytes(data + data)  # two frames
    assert read_documents([str(tmp_path / f"y.txt{packing}")])[0].text == (ordinary + ordinary).decode()
    (tmp_path / f"z.txt{packing}").write_bytes(data[:-20])
    with pytest.raises(DataError, match="is damaged"):
        read_documents([str(tmp_path / f"z.txt{packing}")])


def test_read_documents_refuses_repeated_parquet_dictionary_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "ROOM", 1 << 20)
    table = pyarrow.table({"text": pyarrow.array(["x" * 5000] * 5000).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 20_000
    with pytest.raises(DataError, match="unpack to more than"):
        read_documents([str(tmp_path / "x.parquet")])


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_packed_refuses_other_than_files(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a file of text"):
        packed.unpacked(tmp_path / name)
