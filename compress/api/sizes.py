"""Sizes as the API takes them."""

from __future__ import annotations

from compress.errors import CompressError


def bytes_of(size: int | str) -> int:
    """A size as bytes. Raises `CompressError`."""
    from pydantic_core import PydanticCustomError

    from compress.settings import parse_size

    try:
        return parse_size(size)
    except PydanticCustomError as error:
        raise CompressError(str(error), where="max_shard_size") from None
