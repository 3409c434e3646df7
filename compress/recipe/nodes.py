"""Located YAML 1.2: text ▶ a tree of nodes that know their places. Duplicate keys are reported.

Values are built here and not by the YAML library. So `2:4` and `off` are text and `1e-4` is a number (the core schema of
YAML 1.2), only plain values can be made, and no mistake hides the next one. Anchors, aliases and `<<` work; aliases are
copied, so that one place in the tree can be changed alone.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from compress.recipe.problems import ListNode, MapEntry, MapNode, Node, Origin, Place, Problem, Scalar

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
#: Limit of values that aliases and merge keys expand to. A recipe that a person wrote has tens.
MAX_ALIASED = 10_000

_TAG = "tag:yaml.org,2002:"
_CORE = (  # https://yaml.org/spec/1.2.2/#1032-tag-resolution
    ("null", re.compile(r"null|Null|NULL|~|")),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE")),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")),
    ("float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")),
    ("merge", re.compile(r"<<")),
)
_PATTERN = dict(_CORE)


class _CoreResolver(VersionedResolver):  # type: ignore[misc, unused-ignore]
    """Plain scalars by the core schema, whatever version a directive names."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and implicit[0]:
            name = next((name for name, pattern in _CORE if pattern.fullmatch(value)), "str")
            return Tag(suffix=_TAG + name)
        return super().resolve(kind, value, implicit)


def decode(data: bytes, name: str, rank: int = 0) -> tuple[str, Origin] | Problem:
    """Decode the UTF-8 bytes of a file, without byte order mark. Returns text and origin, or the problem."""
    if len(data) > MAX_BYTES:
        return Problem(f"is larger than {MAX_BYTES // 10**6} MB, so it is not a recipe", Place(Origin(name, rank=rank)))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", errors="replace")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte 0x{data[error.start]:02x}"
        return Problem(
            f"is not UTF-8 text ({kind})", Place(Origin(name, rank=rank), line, column), hint="save the file as UTF-8"
        )
    return text, Origin(name, tuple(line.rstrip("\r") for line in text.split("\n")), rank)


