"""Writes ``docs/decisions/000-moved.md``: where every file, public name and setting of an earlier commit is now.

    python tools/moved.py --before 6c328db

Files follow git's own detection of renames. A public class or function that is no longer where it was is looked for under
its name in every file; one that has vanished is matched to the new name whose syntax tree is most alike, where at least half
of it agrees. Settings come from ``compress.recipe.renamed``.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/decisions/000-moved.md"
#: Least share of two trees' parts that must agree for a name to count as renamed.
ALIKE = 0.5


def git(*arguments: str) -> str:
    """Output of a git command in the repository."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def renamed_files(before: str) -> dict[str, str]:
    """Old path ▶ new path of the files that moved."""
    rows = git("diff", "--name-status", "--find-renames=30%", "-l0", before, "HEAD", "--", "compress", "tests", "docs")
    parts = [row.split("\t") for row in rows.splitlines()]
    return {old: new for kind, old, *rest in parts if kind.startswith("R") for new in rest}


def shape(node: ast.AST) -> Counter[str]:
    """Parts of a syntax tree without the names in it: kinds of nodes with their children's kinds, constants, attributes."""
    parts: Counter[str] = Counter()
    for inner in ast.walk(node):
        children = ",".join(type(child).__name__ for child in ast.iter_child_nodes(inner))
        parts[f"{type(inner).__name__}({children})"] += 1
        if isinstance(inner, ast.Constant) and not isinstance(inner.value, str):
            parts[repr(inner.value)] += 1
        if isinstance(inner, ast.arg | ast.Name):
            parts[inner.arg if isinstance(inner, ast.arg) else inner.id] += 1
    return parts


def public(source: str) -> dict[str, ast.AST]:
    """Public classes and functions of a file, and public methods as ``Class.method``."""
    names: dict[str, ast.AST] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            names[node.name] = node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    names[f"{node.name}.{inner.name}"] = inner
    return names


def sources(commit: str) -> dict[str, str]:
    """Path ▶ text of the package's files at a commit."""
    paths = [p for p in git("ls-tree", "-r", "--name-only", commit, "compress").splitlines() if p.endswith(".py")]
    return {path: git("show", f"{commit}:{path}") for path in paths}


def dotted(path: str, name: str = "") -> str:
    """``compress/x/y.py`` and a name ▶ ``x.y.name``."""
    module = path.removeprefix("compress/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"{module}.{name}" if name else module


def alike(a: Counter[str], b: Counter[str]) -> float:
    """Share of the parts of two trees that both have, from 0 to 1."""
    return 2 * sum((a & b).values()) / max(1, sum(a.values()) + sum(b.values()))


def renamed_names(before: str, files: dict[str, str]) -> list[tuple[str, str]]:
    """Public names that are no longer found under their name in their file, with what they are now (empty: gone)."""
    old = {path: public(text) for path, text in sources(before).items()}
    new = {path: public(text) for path, text in sources("HEAD").items()}
    fresh = {
        (path, name): shape(node)
        for path, names in new.items()
        for name, node in names.items()
        if not any(name in others for others in old.values())
    }
    homes: dict[str, list[str]] = {}
    before_moves = {new_path: old_path for old_path, new_path in files.items()}
    for path, names in new.items():
        for name in names.keys() - old.get(before_moves.get(path, path), {}).keys():
            homes.setdefault(name, []).append(path)
    rows = []
    for path, names in old.items():
        now = files.get(path, path)
        for name, node in names.items():
            if name in new.get(now, {}):
                continue
            if "." not in name and len(homes.get(name, ())) == 1:
                rows.append((dotted(path, name), dotted(homes[name][0], name)))
                continue
            mine, kind = shape(node), type(node)
            scores = [
                (alike(mine, other) + (0.1 if where == now else 0.0), where, called)
                for (where, called), other in fresh.items()
                if ("." in called) == ("." in name) and isinstance(new[where][called], kind)
            ]
            best = max(scores, default=(0.0, "", ""))
            rows.append((dotted(path, name), dotted(best[1], best[2]) if best[0] >= ALIKE else ""))
    return sorted(row for row in rows if not follows(row, dict(rows)))


def follows(row: tuple[str, str], known: dict[str, str]) -> bool:
    """Whether a row says of a method no more than the row of its class."""
    (owner, _, method), (now, _, called) = row[0].rpartition("."), row[1].rpartition(".")
    return owner in known and known[owner] in (now, "") and (method == called or not row[1])


def settings() -> list[tuple[str, str]]:
    """Old and new spelling of every recipe key and value that changed."""
    sys.path.insert(0, str(ROOT))
    try:
        from compress.recipe.renamed import rows
    except ImportError:
        return []
    result: Any = rows()
    return list(result)


def table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    """A section with a table of two columns."""
    lines = [f"## {title}", "", "| before | now |", "|---|---|"]
    return [*lines, *(f"| `{old}` | {f'`{new}`' if new else 'gone'} |" for old, new in rows), ""]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, help="the commit before the move")
    before = parser.parse_args().before
    files = renamed_files(before)
    moved = sorted((old, new) for old, new in files.items())
    lines = [
        "# 000 · What moved where",
        "",
        f"Names in issues, notes and studies that were written before commit `{before}` are found here.",
        f"`python tools/moved.py --before {before}` makes this page.",
        "",
        *table("Files", moved),
        *table("Names", renamed_names(before, files)),
        *table("Recipe keys and values", settings()),
    ]
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
