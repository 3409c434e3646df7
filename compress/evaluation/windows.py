"""Windows of documents: the tokens of each forward pass, and which of them are scored there. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from compress.evaluation.positions import bin_of


@dataclass(frozen=True)
class TokenWindow:
    """Tokens of one forward pass; the targets from ``first`` on are scored here.

    Attributes:
        document: number of the document.
        ids: one more than the model reads: the last is only a target.
        start: index in the document of the first scored target.
        begins: position of the first token: 0, or in a segment the number of tokens in the cache.
    """

    document: int
    ids: list[int]
    first: int
    start: int
    begins: int = 0

    @property
    def reads(self) -> int:
        """Number of tokens that the model reads."""
        return len(self.ids) - 1


def cut(document: int, ids: list[int], window: int, stride: int, begin: int | None) -> Iterator[TokenWindow]:
    """Windows of a document. ``begin`` is put before all but the first, which begins with it already."""
    scored, start = 1, 0  # the first token is never a target
    while start < len(ids) - 1:
        lead = [begin] if begin is not None and start else []
        end = min(start + window - len(lead), len(ids) - 1)
        if end >= scored:
            yield TokenWindow(document, lead + ids[start : end + 1], scored - 1 - start + len(lead), scored)
            scored = end + 1
        start = min(start + stride, end)  # no further than the last target, which the next window reads first


def segments(document: int, ids: list[int], length: int) -> Iterator[TokenWindow]:
    """Segments of a document, each read with the cache of those before it. Every target is scored where it is predicted."""
    for start in range(0, len(ids) - 1, length):
        yield TokenWindow(document, ids[start : start + length + 1], 0, start + 1, start)


def bins_of(windows: Sequence[TokenWindow]) -> int:
    """Number of bins of positions that the windows reach."""
    return bin_of(max(window.begins + window.reads for window in windows) - 1) + 1


def batches(windows: Sequence[TokenWindow], most: int, *, streaming: bool) -> Iterator[list[int]]:
    """Numbers of the windows that are scored together.

    Of streams, these are all segments of up to ``most`` documents that have equally many, so that none waits for others.
    """
    if not streaming:
        yield from ([*range(at, min(at + most, len(windows)))] for at in range(0, len(windows), most))
        return
    documents = [list(group) for _, group in groupby(range(len(windows)), key=lambda i: windows[i].document)]
    documents.sort(key=len)
    for _, equal in groupby(documents, key=len):
        members = list(equal)
        for at in range(0, len(members), most):
            yield [i for document in members[at : at + most] for i in document]
