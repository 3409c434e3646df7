"""Overrides of a recipe from the command line: ``--set``, ``--gate`` and ``--metric``."""

from __future__ import annotations

import difflib
import re

from compress.recipe.problems import (
    ListNode,
    MapEntry,
    MapNode,
    Node,
    Origin,
    Place,
    Problem,
    Scalar,
    dotted,
    is_null,
)

#: Option ▶ what may follow it.
EXAMPLES = {
    "--set": "passes.0.cast.weights=fp16",
    "--gate": "bits_per_byte.max_increase=3%",
    "--metric": "latency.lengths=[512,2048]",
}
_PART = re.compile(r'"(?P<double>[^"]*)"|\'(?P<single>[^\']*)\'|(?P<bare>[^.="\'][^.=]*)')


class Change:
    """One ``--set`` option: a path and its new value."""

    def __init__(self, path: list[str], value: Node, place: Place) -> None:
        self.path = path
        self.value = value
        self.place = place

    def apply(self, root: Node, problems: list[Problem]) -> None:
        """Change the tree. Missing mappings on the path are created; validation judges the result."""
        if self.path[0] == "extends":
            problems.append(Problem("`extends` cannot be set", self.place, hint="write it in a recipe"))
            return
        node: Node = root
        for depth, part in enumerate(self.path):
            if isinstance(node, ListNode):
                index = self._index(node, depth, problems)
                if index is None:
                    return
                if depth == len(self.path) - 1:
                    node.items[index] = self.value
                    return
                items, following = node.items, node.items[index]
                if self._is_entry(depth) and (entry := _as_entry(following)) is not None:
                    if not self._names_entry(entry, depth, problems):
                        return
                    following = entry
                if is_null(following):
                    following = MapNode({}, self.place)
                items[index] = node = following
            elif isinstance(node, MapNode):
                if depth == len(self.path) - 1:
                    node.entries[part] = MapEntry(self.value, self.place)
                    return
                entry_here = node.entries.get(part)
                if entry_here is None or is_null(entry_here.node):
                    node.entries[part] = entry_here = MapEntry(MapNode({}, self.place), self.place)
                node = entry_here.node
            else:
                owner = dotted(self.path[:depth])
                problems.append(Problem(f"`{owner}` is a single value, there is no `{part}` in it", self.place))
                return

    def _is_entry(self, depth: int) -> bool:
        return self.path[0] in ("passes", "evaluate") and depth == 1

    def _index(self, node: ListNode, depth: int, problems: list[Problem]) -> int | None:
        part, owner, count = self.path[depth], dotted(self.path[:depth]), len(node.items)
        if re.fullmatch(r"[0-9]{1,9}", part) and int(part) < count:
            return int(part)
        entries = f"{count} entries, 0 to {count - 1}" if count > 1 else "one entry, 0" if count else "no entries"
        hint = None
        if self._is_entry(depth):
            names = [next(iter((_as_entry(item) or MapNode()).entries), "") for item in node.items]
            if close := difflib.get_close_matches(part, names, n=1):
                right = dotted([owner, names.index(close[0]), close[0], *self.path[depth + 1 :]])
                hint = f"did you mean `{right}`?"
        problems.append(Problem(f"there is no `{part}` in `{owner}`, which has {entries}", self.place, hint=hint))
        return None

    def _names_entry(self, entry: MapNode, depth: int, problems: list[Problem]) -> bool:
        part = self.path[depth + 1]
        if part in entry.entries:
            return True
        name = next(iter(entry.entries), "")
        close = difflib.get_close_matches(part, [name], n=1, cutoff=0.5)
        right = dotted([*self.path[: depth + 1], name, *self.path[depth + 2 :]])
        hint = (
            f"did you mean `{right}`?"
            if close
            else f"settings of it are set as `{dotted([*self.path[: depth + 1], name])}.KEY=VALUE`"
        )
        problems.append(Problem(f"`{dotted(self.path[: depth + 1])}` is {name}, not `{part}`", self.place, hint=hint))
        return False


def _as_entry(node: Node) -> MapNode | None:
    """An entry of ``passes`` or ``evaluate`` as a mapping; a bare name becomes one without settings."""
    if isinstance(node, MapNode) and len(node.entries) == 1:
        return node
    if isinstance(node, Scalar) and isinstance(node.value, str):
        return MapNode({node.value: MapEntry(MapNode({}, node.place), node.place)}, node.place)
    return None


def parse_set(text: str, rank: int, problems: list[Problem], option: str = "--set") -> Change | None:
    """Parse ``a.b.2.c=value``; parts with dots are quoted. Its mistakes are listed after those of files."""
    origin = Origin(f"{option} {text}", rank=1_000 + rank)
    place = Place(origin)
    path: list[str] = []
    position = 0
    while match := _PART.match(text, position):
        path.append(next(group for group in match.groups() if group is not None))
        position = match.end()
        if text[position : position + 1] != ".":
            break
        position += 1
    if not path or text[position : position + 1] != "=":
        example = EXAMPLES[option]
        problems.append(Problem("expected KEY=VALUE", place, hint=f"as {option} {example}"))
        return None
    from compress.recipe.nodes import parse

    before = len(problems)
    value = parse(text[position + 1 :], origin, problems)
    if len(problems) > before:
        return None
    return Change(path, value if value is not None else Scalar(None, "", place), place)
