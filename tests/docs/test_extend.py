"""The examples of docs/extend run: their files become a package, or files of this one, then their tests are called."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "extend").glob("*.md"))

#: Runs the functions of the test files with folders of their own, in a process that has imported nothing of the example.
RUN = """
import runpy, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
count = 0
for file in sorted(Path(sys.argv[1]).glob("test_*.py")):
    for name, function in runpy.run_path(str(file)).items():
        if name.startswith("test_"):
            scratch = Path(sys.argv[1]) / "scratch" / name
            scratch.mkdir(parents=True)
            function(scratch)
            count += 1
print(count, "tests")
"""


def files(page: Path) -> dict[str, str]:
    """Code blocks of a page by the path in their first line."""
    blocks = re.findall(
        r"^```\w+\n# ([\w/]+\.\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return dict(blocks)


def write_package(page: Path, folder: Path) -> None:
    """Write the page's files below ``folder``, and the metadata by which Python finds its entry points.

    If one of them belongs into this package, it is added to a copy of it, which is imported in its place.
    """
    if any(name.startswith("compress/") for name in files(page)):
        shutil.copytree(ROOT / "compress", folder / "compress")
    for name, text in files(page).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if not (folder / "pyproject.toml").exists():  # a file for this package, not a package of its own
        return
    groups = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        line for group, names in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))
    ]
    metadata = folder / "my_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("\n".join(lines))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in ("codec", "edit", "family", "metric"))
        )
        for page in PAGES
    ],
)
def test_extend_example_runs(page: Path, tmp_path: Path) -> None:
    write_package(page, tmp_path)

    done = processes.run(RUN, tmp_path)

    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[1-9]\d* tests\n", done.stdout)
