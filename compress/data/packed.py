"""The bytes of text files, plain or packed. Packed files are read in pieces, with a limit on what they unpack to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.errors import DataError, one_line
from compress.formatting import format_bytes

#: A packed file may unpack to ``RATIO`` times its bytes, and to ``ROOM`` bytes in any case. Text packs to a third or a tenth.
RATIO = 100
ROOM = 1 << 28
#: Bytes unpacked at a time; packed bytes given to zstandard at a time, which become at most 32,000 times as many.
_PIECE = 1 << 20
_ZST_PIECE = 1 << 12


def unpacked(path: Path) -> bytes:
    """A file's bytes, decompressed. Raises `DataError`: missing, empty, damaged, or unpacking to far more than text does."""
    check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        )
        raise DataError(reason, where=str(path)) from None
    read = {".gz": _gunzipped, ".zst": _unzstd}.get(path.suffix.lower())
    if data and read is not None:
        room, parts = room_for(len(data)), []
        for part in read(path, data):
            parts.append(part)
            room -= len(part)
            if room < 0:
                raise too_much(path, len(data))
        data = b"".join(parts)
    if not data:
        raise DataError("is empty", where=str(path))
    return data


def check_file(path: Path) -> None:
    """Raise `DataError` for a device or a pipe, which may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError("is not a file of text", where=str(path), fix="name a file")


def room_for(size: int) -> int:
    """Bytes that a packed file of that size may unpack to."""
    return max(ROOM, RATIO * size)


def too_much(path: Path, size: int) -> DataError:
    """The error for a file that unpacks to more than `room_for`."""
    return DataError(
        f"its {format_bytes(size)} unpack to more than {format_bytes(room_for(size))}, which no text does",
        where=str(path),
        fix="unpack it yourself if it is meant so",
    )


def lacking(path: Path, package: str) -> DataError:
    """The error for a file whose reader is not installed."""
    return DataError(
        f"needs the package {package}, which is not installed",
        where=str(path),
        fix="pip install 'compress-toolkit[data]'",
    )


def _gunzipped(path: Path, data: bytes) -> Iterator[bytes]:
    import gzip
    import io
    import zlib

    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while part := file.read(_PIECE):
                yield part
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"is damaged: {one_line(error)}", where=str(path), fix="`gzip -t` tests such files") from None


def _unzstd(path: Path, data: bytes) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise lacking(path, "zstandard") from None
    try:
        frame = None
        for start in range(0, len(data), _ZST_PIECE):
            part = data[start : start + _ZST_PIECE]
            while part:  # a file may be several frames
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(part)
                part = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise zstandard.ZstdError("the file ends too early")
    except zstandard.ZstdError as error:
        raise DataError(f"is damaged: {one_line(error)}", where=str(path), fix="`zstd -t` tests such files") from None
