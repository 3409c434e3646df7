"""Writes ``docs/decisions/000-moved.md``: where every file, public name and setting of an earlier commit is now.

    python tools/moved.py --before 6c328db

Files follow git's own detection of renames. Public names are followed commit by commit: a name that is no longer in its file
is looked for in the files that the commit changed, first under the same name, then as the new name whose syntax tree is most
alike. Settings come from ``compress.recipe.renamed``.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/decisions/000-moved.md"
#: What took the place of names that went, with or without a name of its own.
REPLACED = {
    "architectures.narrowing": "architectures.model_map.ModelMap",
    "architectures.positions": "architectures.model_map.ModelMap",
    "architectures.record.Architecture.check": "architectures.agreement",
    "architectures.record.Architecture.is_block_matrix": "architectures.model_map.ModelMap",
    "checkpoint.codecs": "checkpoint.store",
    "checkpoint.quantization": "checkpoint.storage.compressed_tensors",
    "checkpoint.structure.with_shared": "checkpoint.edits.shared",
    "checkpoint.structure": "architectures.model_map.ModelMap",
    "evaluation.classification.metrics": "evaluation.metrics",
    "evaluation.language.token_metrics": "evaluation.metrics",
    "passes.albert": "architectures.conversions",
    "passes.base.matches": "passes.selection",
    "passes.distill.task_name": "evaluation.tasks.Task",
    "passes.sweeping.once": "workspace.Workspace.cached",
    "passes.sweeping": "architectures.model_map.ModelMap",
    "pipeline.assess.Assessment": "pipeline.baseline.EvaluationSettings",
    "pipeline.assess": "pipeline.evaluate",
    "pipeline.folder.RunFolder.cache": "workspace.Workspace.cached",
    "report.figures.Headline": "evaluation.metrics",
    "statistics": "evaluation.metrics",
}
#: A path and a public name in it.
Name = tuple[str, str]
#: Least share of two trees' parts that must agree for a name to count as renamed.
ALIKE = 0.7


def git(*arguments: str) -> str:
    """Output of a git command in the repository."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def renamed_files(before: str) -> dict[str, str]:
    """Old path ▶ new path of the files that moved."""
    rows = git("diff", "--name-status", "--find-renames=30%", "-l0", before, "HEAD", "--", "compress", "tests", "docs")
    parts = [row.split("\t") for row in rows.splitlines()]
    moves = {old: new for kind, old, *rest in parts if kind.startswith("R") for new in rest}
    return {old: new for old, new in moves.items() if old.endswith((".py", ".md")) and not old.endswith("__init__.py")}


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


def names_at(commit: str, paths: Iterable[str]) -> dict[Name, ast.AST]:
    """Public names of those files at a commit; a file that is not there has none."""
    found: dict[Name, ast.AST] = {}
    for path in paths:
        shown = subprocess.run(["git", "-C", str(ROOT), "show", f"{commit}:{path}"], capture_output=True, text=True)
        if shown.returncode == 0:
            found |= {(path, name): node for name, node in public(shown.stdout).items()}
    return found


def dotted(path: str, name: str = "") -> str:
    """``compress/x/y.py`` and a name ▶ ``x.y.name``."""
    module = path.removeprefix("compress/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"{module}.{name}" if name else module


def alike(a: Counter[str], b: Counter[str]) -> float:
    """Share of the parts of two trees that both have, from 0 to 1."""
    return 2 * sum((a & b).values()) / max(1, sum(a.values()) + sum(b.values()))


def step(parent: str, commit: str) -> dict[Name, Name | None]:
    """Where one commit took the names of the files that it changed; None for a name that is gone."""
    changed = git("diff", "--name-only", "--no-renames", parent, commit, "--", "compress").splitlines()
    paths = [path for path in changed if path.endswith(".py")]
    before, after = names_at(parent, paths), names_at(commit, paths)
    fresh = {name: shape(node) for name, node in after.items() if name not in before}
    moves: dict[Name, Name | None] = {}
    for (path, name), node in before.items():
        if (path, name) in after:
            continue
        same = [one for one in fresh if one[1] == name]
        if len(same) == 1:
            moves[path, name] = same[0]
            continue
        mine, kind = shape(node), type(node)
        scores = [
            (alike(mine, parts), one)
            for one, parts in fresh.items()
            if isinstance(after[one], kind) and ("." in one[1]) == ("." in name)
        ]
        score, best = max(scores, default=(0.0, None))
        moves[path, name] = best if score >= ALIKE else None
    return moves


def renamed_names(before: str) -> list[tuple[str, str]]:
    """Public names that are no longer what and where they were, with what they are now (empty: gone)."""
    paths = [p for p in git("ls-tree", "-r", "--name-only", before, "compress").splitlines() if p.endswith(".py")]
    now: dict[Name, Name | None] = {name: name for name in names_at(before, paths)}
    parent = before
    for commit in git("rev-list", "--reverse", "--first-parent", f"{before}..HEAD", "--", "compress").split():
        try:
            moves = step(parent, commit)
        except SyntaxError:  # a commit that does not parse is taken together with the next one
            continue
        now = {old: moves.get(new, new) if new is not None else None for old, new in now.items()}
        parent = commit
    rows = [(dotted(*old), dotted(*new) if new is not None else "") for old, new in now.items() if old != new]
    return sorted(row for row in rows if not follows(row, dict(rows)))


def follows(row: tuple[str, str], known: dict[str, str]) -> bool:
    """Whether a row says of a method no more than the row of its class."""
    (owner, _, method), (now, _, called) = row[0].rpartition("."), row[1].rpartition(".")
    return owner in known and ((known[owner] == now and method == called) or not row[1])


def settings() -> list[tuple[str, str]]:
    """Old and new spelling of every recipe key and value that changed, each behind the passes that have it."""
    sys.path.insert(0, str(ROOT))
    from compress.recipe.renamed import rows

    return [(f"{', '.join(filter(None, sections)) or 'recipe'}: {old}", new) for sections, old, new in rows()]


def table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    """A section with a table of two columns."""
    lines = [f"## {title}", "", "| before | now |", "|---|---|"]
    return [*lines, *(f"| `{old}` | {f'`{new}`' if new else instead(old)} |" for old, new in rows), ""]


def instead(old: str) -> str:
    """The last column for a name that went."""
    parts = old.split(".")
    owners = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    replacement = next((REPLACED[owner] for owner in owners if owner in REPLACED), None)
    return "gone" if replacement is None else f"replaced by `{replacement}`"


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
        *table("Names", renamed_names(before)),
        *table("Recipe keys and values", settings()),
    ]
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
