"""The values that a sweep searches: ``{search: …}`` in the tree of a recipe, and ``optional: true`` in a pass."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.recipe.problems import (
    ListNode,
    MapEntry,
    MapNode,
    Node,
    Place,
    Problem,
    Scalar,
    child_of,
    dotted,
    find_place,
    is_null,
    pass_name,
    plain,
    text_of,
)

Path = tuple[str | int, ...]
#: Key of a value that is searched, and of a pass that may be left out.
SEARCH, OPTIONAL = "search", "optional"
#: Parts of a recipe that all trials share, since they decide what is compared.
_FIXED = ("model", "output", "evaluate", "gates", "sweep", "extends", "export", "log", "confidence", "bootstrap")
_PERCENT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*$")
_RANGE = ("from", "to", "step", "log")
#: Values of a range with a step; more would be no grid.
_MOST = 1000


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        step: between two values; None for any value. percent: they are written as percentages. log: sampled by their logarithm.
    """

    low: float
    high: float
    step: float | None = None
    percent: bool = False
    log: bool = False

    @property
    def whole(self) -> bool:
        """Whether the values are integers."""
        return not self.percent and all(isinstance(x, int) for x in (self.low, self.high, self.step or 0))

    def value(self, number: float) -> Any:
        """A number as a recipe has it: at most six digits, between the ends."""
        number = min(max(number, self.low), self.high)
        if self.whole:
            return round(number)
        number = float(f"{number:.4g}" if self.percent else f"{number:.6g}")
        return f"{number:g}%" if self.percent else number

    def values(self) -> list[Any]:
        """All values of a range with a step."""
        assert self.step is not None
        count = math.floor((self.high - self.low) / self.step + 1e-9)
        return [self.value(self.low + i * self.step) for i in range(count + 1)]


@dataclass(frozen=True)
class Dimension:
    """One value that is searched.

    Attributes:
        path: its place in the recipe. choices: the nodes to try, for a range with a step all its values; none for other ranges.
        range: of numbers, where it is one. place: of its ``search``. title: a name for people where the key is none.
    """

    path: Path
    choices: tuple[Node, ...]
    range: Range | None = None
    place: Place | None = None
    title: str | None = None

    @property
    def name(self) -> str:
        """The path, ``passes.0.cast.weights``."""
        return dotted(self.path)

    @property
    def is_pass(self) -> bool:
        """Whether whole passes are searched, or whether a pass is left out."""
        return self.path[0] == "passes" and len(self.path) == 2

    def ends(self) -> list[Any]:
        """Every choice as JSON values; of a range both ends."""
        if self.choices:
            return [plain(node) for node in self.choices]
        assert self.range is not None
        return [self.range.value(self.range.low), self.range.value(self.range.high)]

    def node(self, value: Any) -> Node:
        """The node of a value: that of the recipe's text where it is a choice."""
        for node in self.choices:
            if plain(node) == value and type(plain(node)) is type(value):
                return node
        return Scalar(value, str(value), self.place)


def take_space(root: MapNode, problems: list[Problem]) -> tuple[Dimension, ...]:
    """The dimensions of a tree, in its order. ``optional`` is taken out of the passes. Mistakes go to ``problems``."""
    optional = _take_optional(root)
    searched: list[Dimension] = []
    for path, node in _searches(root, ()):
        if path[0] in _FIXED or path[:2] == ("data", "evaluation"):
            text = f"`{dotted(path[:2] if path[0] == 'data' else path[:1])}` is the same for all trials"
            problems.append(Problem(text, _place(root, path), path, "search values of passes, data or store"))
        elif (dimension := _dimension(root, path, node, problems)) is not None:
            searched.append(dimension)
    return tuple(sorted([*optional, *searched], key=lambda d: d.path[1] if d.path[0] == "passes" else -1))


def searches(root: MapNode) -> bool:
    """Whether a tree searches a value or has the section of a sweep."""
    return "sweep" in root.entries or next(_searches(root, ()), None) is not None


def _take_optional(root: MapNode) -> Iterator[Dimension]:
    passes = root.get("passes")
    made = []
    for index, item in enumerate(passes.items if isinstance(passes, ListNode) else ()):
        settings = child_of(item, pass_name(item) or "")
        entry = settings.entries.get(OPTIONAL) if isinstance(settings, MapNode) else None
        if entry is None or not isinstance(entry.node, Scalar) or not isinstance(entry.node.value, bool):
            continue  # what is no truth value is reported as an unknown key
        assert isinstance(settings, MapNode)
        del settings.entries[OPTIONAL]
        if entry.node.value:
            choices = tuple(Scalar(value, str(value).lower(), entry.node.place) for value in (True, False))
            made.append(Dimension(("passes", index), choices, place=entry.key, title=pass_name(item)))
    return iter(made)


def _searches(node: Node, path: Path) -> Iterator[tuple[Path, Node]]:
    """Path and contents of every ``{search: …}`` below a node, not inside another one."""
    if isinstance(node, MapNode):
        if path and list(node.entries) == [SEARCH]:
            yield path, node.entries[SEARCH].node
            return
        for key, entry in node.entries.items():
            yield from _searches(entry.node, (*path, key))
    elif isinstance(node, ListNode):
        for index, item in enumerate(node.items):
            yield from _searches(item, (*path, index))


def _place(root: MapNode, path: Path) -> Place | None:
    return find_place(root, (*path, SEARCH), key=True)


