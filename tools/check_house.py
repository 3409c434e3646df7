"""Rules of the house that ruff, mypy and import-linter do not check. ``make check`` runs it; status 1 with one line per breach.

- No circle between files or between packages, whether an import stands at the top, inside a function or under TYPE_CHECKING.
- No model family is named outside ``compress/architectures``.
- No file above 400 lines and no function above 60, except tables.
- No public class is defined twice.
- No variable or parameter is called ``how``, ``found``, ``says`` or ``ran``.
- No docstring begins with "What" or "Of".
- A file of a checkpoint is reached by ``safe_file``.
"""

from __future__ import annotations

import ast
import gc
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "compress"
FILE_LINES, FUNCTION_LINES = 400, 60
#: Files that are tables of data.
TABLES = {"architectures/records.py"}
VAGUE = {"how", "found", "says", "ran"}
#: Files that hold words of users, which may be names of families: a did-you-mean.
USERS_WORDS = {"passes/__init__.py", "recipe/suggest.py"}
#: Modules that may join a folder and a name themselves, and why.
JOINERS = {
    # checked there, name by name
    "checkpoint/sidecars.py", "checkpoint/files.py", "checkpoint/open.py",
    # folders that we write, or that we have just written
    "training/teacher_cache.py",
    # run folders hold no links (`RunFolder.locked`), outputs are compared file by file
    "pipeline/closing.py", "pipeline/contents.py", "pipeline/publish.py",
    # stands alone in compact checkpoints; this package never runs it there
    "checkpoint/modeling.py",
}  # fmt: skip
#: The nodes of a file, its module first.
Nodes = list[ast.AST]


def module_of(path: Path) -> str:
    """Dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(nodes: Nodes, modules: set[str]) -> Iterator[str]:
    """Modules of the package that a file imports, wherever the import stands."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules:
                    yield inner
                elif node.module in modules:
                    yield node.module


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                result.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return result


def room(module: str) -> str:
    """The package or single module below ``compress`` that a module belongs to; a pass is a room of its own."""
    parts = module.split(".")
    if parts[1:2] == ["passes"] and len(parts) > 3:
        return ".".join(parts[:3])
    return ".".join(parts[:2])


def check_circles(files: dict[Path, Nodes]) -> Iterator[str]:
    """Circles between files, and between packages."""
    modules = {module_of(path) for path in files}
    lazy = {"compress", "compress.__main__"}  # the package's own lazy exports
    edges = {
        module_of(path): {m for m in imported(nodes, modules) if m not in lazy} - {module_of(path)}
        for path, nodes in files.items()
        if module_of(path) not in lazy
    }
    for component in circles(edges):
        yield f"circle between files: {' ↔ '.join(component)}"
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, others in edges.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    for component in circles(rooms):
        yield f"circle between packages: {' ↔ '.join(component)}"


def check_sizes(path: Path, text: str, nodes: Nodes) -> Iterator[str]:
    """Files and functions that are too long."""
    name = path.relative_to(PACKAGE).as_posix()
    lines = len(text.splitlines())
    if lines > FILE_LINES and name not in TABLES:
        yield f"compress/{name}: {lines} lines; at most {FILE_LINES}"
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"compress/{name}:{node.lineno}: {node.name} has {length} lines; at most {FUNCTION_LINES}"


def check_names(path: Path, nodes: Nodes) -> Iterator[str]:
    """Vague names, and docstrings that begin with them."""
    name = path.relative_to(PACKAGE).as_posix()
    for node in nodes:
        bound = node.arg if isinstance(node, ast.arg) else None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = node.id
        if bound in VAGUE:
            yield f"compress/{name}:{node.lineno}: `{bound}` says nothing; name the thing"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            doc = ast.get_docstring(node) or ""
            if re.match(r"(What|Of)\b", doc):
                line = 1 if isinstance(node, ast.Module) else node.lineno
                yield f"compress/{name}:{line}: docstring begins with `{doc.split()[0]}`; begin with the noun or the verb"


def check_classes(files: dict[Path, Nodes]) -> Iterator[str]:
    """Public classes and type aliases that are defined more than once."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path, (tree, *_) in files.items():
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [t.id for t in targets if isinstance(t, ast.Name) and re.fullmatch(r"[A-Z]\w*[a-z]\w*", t.id)]
            for one in names:
                if not one.startswith("_"):
                    homes[one].append(path.relative_to(ROOT).as_posix())
    for one, paths in sorted(homes.items()):
        if len(paths) > 1:
            yield f"{one} is defined {len(paths)} times: {', '.join(paths)}"


def families() -> set[str]:
    """Every ``model_type`` that a record of `compress.architectures` names."""
    sys.path.insert(0, str(ROOT))
    from compress.architectures.records import RECORDS

    return {record.model_type for record in RECORDS}


def check_families(path: Path, nodes: Nodes, names: set[str]) -> Iterator[str]:
    """String constants outside ``architectures`` that are a model type, docstrings aside."""
    name = path.relative_to(PACKAGE).as_posix()
    if name.startswith("architectures/") or name in USERS_WORDS:
        return
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            yield f"compress/{name}:{node.lineno}: names the model family `{node.value}`; ask `compress.architectures`"


def joins(nodes: Nodes) -> list[int]:
    """Lines that say ``folder / …``, ``x.folder / …``, ``Path(folder) / …`` or ``folder.joinpath(…)``."""

    def is_folder(node: ast.expr) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Path" and node.args:
            node = node.args[0]
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        return name in ("folder", "snapshot", "checkpoint", "model_folder")

    found = []
    for node in nodes:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and is_folder(node.left):
            found.append(node.lineno)
        call = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if call is not None and call.attr in ("joinpath", "glob", "rglob", "iterdir") and is_folder(call.value):
            found.append(node.lineno)
    return found


def check_joins(files: dict[Path, Nodes]) -> Iterator[str]:
    """Files of checkpoints that are read without ``safe_file``, which follows no link out of a checkpoint."""
    unused = set(JOINERS)
    for path, nodes in files.items():
        name, lines = path.relative_to(PACKAGE).as_posix(), joins(nodes)
        if name not in JOINERS:
            yield from (f"compress/{name}:{line}: reads a folder's file without safe_file" for line in lines)
        elif lines:
            unused.remove(name)
    for name in sorted(unused):
        yield f"compress/{name}: joins no paths any more; take it out of JOINERS"


def main() -> int:
    """Print every breach; the exit status."""
    gc.disable()  # half a million nodes and no garbage
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    files = {path: [*ast.walk(ast.parse(text))] for path, text in texts.items()}
    problems = [*check_circles(files), *check_classes(files), *check_joins(files)]
    names = families()
    for path, nodes in files.items():
        problems += [
            *check_sizes(path, texts[path], nodes),
            *check_names(path, nodes),
            *check_families(path, nodes, names),
        ]
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
