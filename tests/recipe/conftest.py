"""A folder to work in, with texts and a checkpoint's folder, and the recipes that tests write there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import RecipeError
from compress.recipe import load_recipe

GOOD = """\
model: tiny-lm
output: out
passes:
  - cast: {weights: bf16}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: ``text/{train,valid}.txt`` and ``models/tiny/``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "text" / f"{name}.txt").write_text("some words\n")
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def problems(work: Path) -> Callable[..., list[str]]:
    """Mistakes in a recipe of that text, as rendered."""

    def check(text: str | bytes, *sets: str) -> list[str]:
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path("r.yaml"), sets)
        return caught.value.problems

    return check


@pytest.fixture
def heads(problems: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """First lines of the mistakes."""
    return lambda text, *sets: [problem.splitlines()[0] for problem in problems(text, *sets)]