def _dimension(root: MapNode, path: Path, node: Node, problems: list[Problem]) -> Dimension | None:
    place, before = _place(root, path), len(problems)

    def wrong(message: str, hint: str | None = None) -> None:
        problems.append(Problem(message, place, (*path, SEARCH), hint))

    choices: Sequence[Node] = ()
    span = None
    if isinstance(node, ListNode):
        span = _span(node.items)
        choices = () if span else node.items
    elif isinstance(node, MapNode) and list(node.entries) == ["choices"]:
        inner = node.entries["choices"].node
        choices = inner.items if isinstance(inner, ListNode) else ()
    elif isinstance(node, MapNode) and {"from", "to"} <= node.entries.keys() <= set(_RANGE):
        span = _spelled(node, wrong)
    if not span and not choices and len(problems) == before:
        wrong("expected what to search", "write `[40%, 70%]`, `{from: 40%, to: 70%, step: 10%}` or `{choices: [4, 8]}`")
    if any(next(_searches(choice, (0,)), None) for choice in choices):
        wrong("a choice cannot search in itself", "write each value as a choice")
    if span and not span.low < span.high:
        wrong("the range is empty", "write the lower end first")
    if span and span.log and span.low <= 0:
        wrong("a logarithmic range begins above 0")
    if len(problems) > before:
        return None
    if span and span.step is not None:
        choices = [Scalar(value, str(value), place) for value in span.values()]
    title = f"pass {int(path[1]) + 1}" if len(path) == 2 and path[0] == "passes" else None
    return Dimension(path, tuple(choices), span, place, title)


def _number(node: Node | None) -> tuple[float, bool] | None:
    """The number of a node, and whether it is a percentage."""
    if isinstance(node, Scalar) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return node.value, False
    match = _PERCENT.match(text_of(node) or "")
    return None if match is None else (float(match[1]), True)


def _span(items: Sequence[Node]) -> Range | None:
    """The range between two numbers; None for choices."""
    numbers = [_number(item) for item in items]
    if len(numbers) != 2 or numbers[0] is None or numbers[1] is None or numbers[0][1] != numbers[1][1]:
        return None
    return Range(numbers[0][0], numbers[1][0], percent=numbers[0][1])


def _spelled(node: MapNode, wrong: Any) -> Range | None:
    """The range of ``{from, to, step, log}``."""
    ends = [_number(node.get(key)) for key in ("from", "to", "step") if node.get(key) is not None]
    log = node.get("log")
    if None in ends or len({end[1] for end in ends if end}) != 1:
        wrong("`from`, `to` and `step` are numbers, or all of them percentages")
        return None
    if log is not None and not (isinstance(log, Scalar) and isinstance(log.value, bool)):
        wrong("`log` is true or false")
        return None
    numbers = [end[0] for end in ends if end]
    step = numbers[2] if len(numbers) > 2 else None
    if step is not None and (step <= 0 or (numbers[1] - numbers[0]) / step > _MOST):
        wrong(f"a step is above 0, and gives at most {_MOST:,} values")
        return None
    return Range(numbers[0], numbers[1], step, ends[0][1] if ends[0] else False, bool(log and plain(log)))


def substituted(root: MapNode, space: Sequence[Dimension], values: Mapping[str, Any]) -> MapNode:
    """The tree with a value for each dimension, by name; passes that are left out are gone."""
    chosen = {d.path: d.node(values[d.name]) for d in space if d.name in values}
    passes = {d.path for d in space if d.is_pass}
    dropped = {path for path in passes & chosen.keys() if _leaves_out(chosen[path])}
    switches = {path for path in passes & chosen.keys() if _is_switch(chosen[path])}
    made = _replaced(root, (), {path: node for path, node in chosen.items() if path not in switches}, dropped)
    assert isinstance(made, MapNode)
    return made


def _is_switch(node: Node) -> bool:
    return isinstance(node, Scalar) and isinstance(node.value, bool)


def _leaves_out(node: Node) -> bool:
    return is_null(node) or (isinstance(node, Scalar) and node.value is False)


def _replaced(node: Node, path: Path, chosen: Mapping[Path, Node], dropped: set[Path]) -> Node:
    if path in chosen:
        return chosen[path]
    if isinstance(node, MapNode):
        entries = {k: MapEntry(_replaced(e.node, (*path, k), chosen, dropped), e.key) for k, e in node.entries.items()}
        return MapNode(entries, node.place)
    if isinstance(node, ListNode):
        items = [(*path, i) for i in range(len(node.items))]
        kept = [_replaced(node.items[p[-1]], p, chosen, dropped) for p in items if p not in dropped]  # type: ignore[index]
        return ListNode(kept, node.place)
    return node


def active(space: Sequence[Dimension], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without those inside passes that are left out or replaced."""
    off = [d.path for d in space if d.is_pass and values.get(d.name) in (None, False)]
    inner = {d.name for d in space for path in off if d.path != path and d.path[:2] == path}
    return {name: value for name, value in values.items() if name not in inner}


def grid(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Every combination of choices; the last dimension varies fastest, so that trials share their first passes."""
    for combination in itertools.product(*(d.ends() for d in space)):
        yield dict(zip((d.name for d in space), combination, strict=True))


def labels(space: Sequence[Dimension]) -> dict[str, str]:
    """A short name for each dimension: its key, with the pass where two have the same key, else the whole path."""
    short = {d.name: _words(d) for d in space}
    result = {}
    for name, words in short.items():
        result[name] = next((word for word in words if sum(word in others for others in short.values()) == 1), name)
    return result


def _words(dimension: Dimension) -> list[str]:
    """Names from short to long."""
    path = dimension.path
    if dimension.title is not None:
        return [dimension.title]
    keys = [part for part in path if isinstance(part, str)]
    return [str(path[-1]), ".".join(keys[-2:]), ".".join(keys[1:])]
