"""Text files ▶ documents. Needs neither torch nor numpy."""

from __future__ import annotations

import hashlib
import io
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from compress.data import templates
from compress.data.chats import Message, read_messages, said
from compress.data.packed import check_file, lacking, room_for, too_much, unpacked
from compress.errors import DataError, one_line

#: Kinds of files that hold text, and those with named fields among them; how each may be packed; files of token ids.
TEXT_KINDS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
FIELD_KINDS = TEXT_KINDS[1:]
PACKINGS = (".gz", ".zst")
ID_KINDS = (".npy", ".safetensors")
#: The field that is read where none is named.
FIELD = "text"
#: Words of a shingle; shingles of a passage; the share of its shingles found elsewhere at which a passage is shared.
SHINGLE = 13
PASSAGE = 40
SHARED = 0.5
#: Rows of a parquet file read at a time.
_ROWS = 1024
_BLANK = re.compile(r"[ \t\r\n]*")


#: Names of fields, each with the setting that names it.
ColumnNames: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is scored by itself.

    Attributes:
        id: ``file#index``, the file's name without its folders.
        text: of a chat what its messages say, one after the other; `rendered` gives what a model is shown.
        messages: of a chat, each with ``role`` and ``content`` (see `chats.read_messages`); None for plain text.
        pair: of two texts that are read together, both (``text`` says one after the other); None for one text.
        label: of a labelled text the id of its label, or its score.
        image: path of an image that is read in place of text (`compress.data.images`).
    """

    id: str
    text: str
    messages: tuple[Message, ...] | None = None
    pair: tuple[str, str] | None = None
    label: float | None = None
    image: str | None = None


def kind(file: str | Path) -> str:
    """The suffix that says what a file holds, in small letters: ``.jsonl`` of ``a.jsonl.gz``."""
    path = Path(file)
    return (path.with_suffix("") if path.suffix.lower() in PACKINGS else path).suffix.lower()


def holds_ids(file: str | Path) -> bool:
    """Whether a file holds token ids rather than text, by its name."""
    return Path(file).suffix.lower() in ID_KINDS


def refusal(file: str | Path, *, ids: bool) -> str | None:
    """Why a file cannot be read, by its name alone; None where it can. ``ids``: token ids will do."""
    if holds_ids(file):
        return None if ids else "holds token ids, which only calibration takes"
    if kind(file) in TEXT_KINDS:
        return None
    path = Path(file)
    return f"is no {', '.join(TEXT_KINDS[:-1])} or {TEXT_KINDS[-1]} file (`{path.suffix or path.name}`)"


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template ``{one} and {other}`` names, each once; ``{{`` and ``}}`` are braces. Raises `ValueError`."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template cannot be read: {error}; {{{{ and }}}} are braces") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name.strip() or form or conversion):
            raise ValueError(f"the template names a column as {{column}}, not {{{name}{f':{form}' if form else ''}}}")
    if not (names := tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))):
        raise ValueError("the template names no column: write {column} where its value goes")
    return names


def filled(template: str, values: Mapping[str, str]) -> str:
    """The text of a template whose columns have these values."""
    return "".join(
        text + ("" if name is None else values[name]) for text, name, _, _ in string.Formatter().parse(template)
    )


def read_documents(
    files: Sequence[str], separator: str | None = None, field: str = FIELD, template: str | None = None
) -> list[Document]:
    """Documents of text files, in order; empty ones are left out.

    A ``.txt`` file is one document, or several with lines ``separator`` between them. Files with named fields give one
    document a row: ``.jsonl`` and ``.json``, one object a line or an array of them; ``.csv`` and ``.tsv``, whose first row
    holds the names; ``.parquet``. Each may be packed as ``.gz`` or ``.zst``. A field of a ``.jsonl``, ``.json`` or
    ``.parquet`` file may hold chats: lists of messages (see `chats.read_messages`).

    Args:
        files: text in UTF-8, with or without byte order mark.
        separator: a line that stands alone between two documents of a ``.txt`` file.
        field: the one to read, of files that have fields.
        template: in place of ``field``, the text of a row with names of columns in braces (see `template_columns`).

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
            rows = enumerate(_split(_decoded(path, unpacked(path)), separator))
        else:
            rows = _columns(path, columns)
            rows = _joined(rows, columns, template, _place(path)) if template else ((n, value) for n, (value,) in rows)
        kept = list(_pieces(rows, _place(path), field))
        if not kept:
            raise DataError("holds no text", where=file)
        first = names.get(path.name, 0)
        names[path.name] = first + len(kept)
        documents += [Document(f"{path.name}#{first + i}", text, messages) for i, (text, messages) in enumerate(kept)]
    return documents


