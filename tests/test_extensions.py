"""Entry points of installed packages."""

from __future__ import annotations

import sys

from compress import extensions


def test_entry_points_are_those_of_packages_on_the_path(tmp_path, monkeypatch):
    package = tmp_path / "mine-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: mine\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[compress.metrics]\nlines = mine:Lines\n")
    assert not list(extensions.entry_points("compress.metrics"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "nowhere"), *sys.path])
    assert [(one.name, one.value) for one in extensions.entry_points("compress.metrics")] == [("lines", "mine:Lines")]
    assert not list(extensions.entry_points("compress.passes"))
