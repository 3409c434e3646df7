"""The rule that a file of a checkpoint is reached by `safe_file` alone, which follows no link out of it."""

from __future__ import annotations

import ast

from tools.check_house import joins


def test_joins_finds_forbidden_paths():
    text = "a = folder / 'README.md'\nb = x.folder / name\nc = Path(folder) / 'x'\nd = folder.joinpath('x')\ne = work / 'x'\n"
    assert sorted(joins([*ast.walk(ast.parse(text))])) == [1, 2, 3, 4]
