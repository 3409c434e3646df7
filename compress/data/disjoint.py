"""The check that evaluation data share no document with calibration or training data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.data.documents import Document
from compress.errors import DataError

#: Words of a shingle; shingles of a passage; the share of a passage's shingles found elsewhere that makes it shared.
SHINGLE = 13
PASSAGE = 40
SHARED = 0.5


def check_disjoint(evaluation: Iterable[Document], other: Iterable[Document], name: str) -> None:
    """Refuse evaluation data that share a document with the data set ``name``.

    A document is shared if another is equal up to case and white space, or if half of the successive runs of 13 words in one
    of its passages (about 500 words) occur in the other set. GPT-3's authors took 13 words to find contamination
    (arXiv 2005.14165, appendix C).

    Raises:
        DataError: naming the first shared documents.
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
        equal = hash(" ".join(words)) in whole
        runs = [hash(" ".join(words[i : i + SHINGLE])) for i in range(0, len(words) - SHINGLE + 1, SHINGLE)]
        if equal or any(_mostly(runs[i : i + PASSAGE], parts) for i in _passages(len(runs))):
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
