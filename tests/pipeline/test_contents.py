"""Contents are read again only where something was touched."""

from __future__ import annotations

import compress
from compress import files


def test_contents_reads_nothing_when_untouched(small, tmp_path, monkeypatch):
    """Of many GB a rerun would take minutes."""
    from compress.pipeline import contents, fingerprint

    compress.run(small())
    read = []
    for module in (contents, fingerprint):
        monkeypatch.setattr(module, "sha256", lambda path: read.append(path) or files.sha256(path))
    assert compress.run(small()).nothing_to_do
    assert read == []
