"""Foreign text in what this package prints and writes: names of tensors, files and settings may hold any character.

A terminal obeys control characters, characters that turn the direction of text hide what a name is, and Markdown may
hold HTML. No torch here.
"""

from __future__ import annotations

import re
import unicodedata

_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:.*?[^`])\1(?!`)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


def printable(text: str) -> str:
    """Text for a terminal: characters that do not print are spelt as Python spells them, ``\\x1b``; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if _prints(c) else c.encode("unicode_escape").decode() for c in text)


def printable_json(text: str) -> str:
    """The same of a JSON document, by escapes of JSON; it says what it said."""
    if text.isprintable():
        return text
    return "".join(c if _prints(c) else _json_escape(c) for c in text)


def in_one_line(text: str) -> str:
    """Text for a terminal, in one line whatever it holds."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


def markdown(line: str) -> str:
    """A line of Markdown whose names may hold HTML, which is shown and not obeyed; code spans show it anyway."""
    if "<" not in line and line.isprintable():
        return line
    parts, last = [], 0
    for match in _CODE.finditer(line):
        parts += [_TAG.sub("&lt;", line[last : match.start()]), match[0]]
        last = match.end()
    return printable("".join([*parts, _TAG.sub("&lt;", line[last:])]))


def quoted(text: str) -> str:
    """Text as a string of Python, in double quotes."""
    return (
        '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")) + '"'
    )


def fence(text: str) -> str:
    """Backticks that fence code in Markdown: one more than the longest run in it, at least three."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _prints(character: str) -> bool:
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"


def _json_escape(character: str) -> str:
    code = ord(character)
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"