def check_columns(files: Sequence[str], columns: ColumnNames) -> None:
    """Each file has these columns, by its head: names, or its first row. Raises `DataError`."""
    for file in files:
        next(iter(_columns(Path(file), columns)), None)


@dataclass(frozen=True, slots=True)
class Labels:
    """Where labels are and what they may be.

    Attributes:
        field: that holds them. read: the id or score that a value of it says, None where it says none.
        what: they are, and ``known``: which there are, for messages.
    """

    field: str
    read: Callable[[Any], float | None]
    what: str
    known: str | None = None


def read_examples(files: Sequence[str], text: Sequence[str], labels: Labels | None = None) -> list[Document]:
    """One document for every row of files with named fields (`FIELD_KINDS`), in order.

    Args:
        text: the field of the text, or two fields of texts that are read together.

    Raises:
        DataError: a file is missing, damaged or of another kind; a row lacks a field, has an empty text or an unknown label.
    """
    columns = dict.fromkeys(text, "text") | ({} if labels is None else {labels.field: "label"})
    documents: list[Document] = []
    names: dict[str, int] = {}
    label: float | None = None
    for file in files:
        path = Path(file)
        if kind(path) not in FIELD_KINDS:
            raise DataError(
                f"has no columns: it is no {', '.join(FIELD_KINDS[:-1])} or {FIELD_KINDS[-1]} file", where=file
            )
        count = 0
        for number, values in _columns(path, columns):
            where = f"{_place(path)}{number}"
            texts = values[: len(text)]
            for name, value in zip(text, texts, strict=True):
                if not isinstance(value, str) or not value.strip():
                    said = "is empty" if value is None or isinstance(value, str) else f"is {_shown(value)}, not text"
                    raise DataError(f"`{name}` {said}", where=where)
                if not _spellable(value):
                    raise DataError(f"`{name}` holds half a surrogate pair, which is no text", where=where)
            if labels is not None and (label := labels.read(values[-1])) is None:
                raise DataError(
                    f"`{labels.field}` is {_shown(values[-1])}, not {labels.what}", where=where, fix=labels.known
                )
            index = names.get(path.name, 0)
            names[path.name] = index + 1
            pair = (texts[0], texts[1]) if len(texts) > 1 else None
            documents.append(Document(f"{path.name}#{index}", "\n".join(texts), pair=pair, label=label))
            count += 1
        if not count:
            raise DataError("holds no row", where=file)
    return documents


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:40]


def no_template(document: Document) -> DataError:
    """What is wrong with a chat where a tokenizer has no template for it."""
    return DataError(
        "is a chat, and the tokenizer has no chat template",
        where=document.id,
        fix="take plain text, or a checkpoint whose tokenizer has one",
    )


def rendered(document: Document, tokenizer: Any) -> str:
    """The text that a model is shown: a chat in the tokenizer's template. Raises `DataError` where it has none."""
    if document.messages is None:
        return document.text
    if not tokenizer.chat_template:
        raise no_template(document)
    try:
        return templates.apply(tokenizer, document.messages)
    except Exception as error:  # templates raise what they like: jinja2's errors, ValueError, KeyError
        raise DataError(f"does not fit the chat template: {one_line(error)}", where=document.id) from error


def encoded(document: Document, tokenizer: Any, length: int | None = None) -> dict[str, list[int]]:
    """A text or pair as a model reads it by itself: inputs by name, with the tokenizer's special tokens.

    A longer one is cut to ``length`` tokens, of which special ones keep their places; of a pair the longer text is cut first.
    Templates of chats spell the special tokens themselves.
    """
    how: dict[str, Any] = {} if length is None else {"truncation": True, "max_length": length}
    texts = document.pair or (rendered(document, tokenizer),)
    return tokenized(tokenizer, *texts, where=document.id, add_special_tokens=document.messages is None, **how)


def tokenized(tokenizer: Any, *texts: str, where: str | None = None, **how: Any) -> dict[str, Any]:
    """What a tokenizer makes of a text or pair. Raises `DataError` where it breaks, as damaged ones do on some texts."""
    try:
        return dict(tokenizer(*texts, verbose=False, **how))
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):  # Rust's, which is no Exception
            raise
        raise DataError(f"the tokenizer breaks on it: {one_line(error)}", where=where) from error


def beginning(tokenizer: Any) -> int | None:
    """Id of the beginning-of-text token that a tokenizer puts before a text of its own accord; None where it puts none."""
    begin: int | None = tokenizer.bos_token_id
    return begin if begin is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [begin] else None


