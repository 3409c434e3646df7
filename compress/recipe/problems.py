"""Mistakes and their places: the tree of a recipe, places in files, and how a mistake is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from compress.errors import CompressError, Mistake

KeyPath: TypeAlias = Sequence[str | int]
#: Longest piece of a source line that is shown; a longer line is cut to a window around the mistake.
_SHOWN = 160


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of text: a file by the name that the user gave, or a ``--set`` option (then without lines).

    ``rank`` orders mistakes: first the recipe, then the files it extends, then ``--set``.
    """

    name: str
    lines: tuple[str, ...] = ()
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """A part of one line. ``line`` and ``column`` count from 1; ``whole`` is false if it continues on the next line."""

    origin: Origin
    line: int = 0
    column: int = 0
    width: int = 1
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.origin.name}:{self.line}:{self.column}" if self.line else self.origin.name


@dataclass(slots=True)
class Scalar:
    """A single value; ``text`` is how it was written."""

    value: bool | int | float | str | None
    text: str
    place: Place | None = None


@dataclass(slots=True)
class ListNode:
    """A list."""

    items: list[Node]
    place: Place | None = None


@dataclass(slots=True)
class MapEntry:
    """The value of a key, and the place of the key."""

    node: Node
    key: Place | None = None


@dataclass(slots=True)
class MapNode:
    """A mapping; keys are text."""

    entries: dict[str, MapEntry] = field(default_factory=dict)
    place: Place | None = None

    def get(self, key: str) -> Node | None:
        """The value at a key; None where it is missing or null."""
        entry = self.entries.get(key)
        return None if entry is None or is_null(entry.node) else entry.node


Node: TypeAlias = Scalar | ListNode | MapNode


def is_null(node: Node) -> bool:
    """Whether the value is empty or null."""
    return isinstance(node, Scalar) and node.value is None


def child_of(node: Node | None, part: str | int) -> Node | None:
    """The node at a key or index; None where there is none."""
    if isinstance(node, MapNode) and str(part) in node.entries:
        return node.entries[str(part)].node
    if isinstance(node, ListNode) and isinstance(part, int) and part < len(node.items):
        return node.items[part]
    return None


def pass_name(node: Node | None) -> str | None:
    """The name of the pass that an entry of ``passes`` gives; None where it gives none, or several."""
    if isinstance(node, MapNode):
        return next(iter(node.entries)) if len(node.entries) == 1 else None
    return text_of(node)


def node_at(root: Node, path: tuple[str | int, ...]) -> Node | None:
    """The node at a path of keys; None where there is none."""
    node: Node | None = root
    for part in path:
        node = child_of(node, part)
    return node


def text_of(node: Node | None) -> str | None:
    """The text that a node holds; None where it holds something else."""
    return node.value if isinstance(node, Scalar) and isinstance(node.value, str) else None


def plain(node: Node) -> Any:
    """The Python value of a node."""
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, ListNode):
        return [plain(item) for item in node.items]
    return {key: plain(entry.node) for key, entry in node.entries.items()}


def find_place(root: Node, path: KeyPath, *, key: bool = False) -> Place | None:
    """The place of the value at a path, or with ``key`` of its key; for a missing path, of the mapping or list around it.

    A value that takes several lines, or none, is shown by its key.
    """
    node, owner, value = root, root.place, root.place
    for part in path:
        if isinstance(node, MapNode) and str(part) in node.entries:
            entry = node.entries[str(part)]
            node = entry.node
            owner, value = entry.key or node.place, node.place
        elif isinstance(node, ListNode) and isinstance(part, int) and 0 <= part < len(node.items):
            node = node.items[part]
            owner = value = node.place
        else:
            return owner
    return value if _shown(value) and not key else owner


def _shown(place: Place | None) -> bool:
    return place is not None and place.whole and place.width > 0


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: the message, its place, and what to do.

    ``path`` of keys is shown where there is no place, as for a recipe made in Python.
    """

    message: str
    place: Place | None = None
    path: tuple[str | int, ...] = ()
    hint: str | None = None

    def render(self) -> str:
        """``file:line:col: message``, the line, a marker under the mistake, and the hint."""
        where = str(self.place) if self.place else dotted(self.path) or "recipe"
        lines = [f"{where}: {self.message}"]
        if self.place is not None and 0 < self.place.line <= len(self.place.origin.lines):
            source, column = _window(self.place.origin.lines[self.place.line - 1], self.place.column - 1)
            width = max(1, min(self.place.width, len(source) - column))
            lines.append(f"{self.place.line:5d} | {source}".rstrip())
            lines.append(f"{'':5s} | {' ' * column}{'^' * width}")
        if self.hint:
            lines.append(f"   {self.hint}")
        return "\n".join(lines)

    def mistake(self) -> Mistake:
        """The same as data."""
        if self.place is None:
            where = dotted(self.path)
            return Mistake(f"{where}: {self.message}" if where else self.message, self.hint or "")
        place = self.place
        return Mistake(self.message, self.hint or "", place.origin.name, place.line, place.column, place.width)


def _window(line: str, column: int) -> tuple[str, int]:
    """The line without tabs, cut to the window that is shown, and the column in it."""
    line = line.replace("\t", " ")
    if len(line) <= _SHOWN:
        return line, column
    start = max(0, column - _SHOWN // 2)
    end = start + _SHOWN
    head, tail = "…" if start else "", "…" if end < len(line) else ""
    return f"{head}{line[start:end]}{tail}", column - start + len(head)


def dotted(path: Iterable[str | int]) -> str:
    """``passes.0.cast.weights``; a key that has a dot is quoted."""
    return ".".join(f'"{part}"' if "." in str(part) else str(part) for part in path)


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Problems by file and position, without repetitions."""
    first: dict[tuple[Place | None, str, tuple[str | int, ...]], Problem] = {}
    for problem in problems:  # a mistake that an alias repeats is shown once, at the anchor
        first.setdefault((problem.place, problem.message, () if problem.place else problem.path), problem)
    return sorted(first.values(), key=_position)


def _position(problem: Problem) -> tuple[int, int, int]:
    place = problem.place
    return (place.origin.rank, place.line, place.column) if place else (-1, 0, 0)


class Source:
    """Where the parts of a recipe are written. All sources compare equal, so recipes compare by their values."""

    def __init__(self, root: MapNode) -> None:
        self.root = root

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source)

    def __hash__(self) -> int:
        return hash(Source)


def locate(source: Source | None, path: KeyPath, error: CompressError) -> Problem:
    """An error that came after loading, at its place in the recipe.

    Args:
        source: `Recipe.source`.
        error: what is wrong, and what to do.
        path: such as ``("passes", 0, "cast", "weights")``; for a missing path the mapping around it is shown.
    """
    place = find_place(source.root, path) if source is not None else None
    return Problem(error.what, place, tuple(path), error.fix)
