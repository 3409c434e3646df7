from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.browser.chromium import Page, browser

#: `make test-browser` puts axe-core and the screenshots there.
BUILD = Path(__file__).resolve().parents[2] / "build/browser"


@pytest.fixture(scope="session")
def build():
    """The folder of axe-core and of screenshots; a test is skipped where browser or axe-core is absent, but fails in that target."""
    missing = [
        name for name, there in (("chromium", browser()), ("axe-core", (BUILD / "axe.min.js").is_file())) if not there
    ]
    if missing:
        text = f"{' and '.join(missing)} not found; `make test-browser` needs them"
        pytest.fail(text) if os.environ.get("COMPRESS_BROWSER") else pytest.skip(text)
    return BUILD


@pytest.fixture(scope="module")
def page(build, tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()
