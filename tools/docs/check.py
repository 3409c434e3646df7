"""Check the Markdown of the repository without Sphinx: links, anchors, paths, headings, length of lines.

``python -m tools.docs.check`` prints each mistake as ``file:line: mistake`` and exits with status 1 if there is one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 120

#: Pages that name paths of earlier commits.
HISTORY = ("CHANGELOG.md", "docs/decisions/")
#: Model cards, which are part of a checkpoint.
CARDS = ("examples/tiny-lm/", "examples/tiny-classifier/")
#: Pages written by a command, whose lines are as long as their text.
GENERATED = (
    "docs/reference.md",
    "docs/passes/index.md",
    "docs/commands.md",
    "docs/decisions/index.md",
    "docs/decisions/000-moved.md",
)

#: Files of the examples that the guides make up.
_MADE_UP = re.compile(r"\b(?:test_)?(?:clip|positions|scaled|gain|bits_per_token)\b")

_FENCE = re.compile(r"^\s*(```+|~~~+)")
_LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_CODE = re.compile(r"(`+)(.+?)\1")
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*$")
#: A path of the repository in code, such as `compress/passes/cast/plan.py`; placeholders like <name> are no path.
_PATH = re.compile(
    r"(?:compress|tests|docs|recipes|benchmarks|tools|examples)/[\w./-]*|[A-Z]+\.md|Makefile|pyproject\.toml"
)


@dataclass(frozen=True)
class Line:
    """One line of a page: its number, its text, and whether it is in a code block or in a generated part."""

    number: int
    text: str
    code: bool
    generated: bool


def main() -> None:
    """Print every mistake; exit with status 1 if there is one."""
    reported = [mistake for page in tracked() for mistake in mistakes(page)]
    print("\n".join(reported) if reported else f"{len(tracked())} Markdown pages are in order")
    sys.exit(1 if reported else 0)


@cache
def tracked() -> tuple[Path, ...]:
    """Return the Markdown files of the repository that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (ROOT / name for name in sorted(set(listed.stdout.splitlines())) if not name.startswith(CARDS))
    return tuple(path for path in paths if path.exists())


def mistakes(page: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield ``file:line: mistake`` for each broken link, missing path, repeated heading and long line of a page."""
    name = page.relative_to(root).as_posix()
    seen: set[str] = set()
    for line in lines(page):
        where = f"{name}:{line.number}:"
        long = not (line.code or line.generated or line.text.startswith("|") or name in GENERATED)
        if long and len(line.text) > WIDTH:
            yield f"{where} {len(line.text)} characters; break the line at {WIDTH}"
        if line.code:
            continue
        if heading := _HEADING.match(line.text):
            if (title := slug(heading[2])) in seen:
                yield f"{where} a second heading {heading[2]!r}; give it another title"
            seen.add(title)
        yield from (f"{where} {mistake}" for mistake in _broken_links(line.text, page, root))
        if not name.startswith(HISTORY):
            yield from (f"{where} {mistake}" for mistake in _missing_paths(line.text, root))


def lines(page: Path) -> Iterator[Line]:
    """Yield the lines of a page, with code blocks and generated parts marked."""
    fence, generated = "", False
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        mark = _FENCE.match(text)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
            yield Line(number, text, True, generated)
            continue
        if not fence and text.startswith("<!-- begin "):
            generated = True
        yield Line(number, text, bool(fence), generated)
        if not fence and text.startswith("<!-- end"):
            generated = False


def _broken_links(text: str, page: Path, root: Path) -> Iterator[str]:
    """Yield a message for each relative link of a line whose file or heading does not exist."""
    for target in _LINK.findall(_CODE.sub(lambda m: "x" * len(m[0]), text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            yield f"links to {target}, which does not exist"
        elif not file.is_relative_to(root):
            yield f"links to {target}, which is outside of the repository"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            yield f"links to {target}, but {path or 'this page'} has no heading #{anchor}"


def _missing_paths(text: str, root: Path) -> Iterator[str]:
    """Yield a message for each path in code that does not exist."""
    for _, code in _CODE.findall(text):
        if _PATH.fullmatch(code) and not _MADE_UP.search(code) and not (root / code).exists():
            yield f"names {code}, which does not exist"


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings."""
    headings = (_HEADING.match(line.text) for line in lines(page) if not line.code)
    return frozenset(slug(heading[2]) for heading in headings if heading)


def slug(title: str) -> str:
    """Return the anchor that GitHub and MyST give a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


if __name__ == "__main__":
    main()