def parse(text: str, origin: Origin, problems: list[Problem]) -> Node | None:
    """Parse one YAML document to a tree. Mistakes go to ``problems``.

    Returns None if the text has no document or is not YAML. FileNames of an origin without lines have no line either.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _CoreResolver
    yaml.max_depth = MAX_DEPTH
    yaml.composer.warn_double_anchors = False  # legal: the later anchor counts from there on
    reader = _Reader(text, origin, problems)
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        problems.append(reader.syntax(error))
        return None
    except ReaderError as error:
        index, code = int(error.position), error.character
        problems.append(
            Problem(f"not valid YAML: the character U+{code:04X} cannot stand in it", reader.place(index, index + 1))
        )
        return None
    except (YAMLError, ValueError) as error:  # a broken directive, an impossible escape
        problems.append(Problem(f"not valid YAML: {str(error).splitlines()[0]}", Place(origin)))
        return None
    return None if root is None else reader.node(root)


class _Reader:
    """Builds nodes from the YAML library's; an alias is built again at each use."""

    def __init__(self, text: str, origin: Origin, problems: list[Problem]) -> None:
        self.text = text
        self.origin = origin
        self.problems = problems
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.open: list[int] = []  # ids of the nodes being built: meeting one again is recursion
        self.seen: set[int] = set()
        self.aliased = 0

    def place(self, start: int, end: int) -> Place:
        """The place of characters ``start`` to ``end`` of the text."""
        if not self.origin.lines:
            return Place(self.origin)
        start = min(start, len(self.text))
        line = bisect_right(self.starts, start) - 1
        stop = self.starts[line + 1] - 1 if line + 1 < len(self.starts) else len(self.text)
        return Place(self.origin, line + 1, start - self.starts[line] + 1, max(0, min(end, stop) - start), end <= stop)

    def report(self, message: str, place: Place | None, hint: str | None = None) -> None:
        self.problems.append(Problem(message, place, hint=hint))

    def syntax(self, error: MarkedYAMLError) -> Problem:
        """The problem for an error of the YAML library."""
        mark = error.problem_mark or error.context_mark
        index = mark.index if mark is not None else 0
        what = str(error.problem or error.context or "cannot be read")
        hint = None
        if "'\\t'" in what:
            what, hint = "a tab cannot indent YAML", "use spaces"
        elif "character" in what and "cannot start any token" in what:
            what, hint = f"{self.text[index : index + 1]!r} cannot start a value", "put the value in quotes"
        elif "maximum depth" in what:
            return Problem(f"nested more than {MAX_DEPTH} deep", self.place(index, index + 1))
        elif "another document" in what:
            what, hint = "a recipe is one document, and a second one starts here", "remove the `---`"
        elif "mapping values are not allowed" in what:
            what, hint = (
                "a `:` cannot stand here",
                "check the indentation of this line and the one above, or quote the value",
            )
        elif "undefined alias" in what:
            return Problem(
                what.replace("found ", ""),
                self.place(index, self._word_end(index)),
                hint="an anchor is written `&name` before it",
            )
        else:
            context = f"{error.context}, " if error.context else ""
            what = f"{context}{what}".replace("'<stream end>'", "the end of the file").replace(
                "<block end>", "the end of the block"
            )
        return Problem(f"not valid YAML: {what}", self.place(index, index + 1), hint=hint)

    def _word_end(self, index: int) -> int:
        match = re.compile(r"[^\s,\]}]+").match(self.text, index)
        return match.end() if match else index + 1

    def node(self, raw: Any) -> Node:
        place = self.place(raw.start_mark.index, raw.end_mark.index)
        if id(raw) in self.open:
            self.report("an alias stands inside its own anchor", place)
            return Scalar(None, "", place)
        self.aliased += id(raw) in self.seen
        self.seen.add(id(raw))
        if self.aliased > MAX_ALIASED:
            if self.aliased == MAX_ALIASED + 1:
                self.report(f"aliases expand to more than {MAX_ALIASED} values", place)
                self.aliased += 1
            return Scalar(None, "", place)
        self.open.append(id(raw))
        try:
            if isinstance(raw, ScalarNode):
                return self.scalar(raw, place)
            self._known_tag(raw, place, "seq" if isinstance(raw, SequenceNode) else "map")
            if isinstance(raw, SequenceNode):
                return ListNode([self.node(item) for item in raw.value], place)
            return MapNode(self.entries(raw), place)
        finally:
            self.open.pop()

    def _known_tag(self, raw: Any, place: Place, *names: str) -> bool:
        tag = str(raw.tag)
        if tag.removeprefix(_TAG) in names and tag.startswith(_TAG):
            return True
        shown = f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag
        self.report(f"the tag `{shown}` cannot be used here", place, "leave it out: recipes hold plain values")
        return False

    def scalar(self, raw: Any, place: Place) -> Scalar:
        text = str(raw.value)
        if not self._known_tag(raw, place, "null", "bool", "int", "float", "str", "merge"):
            return Scalar(text, text, place)
        kind = str(raw.tag).removeprefix(_TAG)
        pattern = _PATTERN.get(kind)
        if kind == "float" and _PATTERN["int"].fullmatch(text):
            pattern = None  # `!!float 3`
        if pattern is not None and not pattern.fullmatch(text):
            self.report(f"`{_short(text)}` is not a value of `!!{kind}`", place)
            return Scalar(text, text, place)
        value: bool | int | float | str | None = text
        if kind == "null":
            value = None
        elif kind == "bool":
            value = text.lower() == "true"
        elif kind == "int":
            digits = text.lstrip("+-")
            if len(digits) > 100:
                self.report(f"`{_short(text)}` is too large a number", place)
                return Scalar(0, text, place)
            base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
            value = int(digits[2:] if base != 10 else text, base)
        elif kind == "float":
            value = float(text.replace(".", "") if "inf" in text.lower() or "nan" in text.lower() else text)
            if not math.isfinite(value):
                self.report(f"`{_short(text)}` is not a finite number", place)
                return Scalar(0.0, text, place)
        elif bad := unusable(text):
            self.report(bad, place)
            return Scalar("", "", place)
        return Scalar(value, text, place)

    def entries(self, raw: MappingNode) -> dict[str, MapEntry]:
        """Entries of a mapping: its own in order, then the entries that `<<` merges in."""
        result: dict[str, MapEntry] = {}
        merged: list[MapNode] = []
        merge_key: Place | None = None
        for raw_key, raw_value in raw.value:
            place = self.place(raw_key.start_mark.index, raw_key.end_mark.index)
            if not isinstance(raw_key, ScalarNode):
                self.report("a key must be a single value", place)
                continue
            if str(raw_key.tag) == f"{_TAG}merge":
                if merge_key is not None:
                    self.report("duplicate key `<<`", place, "one `<<: [*a, *b]` merges several")
                merge_key = place
                merged += self._merged(raw_value, place)
                continue
            self._known_tag(raw_key, place, "null", "bool", "int", "float", "str")
            key = str(raw_key.value)  # every key of a recipe is text, so `on` and `1` are as well
            if bad := unusable(key):
                self.report(bad, place)
                continue
            node = self.node(raw_value)
            if key in result:
                first = result[key].key
                before = (
                    f"it stands in line {first.line} already"
                    if first is not None and first.line
                    else "it stands there twice"
                )
                self.report(f"duplicate key `{key}`", place, f"{before}: keep one")
            else:
                result[key] = MapEntry(node, place)
        for source in merged:
            for key, entry in source.entries.items():
                result.setdefault(key, entry)
        return result

    def _merged(self, raw: Any, place: Place) -> list[MapNode]:
        node = self.node(raw)
        sources = node.items if isinstance(node, ListNode) else [node]
        if wrong := [source for source in sources if not isinstance(source, MapNode)]:
            self.report("`<<` merges mappings only", wrong[0].place or place)
        return [source for source in sources if isinstance(source, MapNode)]


def unusable(text: str) -> str | None:
    """Why text cannot be a path or a name; None for text that can."""
    if "\0" in text:
        return "the character U+0000 cannot be used"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "half a surrogate pair cannot be used"
    return None


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
