"""Rows of data sets on the Hugging Face hub, kept in files of this machine. Needs neither torch nor numpy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from compress.errors import DataError, one_line
from compress.files import disk_errors, write_atomically


def check_package(dataset: str) -> None:
    """Raise `DataError` without the package that reads data sets of the hub."""
    if find_spec("datasets") is None:
        raise DataError(
            f"{dataset}: data sets of the hub need the package datasets", fix="pip install 'compress-toolkit[hub]'"
        )


def kept_rows(
    dataset: str, subset: str | None, split: str, rows: int, columns: Sequence[str], *, offline: bool = False
) -> Path:
    """The file with the first rows of a split, a JSON object a line; they are downloaded once.

    Args:
        dataset: id on the hub, optionally with @revision. subset: name of one of its configurations; None for the only one.
        columns: what is kept of each row: texts, labels, or chats as lists of messages.
        offline: use the file of an earlier call only.

    Raises:
        DataError: the package `datasets` is missing, the data set cannot be had, or lacks the split, rows or a column.
    """
    asked = json.dumps([dataset, subset, split, rows, list(columns)])
    name = f"{dataset.partition('@')[0].replace('/', '--')}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.jsonl"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress" / "datasets" / name
    if path.is_file():
        return path
    if offline:
        raise DataError("is not in the local cache", where=dataset, fix="run once without --offline")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(dataset, subset, split, rows, columns)]
    if not lines:
        raise DataError(f"the split {split} has no rows", where=dataset)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(lines).encode("utf-8", "replace"))
    return path


def _rows(
    dataset: str, subset: str | None, split: str, rows: int, columns: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    check_package(dataset)
    import datasets

    name, _, revision = dataset.partition("@")
    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True, revision=revision or None)
        for row in islice(stream, rows):
            if absent := [column for column in columns if column not in row]:
                raise DataError(
                    f"has no column `{absent[0]}`", where=dataset, fix=f"there are: {', '.join(map(str, row))}"
                )
            yield {column: _plain(row[column], column, dataset) for column in columns}
    except DataError:
        raise
    except Exception as error:  # what the package raises of ids, splits, networks and files is of many kinds
        raise DataError(
            f"cannot be read from the hub ({type(error).__name__}: {one_line(error)})",
            where=dataset,
            fix="check the id, `subset` and `split`, or the network",
        ) from error


def _plain(value: Any, column: str, dataset: str) -> Any:
    """The value, if JSON can hold it. Raises `DataError` for images, sounds and bytes."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise DataError(f"`{column}` is no text ({type(value).__name__})", where=dataset) from None
    return value