def _decoded(path: Path, data: bytes) -> str:
    if b"\0" in data:
        raise DataError("is binary, not text", where=str(path))
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError("is not UTF-8", where=f"{path}:{line}", fix="convert it, for example with iconv") from None


# --- rows: (number, values of the columns), the number as people count them


def _place(path: Path) -> str:
    """What comes before a row's number."""
    return f"{path}: row " if kind(path) == ".parquet" else f"{path}:"


def _columns(path: Path, columns: ColumnNames) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Rows of a file with named fields: their values of the columns, in order."""
    data = unpacked(path)
    if kind(path) == ".parquet":
        return _parquet(path, data, columns)
    text = _decoded(path, data)
    if kind(path) in (".jsonl", ".json"):
        return _records(path, _json_array(path, text) if _is_array(text) else _json_lines(path, text), columns)
    return _table(path, text, columns, "\t" if kind(path) == ".tsv" else ",")


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


def _is_array(text: str) -> bool:
    """Whether JSON text is one array of records, not a record a line."""
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
    """Records of an array, each with the line that it begins in."""
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
    said = error if isinstance(error, str) else one_line(error)
    return DataError(f"is not JSON: {said}", where=f"{path}:{line}", fix=fix)


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
        raise DataError(f"is no {kind(path)[1:]}: {error}", where=f"{path}:{reader.line_num}") from None
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
    """What a row group's largest column takes unpacked, as the file says."""
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


def _pieces(
    rows: Iterable[tuple[int, Any]], where: str, field: str
) -> Iterator[tuple[str, tuple[Message, ...] | None]]:
    """(text, messages) of every row that has any text. ``where`` comes before a row's number."""
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
        text = value if isinstance(value, str) else said(messages or ())
        if not text.strip():
            continue
        if chats is not None and chats != (messages is not None):
            raise DataError(
                f"`{field}` is {'text' if chats else 'a chat'}, and {'a chat' if chats else 'text'} in rows before",
                where=f"{where}{number}",
                fix="keep texts and chats in files of their own",
            )
        chats = messages is not None
        if not _spellable(text):
            raise DataError(f"`{field}` holds half a surrogate pair, which is no text", where=f"{where}{number}")
        yield text, messages


def _joined(
    rows: Iterable[tuple[int, tuple[Any, ...]]], columns: ColumnNames, template: str, where: str
) -> Iterator[tuple[int, str | None]]:
    """The template filled for every row; None for a row whose columns are all empty."""
    for number, values in rows:
        texts = {}
        for name, value in zip(columns, values, strict=True):
            if isinstance(value, (list, dict, bool, bytes)):
                raise DataError(f"`{name}` is {_shown(value)}, not text", where=f"{where}{number}")
            texts[name] = "" if value is None else str(value)
        yield number, filled(template, texts) if any(text.strip() for text in texts.values()) else None


def _spellable(text: str) -> bool:
    """Whether UTF-8 can spell it; JSON can spell more."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


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


def check_disjoint(evaluation: Iterable[Document], other: Iterable[Document], name: str) -> None:
    """The evaluation shares no document with the set ``name``.

    A document is shared when it is the same but for case and white space, or when in one of its passages (about 500
    words) half of the successive runs of 13 words, the length that GPT-3's authors took to find contamination
    (arXiv 2005.14165, appendix C), stand in the other set.

    Raises:
        DataError: with the first shared documents.
    """
    whole: set[int] = set()
    parts: set[int] = set()
    for document in other:
        words = document.text.lower().split()
        whole.add(hash(" ".join(words)))
        parts.update(hash(" ".join(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1))
    shared, total = [], 0
    for document in evaluation:
        total += 1
        words = document.text.lower().split()
        found = hash(" ".join(words)) in whole
        runs = [hash(" ".join(words[i : i + SHINGLE])) for i in range(0, len(words) - SHINGLE + 1, SHINGLE)]
        if found or any(_mostly(runs[i : i + PASSAGE], parts) for i in _passages(len(runs))):
            shared.append(document.id)
    if shared:
        names = ", ".join(shared[:3]) + (" …" if len(shared) > 3 else "")
        raise DataError(
            f"data.evaluation shares {len(shared)} of its {total} documents with data.{name}: {names}",
            fix="evaluate on data that no pass has seen",
        )


def _passages(runs: int) -> range:
    """Starts of passages; a remainder shorter than half of one belongs to the one before it."""
    return range(0, max(runs - PASSAGE // 2, 1) if runs else 0, PASSAGE)


def _mostly(runs: Sequence[int], parts: set[int]) -> bool:
    return sum(r in parts for r in runs) >= SHARED * len(runs)
