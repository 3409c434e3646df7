"""Matching of module names against the patterns of a ``quantization_config``, in bounded time. Imports no torch.

A checkpoint is untrusted input, and for some patterns Python's ``re`` takes exponential time. Here a pattern is compiled to a
small program. Each instruction runs at most once at each position of a name, and all matching of one checkpoint shares a limit
of steps. Literals, classes, groups, alternatives, repeats, anchors and lookahead are supported; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

from compress.errors import CheckpointError

#: Cost limit for all patterns of one checkpoint: some seconds.
_STEPS = 20_000_000
#: Cost of one instruction; a comparison of names costs 1.
_STEP = 5
#: Most characters of a pattern and instructions of its program, which counted repeats multiply.
_LONGEST = 4_000
_DEEPEST = 50
#: Instructions: opcode (``char``, ``split``, ``jump``, ``assert``, ``ahead``, ``match``) and two operands.
_Program = tuple[tuple[str, Any, Any], ...]


class Matcher:
    """Matches names as compressed-tensors does, within one cost limit.

    ``re:…`` is a regular expression that the beginning of a name must match; any other pattern is a whole name.

    Args:
        where: the place that errors name.
        whole: a regular expression must match the whole name.
    """

    def __init__(self, where: str, *, whole: bool = False) -> None:
        self._where, self._left, self._whole = where, _STEPS, whole

    def matches(self, pattern: str, name: str) -> bool:
        """Whether a pattern matches a name.

        Raises:
            CheckpointError: the pattern is broken or not supported, or the cost limit is reached.
        """
        self._count()
        if not pattern.startswith("re:"):
            return pattern == name
        if not self._whole and "\n" not in name and (test := _simple(pattern)) is not None:
            return test(name)
        program = _compiled(pattern, self._whole)
        if isinstance(program, str):
            raise CheckpointError(f"has a pattern that cannot be used, {pattern[:80]!r}: {program}", where=self._where)
        return self._run(program, 0, name, 0)

    def any(self, patterns: Iterable[str], name: str) -> bool:
        """Whether any of the patterns matches the name."""
        return any(self.matches(pattern, name) for pattern in patterns)

    def _count(self, cost: int = 1) -> None:
        self._left -= cost
        if self._left < 0:
            raise CheckpointError("has patterns that take too long to match", where=self._where)

    def _run(self, program: _Program, start: int, name: str, place: int) -> bool:
        stack, seen = [(start, place)], set()
        while stack:
            state = stack.pop()
            if state in seen:
                continue
            seen.add(state)
            self._count(_STEP)
            number, at = state
            kind, first, second = program[number]
            if kind == "match":
                return True
            if kind == "char":
                if at < len(name) and first(name[at]):
                    stack.append((number + 1, at + 1))
            elif kind == "split":
                stack += [(second, at), (first, at)]
            elif kind == "jump":
                stack.append((first, at))
            elif kind == "assert":
                if first(name, at):
                    stack.append((number + 1, at))
            elif self._run(program, number + 1, name, at) == second:
                stack.append((first, at))
        return False


def unsupported(pattern: str) -> str | None:
    """Text of the reason why `Matcher` cannot read a pattern; None if it can."""
    program = _compiled(pattern, False)
    return program if isinstance(program, str) else None


@lru_cache(4096)
def _compiled(pattern: str, whole: bool) -> _Program | str:
    """Program of a pattern that matches the beginning of a name, or a ``whole`` one; or an error text."""
    text = pattern.removeprefix("re:")
    if len(text) > _LONGEST:
        return "it is too long"
    try:
        program = _Parser(text).program()
        end = [("assert", lambda name, at: at == len(name), None)] if whole else []
        return (*program[:-1], *end, program[-1])
    except ValueError as error:
        return str(error)


@lru_cache(4096)
def _simple(pattern: str) -> Callable[[str], bool] | None:
    """Fast test for the usual patterns: a literal, with or without ``.*`` before and ``$`` after it; None for others."""
    text = pattern.removeprefix("re:")
    anywhere = text.startswith(".*")
    body = text[2:] if anywhere else text.removeprefix("^")
    end = body.endswith("$") and not body.endswith("\\$")
    literal, rest = [], body[:-1] if end else body.removesuffix(".*")
    while rest:
        if rest[0] == "\\" and len(rest) > 1 and not rest[1].isalnum():
            literal.append(rest[1])
            rest = rest[2:]
        elif rest[0].isalnum() or rest[0] in "_-/":
            literal.append(rest[0])
            rest = rest[1:]
        else:
            return None
    wanted = "".join(literal)

    def test(name: str) -> bool:
        if anywhere:
            return name.endswith(wanted) if end else wanted in name
        return name == wanted if end else name.startswith(wanted)

    return test


class _Parser:
    """Compiles a regular expression to a program. Raises ValueError with an error text."""

    _CLASSES: dict[str, Callable[[str], bool]] = {  # noqa: RUF012
        "d": str.isdecimal,
        "w": lambda c: c.isalnum() or c == "_",
        "s": str.isspace,
    }

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def program(self) -> list[tuple[str, Any, Any]]:
        """Instructions with absolute jumps."""
        instructions = self._alternatives()
        if self.at < len(self.text):
            raise ValueError("a bracket is closed that was not opened")
        return [*_placed(instructions, 0), ("match", None, None)]

    def _alternatives(self) -> list[tuple[str, Any, Any]]:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError("its brackets are nested too deeply")
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        self.depth -= 1
        instructions: list[tuple[str, Any, Any]] = []
        for branch in branches[:-1]:
            instructions.append(("split", len(instructions) + 1, len(instructions) + len(branch) + 2))
            instructions += [*_placed(branch, len(instructions)), ("out", None, None)]
        instructions += _placed(branches[-1], len(instructions))
        return [("jump", len(instructions), None) if kind == "out" else (kind, a, b) for kind, a, b in instructions]

    def _sequence(self) -> list[tuple[str, Any, Any]]:
        instructions: list[tuple[str, Any, Any]] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            part = self._repeated(self._atom())
            instructions += _placed(part, len(instructions))
            if len(instructions) > _LONGEST:
                raise ValueError("it is too long")
        return instructions

    def _repeated(self, part: list[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
        sign = self.text[self.at] if self.at < len(self.text) else ""
        if sign not in ("*", "+", "?", "{") or not sign:
            return part
        least, most = self._counts()
        self._take("?")  # lazy repeats match the same names
        if self.at < len(self.text) and self.text[self.at] in "*+?{":
            raise ValueError("a repeat is repeated")
        if len(part) * max(least, most or 0) > _LONGEST:
            raise ValueError("it is too long")
        instructions: list[tuple[str, Any, Any]] = []
        for _ in range(least):
            instructions += _placed(part, len(instructions))
        if most is None:
            start, end = len(instructions), len(instructions) + len(part) + 2
            return [*instructions, ("split", start + 1, end), *_placed(part, start + 1), ("jump", start, None)]
        end = len(instructions) + (most - least) * (len(part) + 1)
        for _ in range(most - least):
            instructions.append(("split", len(instructions) + 1, end))
            instructions += _placed(part, len(instructions))
        return instructions

    def _counts(self) -> tuple[int, int | None]:
        """Least and most repeats; None for no limit."""
        sign = self.text[self.at]
        self.at += 1
        if sign != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        end = self.text.find("}", self.at)
        first, comma, last = self.text[self.at : end].partition(",") if end > 0 else ("", "", "")
        if not all(part.isascii() and (part.isdigit() or (comma and not part)) for part in (first, last or first)):
            raise ValueError("a repeat in braces is not a number or range")
        self.at = end + 1
        least = int(first or 0)
        most = int(last) if last else (None if comma else least)
        if most is not None and most < least:
            raise ValueError("a repeat in braces has its ends reversed")
        return least, most

    def _atom(self) -> list[tuple[str, Any, Any]]:
        sign = self.text[self.at]
        self.at += 1
        if sign in "*+?{":
            raise ValueError("a repeat has nothing in front of it")
        if sign == "(":
            return self._group()
        if sign == "[":
            return [("char", self._set(), None)]
        if sign == ".":
            return [("char", lambda c: c != "\n", None)]
        if sign == "^":
            return [("assert", lambda name, at: at == 0, None)]
        if sign == "$":
            return [("assert", lambda name, at: name[at:] in ("", "\n"), None)]
        if sign != "\\":
            return [("char", sign.__eq__, None)]
        if self.text[self.at : self.at + 1] in ("b", "B"):
            return [("assert", self._border(self._escape_sign() == "b"), None)]
        return [("char", self._escaped(), None)]

    def _group(self) -> list[tuple[str, Any, Any]]:
        ahead = None
        if self._take("?"):
            kind = next((k for k in (":", "=", "!", "P<") if self.text.startswith(k, self.at)), None)
            if kind is None or self.text.startswith(("P=", "P>"), self.at):
                raise ValueError("of groups with `(?` only `(?:`, `(?=`, `(?!` and `(?P<name>` are supported")
            self.at += len(kind)
            if kind == "P<":
                self.at = self.text.find(">", self.at) + 1 or len(self.text)
            ahead = {"=": True, "!": False}.get(kind)
        instructions = self._alternatives()
        if not self._take(")"):
            raise ValueError("a bracket is not closed")
        if ahead is None:
            return instructions
        return [("ahead", len(instructions) + 2, ahead), *_placed(instructions, 1), ("match", None, None)]

    def _set(self) -> Callable[[str], bool]:
        tests: list[Callable[[str], bool]] = []
        inverse, first = self._take("^"), True
        while first or not self._take("]"):
            if self.at >= len(self.text):
                raise ValueError("a set of characters is not closed")
            first = False
            low = self._member()
            if (
                isinstance(low, str)
                and self.text.startswith("-", self.at)
                and self.text[self.at + 1 : self.at + 2] != "]"
            ):
                self.at += 1
                high = self._member() if self.at < len(self.text) else ""
                if not isinstance(high, str) or not low <= high:
                    raise ValueError("a range of characters is reversed or has no end")
                tests.append(partial(_between, low, high))
            else:
                tests.append(low.__eq__ if isinstance(low, str) else low)
        return lambda c: any(test(c) for test in tests) != inverse

    def _member(self) -> str | Callable[[str], bool]:
        sign = self.text[self.at]
        self.at += 1
        if sign != "\\":
            return sign
        if self.text[self.at : self.at + 1].isalnum():
            return self._escaped()
        return self._escape_sign()

    def _escaped(self) -> Callable[[str], bool]:
        sign = self._escape_sign()
        if sign.lower() in self._CLASSES:
            test, inverse = self._CLASSES[sign.lower()], sign.isupper()
            return lambda c: test(c) != inverse
        if sign.isalnum():
            raise ValueError(f"the escape \\{sign} is not supported")
        return sign.__eq__

    def _escape_sign(self) -> str:
        if self.at >= len(self.text):
            raise ValueError("it ends in a backslash")
        self.at += 1
        return self.text[self.at - 1]

    def _border(self, wanted: bool) -> Callable[[str, int], bool]:
        word = self._CLASSES["w"]
        return lambda name, at: ((at > 0 and word(name[at - 1])) != (at < len(name) and word(name[at]))) == wanted

    def _take(self, sign: str) -> bool:
        taken = self.text.startswith(sign, self.at)
        self.at += len(sign) * taken
        return taken


def _between(low: str, high: str, sign: str) -> bool:
    return low <= sign <= high


def _placed(part: list[tuple[str, Any, Any]], offset: int) -> list[tuple[str, Any, Any]]:
    """Instructions of a part that is moved by ``offset``, with its jumps adjusted."""
    moved = []
    for kind, first, second in part:
        if kind == "split":
            first, second = first + offset, second + offset
        elif kind in ("jump", "ahead"):
            first += offset
        moved.append((kind, first, second))
    return moved
