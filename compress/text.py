"""Text files ▶ documents. Needs neither torch nor numpy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import DataError

#: Words of a shingle; shingles of a passage; the share of its shingles found elsewhere at which a passage is shared.
SHINGLE = 13
PASSAGE = 40
SHARED = 0.5


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is scored by itself. ``id`` is ``file#index``, the file's name without its folders."""

    id: str
    text: str


def read_documents(files: Sequence[str], separator: str | None = None) -> list[Document]:
    """Documents of ``.txt`` files and of ``.jsonl`` files (field ``text``), in order; empty ones are left out.

    Args:
        files: UTF-8 text files, with or without byte order mark.
        separator: a line that stands alone between two documents of a ``.txt`` file; without it a file is one document.

    Raises:
        DataError: a file is missing, empty, binary, not UTF-8, or of another kind.
    """
    documents: list[Document] = []
    names: dict[str, int] = {}
    for file in files:
        path = Path(file)
        text = _decode(path)
        pieces = _json_lines(path, text) if path.suffix == ".jsonl" else _split(text, separator)
        kept = [piece for piece in pieces if piece.strip()]
        if not kept:
            raise DataError("holds no text", where=file)
        first = names.get(path.name, 0)
        names[path.name] = first + len(kept)
        documents += [Document(f"{path.name}#{first + i}", piece) for i, piece in enumerate(kept)]
    return documents


def _decode(path: Path) -> str:
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"is no .txt or .jsonl file (`{path.suffix or path.name}`)", where=str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        )
        raise DataError(reason, where=str(path)) from None
    if not data:
        raise DataError("is empty", where=str(path))
    if b"\0" in data:
        raise DataError("is binary, not text", where=str(path))
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError("is not UTF-8", where=f"{path}:{line}", fix="convert it, for example with iconv") from None


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


def _json_lines(path: Path, text: str) -> list[str]:
    pieces = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON: {error}", where=f"{path}:{number}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError('expected {"text": "…"}', where=f"{path}:{number}")
        pieces.append(row["text"])
    return pieces


def fingerprint(files: Sequence[str]) -> str:
    """SHA-256 of the files' contents, in order. Raises `DataError`."""
    whole = hashlib.sha256()
    for file in files:
        try:
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
            fix="evaluate on text that no pass has seen",
        )


def _passages(runs: int) -> range:
    """Starts of passages; a remainder shorter than half of one belongs to the one before it."""
    return range(0, max(runs - PASSAGE // 2, 1) if runs else 0, PASSAGE)


def _mostly(runs: Sequence[int], parts: set[int]) -> bool:
    return sum(r in parts for r in runs) >= SHARED * len(runs)
