"""Files with named fields ▶ labelled texts and pairs. Needs neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.documents import Document, excerpt
from compress.data.kinds import FIELD_KINDS, kind
from compress.data.rows import is_spellable, read_rows, row_place
from compress.errors import DataError


@dataclass(frozen=True, slots=True)
class Labels:
    """Where labels are and which there are.

    Attributes:
        field: the column of labels. read: a value of it ▶ its id or score; None for a value that is not a label.
        what: a noun for them, and ``known``: a list of them, for messages.
    """

    field: str
    read: Callable[[Any], float | None]
    what: str
    known: str | None = None


def read_examples(files: Sequence[str], text: Sequence[str], labels: Labels | None = None) -> list[Document]:
    """Read one document from every row of files with named fields (`FIELD_KINDS`), in order.

    Args:
        text: the field of the text, or the two fields of texts that are read together.

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
        for number, values in read_rows(path, columns):
            where = f"{row_place(path)}{number}"
            texts = values[: len(text)]
            for name, value in zip(text, texts, strict=True):
                if not isinstance(value, str) or not value.strip():
                    empty = value is None or isinstance(value, str)
                    fault = "is empty" if empty else f"is {excerpt(value)}, not text"
                    raise DataError(f"`{name}` {fault}", where=where)
                if not is_spellable(value):
                    raise DataError(f"`{name}` holds half a surrogate pair, which is not a text", where=where)
            if labels is not None and (label := labels.read(values[-1])) is None:
                raise DataError(
                    f"`{labels.field}` is {excerpt(values[-1])}, not {labels.what}", where=where, fix=labels.known
                )
            index = names.get(path.name, 0)
            names[path.name] = index + 1
            pair = (texts[0], texts[1]) if len(texts) > 1 else None
            documents.append(Document(f"{path.name}#{index}", "\n".join(texts), pair=pair, label=label))
            count += 1
        if not count:
            raise DataError("holds no row", where=file)
    return documents
