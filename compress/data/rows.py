"""Files with named fields ▶ rows: JSON, CSV, TSV and Parquet. Needs neither torch nor numpy."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from compress.data.kinds import kind
from compress.data.packed import lacking, room_for, too_much, unpacked
from compress.errors import DataError, one_line

#: Rows of a parquet file read at a time.
_ROWS = 1024
_BLANK = re.compile(r"[ \t\r\n]*")

#: Names of fields, each with the setting that names it, for messages.
ColumnNames: TypeAlias = Mapping[str, str]


def decode_text(path: Path, data: bytes) -> str:
    """A file's UTF-8 text, with ``\\n`` at the ends of lines. Raises `DataError`: binary data, or not UTF-8."""
    if b"\0" in data:
        raise DataError("is binary, not text", where=str(path))
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError("is not UTF-8", where=f"{path}:{line}", fix="convert it, for example with iconv") from None


def row_place(path: Path) -> str:
    """The file's path in errors, to be followed by a row's number."""
    return f"{path}: row " if kind(path) == ".parquet" else f"{path}:"


def read_rows(path: Path, columns: ColumnNames) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Read a file with named fields: (number, values of the columns in order) for each row, numbered as people count them.

    Raises:
        DataError: the file is missing, damaged or not UTF-8, or lacks a column.
    """
    data = unpacked(path)
    if kind(path) == ".parquet":
        return _parquet(path, data, columns)
    text = decode_text(path, data)
    if kind(path) in (".jsonl", ".json"):
        return _records(path, _json_array(path, text) if _is_array(text) else _json_lines(path, text), columns)
    return _table(path, text, columns, "\t" if kind(path) == ".tsv" else ",")


def _is_array(text: str) -> bool:
    """Whether JSON text is one array of records, not one record per line."""
    return re.match(r"\s*\[\s*[{\]]", text) is not None


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _no_json(path, number, error, line.strip() == "{") from None


def _json_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Records of an array, each with the number of the line that it begins in."""
    decoder, line, counted = json.JSONDecoder(), 1, 0

    def at(place: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, place), place
        return line

    def blank(place: int) -> int:
        return _BLANK.match(text, place).end()  # type: ignore[union-attr]

    place = blank(text.index("[") + 1)
    while text[place : place + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _no_json(path, at(place), error) from None
        yield at(place), row
        place = blank(end)
        if text[place : place + 1] == ",":
            place = blank(place + 1)
        elif text[place : place + 1] != "]":
            raise _no_json(path, at(place), "the array goes on without `,` or `]`")
    if text[place + 1 :].strip():
        raise _no_json(path, at(place), "text follows the array", unlike_records=True)


def _no_json(path: Path, line: int, error: Exception | str, unlike_records: bool = False) -> DataError:
    fix = "write one object a line, or one array of them" if unlike_records else None
    reason = error if isinstance(error, str) else one_line(error)
    return DataError(f"is not JSON: {reason}", where=f"{path}:{line}", fix=fix)


def _records(
    path: Path, rows: Iterable[tuple[int, Any]], columns: ColumnNames
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    for number, row in rows:
        if not isinstance(row, dict):
            raise DataError(f'expected {{"{next(iter(columns))}": "…"}}', where=f"{path}:{number}")
        if absent := [name for name in columns if name not in row]:
            raise _no_field(f"{path}:{number}", absent[0], columns, row)
        yield number, tuple(row[name] for name in columns)


def _table(path: Path, text: str, columns: ColumnNames, delimiter: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
    import csv

    before = csv.field_size_limit(2**31 - 1)  # 128 kB by default, less than a long document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for name in columns:
            if names.count(name) > 1:
                raise DataError(f"has {names.count(name)} fields `{name}`", where=str(path), fix="rename one")
            if name not in names:
                raise _no_field(f"{path}:1", name, columns, names)
        places = [names.index(name) for name in columns]
        for row in reader:
            if row and len(row) != len(names):
                raise DataError(
                    f"has {len(row)} field{'s' * (len(row) != 1)}, the first row names {len(names)}",
                    where=f"{path}:{reader.line_num}",
                )
            if row:
                yield reader.line_num, tuple(row[place] for place in places)
    except csv.Error as error:
        raise DataError(f"is not a {kind(path)[1:]}: {error}", where=f"{path}:{reader.line_num}") from None
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, data: bytes, columns: ColumnNames) -> Iterator[tuple[int, tuple[Any, ...]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise lacking(path, "pyarrow") from None
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        if absent := [name for name in columns if name not in names]:
            raise _no_field(str(path), absent[0], columns, names)
        room = room_for(len(data))
        if sum(_column_bytes(file.metadata.row_group(i)) for i in range(file.metadata.num_row_groups)) > room:
            raise too_much(path, len(data))
        for batch in file.iter_batches(batch_size=_ROWS, columns=list(columns)):
            for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                number += 1
                room -= sum(len(value) for value in values if isinstance(value, str))
                if room < 0:  # a text that stands once in the file may be that of a thousand million rows
                    raise too_much(path, len(data))
                yield number, values
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # those that pyarrow documents for damaged files
        raise DataError(f"is damaged: {one_line(error)}", where=str(path)) from None


def _column_bytes(group: Any) -> int:
    """Unpacked bytes of a row group's largest column, by the file's metadata."""
    return max((int(group.column(i).total_uncompressed_size) for i in range(group.num_columns)), default=0)


def _no_field(where: str, field: str, columns: ColumnNames, names: Iterable[str]) -> DataError:
    shown = [name if len(name) <= 40 else f"{name[:39]}…" for name in names]
    return DataError(
        f"has no field `{field}`",
        where=where,
        fix=f"{'there are' if columns[field] == 'template' else f'set `{columns[field]}` to one of'}: "
        f"{', '.join(shown[:12])}{', …' if len(shown) > 12 else ''}"
        if shown
        else None,
    )


def is_spellable(text: str) -> bool:
    """Whether UTF-8 can spell it; JSON can spell more."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
