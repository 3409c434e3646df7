"""A file of a checkpoint is reached by `safe_file` alone, which follows no link out of it. Held over the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Modules that may join a folder and a name themselves, and why.
ALLOWED = {
    # checked there, name by name
    "checkpoint/sidecars.py", "checkpoint/files.py", "checkpoint/open.py",
    # folders that we write, or that we have just written
    "training/teacher_cache.py",
    # run folders hold no links (`RunFolder.locked`), outputs are compared file by file
    "pipeline/closing.py", "pipeline/contents.py", "pipeline/publish.py",
    # stands alone in compact checkpoints; this package never runs it there
    "checkpoint/modeling.py",
}  # fmt: skip


def joins(tree: ast.AST) -> list[int]:
    """Lines that say ``folder / …``, ``x.folder / …``, ``Path(folder) / …`` or ``folder.joinpath(…)``."""

    def is_folder(node: ast.expr) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Path" and node.args:
            node = node.args[0]
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return name in ("folder", "snapshot", "checkpoint", "model_folder")

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and is_folder(node.left):
            found.append(node.lineno)
        call = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if call is not None and call.attr in ("joinpath", "glob", "rglob", "iterdir") and is_folder(call.value):
            found.append(node.lineno)
    return found


def test_source_joins_paths_through_safe_file():
    found, used = [], set()
    for path in sorted((ROOT / "compress").rglob("*.py")):
        name = str(path.relative_to(ROOT / "compress"))
        lines = joins(ast.parse(path.read_text(encoding="utf-8")))
        if name in ALLOWED:
            used |= {name} if lines else set()
        else:
            found += [f"compress/{name}:{line}" for line in lines]
    assert not found, f"reads a folder's file without safe_file: {', '.join(found)}"
    assert used == ALLOWED, f"needs no exception any more: {sorted(ALLOWED - used)}"


def test_joins_finds_forbidden_paths():
    text = "a = folder / 'README.md'\nb = x.folder / name\nc = Path(folder) / 'x'\nd = folder.joinpath('x')\ne = work / 'x'\n"
    assert joins(ast.parse(text)) == [1, 2, 3, 4]
