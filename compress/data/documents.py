"""Text files ▶ documents. Needs neither torch nor numpy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.chats import Message, chat_text, read_messages
from compress.data.kinds import FIELD, kind, refusal
from compress.data.packed import check_file, unpacked
from compress.data.row_templates import fill_template, template_columns
from compress.data.rows import ColumnNames, decode_text, is_spellable, read_rows, row_place
from compress.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is scored by itself.

    Attributes:
        id: ``file#index``, the file's name without its folders.
        text: the text; for a chat the text of its messages one after the other. `rendering.rendered` is what a model reads.
        messages: the messages of a chat, with ``role`` and ``content`` (see `chats.read_messages`); None for plain text.
        pair: both texts where two are read together (``text`` is one after the other); None for one text.
        label: id of the label, or score, of a labelled text.
        image: path of an image that is read in place of text (`compress.data.images`).
        speech: path of a sound that is read, of which the text is the transcript (`compress.data.speech`).
    """

    id: str
    text: str
    messages: tuple[Message, ...] | None = None
    pair: tuple[str, str] | None = None
    label: float | None = None
    image: str | None = None
    speech: str | None = None


def read_documents(
    files: Sequence[str], separator: str | None = None, field: str = FIELD, template: str | None = None
) -> list[Document]:
    """Read the documents of text files, in order; empty ones are left out.

    A ``.txt`` file is one document, or several with lines ``separator`` between them. Files with named fields give one
    document a row: ``.jsonl`` and ``.json``, one object a line or an array of them; ``.csv`` and ``.tsv``, whose first row
    holds the names; ``.parquet``. Each may be packed as ``.gz`` or ``.zst``. A field of a ``.jsonl``, ``.json`` or
    ``.parquet`` file may hold chats: lists of messages (see `chats.read_messages`).

    Args:
        files: text in UTF-8, with or without byte order mark.
        separator: a line that stands alone between two documents of a ``.txt`` file.
        field: the field to read, in files that have fields.
        template: in place of ``field``, the text of a row, with names of columns in braces (see `template_columns`).

    Raises:
        DataError: a file is missing, empty, damaged, not UTF-8, of another kind, lacks the field, or mixes chats and texts.
    """
    columns = {field: "field"} if template is None else dict.fromkeys(template_columns(template), "template")
    documents: list[Document] = []
    names: dict[str, int] = {}
    for file in files:
        path = Path(file)
        if reason := refusal(path, ids=False):
            raise DataError(reason, where=file)
        rows: Iterable[tuple[int, Any]]
        if kind(path) == ".txt":
            rows = enumerate(_split(decode_text(path, unpacked(path)), separator))
        else:
            rows = read_rows(path, columns)
            rows = (
                _joined(rows, columns, template, row_place(path)) if template else ((n, value) for n, (value,) in rows)
            )
        kept = list(_pieces(rows, row_place(path), field))
        if not kept:
            raise DataError("holds no text", where=file)
        first = names.get(path.name, 0)
        names[path.name] = first + len(kept)
        documents += [Document(f"{path.name}#{first + i}", text, messages) for i, (text, messages) in enumerate(kept)]
    return documents


def check_columns(files: Sequence[str], columns: ColumnNames) -> None:
    """Raise `DataError` where a file lacks one of these columns; reads the header or the first row."""
    for file in files:
        next(iter(read_rows(Path(file), columns)), None)


def excerpt(value: Any) -> str:
    """The beginning of a JSON value, for messages."""
    return json.dumps(value, default=str, ensure_ascii=False)[:40]


def _split(text: str, separator: str | None) -> list[str]:
    if separator is None:
        return [text]
    pieces: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip() == separator.strip():
            pieces.append([])
        else:
            pieces[-1].append(line)
    return ["\n".join(piece) for piece in pieces]


def _pieces(
    rows: Iterable[tuple[int, Any]], where: str, field: str
) -> Iterator[tuple[str, tuple[Message, ...] | None]]:
    """(text, messages) of every row that has any text. ``where`` is followed by a row's number in errors."""
    chats: bool | None = None
    for number, value in rows:
        if value is None:
            continue
        if not isinstance(value, (str, list)):
            raise DataError(
                f"`{field}` is {json.dumps(value, default=str)[:40]}, not text or a list of messages",
                where=f"{where}{number}",
            )
        messages = read_messages(value, field, f"{where}{number}") if isinstance(value, list) else None
        text = value if isinstance(value, str) else chat_text(messages or ())
        if not text.strip():
            continue
        if chats is not None and chats != (messages is not None):
            raise DataError(
                f"`{field}` is {'text' if chats else 'a chat'}, and {'a chat' if chats else 'text'} in rows before",
                where=f"{where}{number}",
                fix="keep texts and chats in files of their own",
            )
        chats = messages is not None
        if not is_spellable(text):
            raise DataError(f"`{field}` holds half a surrogate pair, which is not a text", where=f"{where}{number}")
        yield text, messages


def _joined(
    rows: Iterable[tuple[int, tuple[Any, ...]]], columns: ColumnNames, template: str, where: str
) -> Iterator[tuple[int, str | None]]:
    """The filled template of every row; None for a row whose columns are all empty."""
    for number, values in rows:
        texts = {}
        for name, value in zip(columns, values, strict=True):
            if isinstance(value, (list, dict, bool, bytes)):
                raise DataError(f"`{name}` is {excerpt(value)}, not text", where=f"{where}{number}")
            texts[name] = "" if value is None else str(value)
        yield number, fill_template(template, texts) if any(text.strip() for text in texts.values()) else None


def fingerprint(files: Sequence[str]) -> str:
    """SHA-256 of the files' contents, in order. Raises `DataError`."""
    whole = hashlib.sha256()
    for file in files:
        try:
            check_file(Path(file))
            with Path(file).open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=file) from None
    return whole.hexdigest()
