"""Damaged tokenizers are refused in one line."""

from __future__ import annotations

import pytest

from compress.errors import CheckpointError
from compress.models.processors import load_tokenizer


def test_load_tokenizer_refuses_damaged_files(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer cannot be read"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer, which text needs"):
        load_tokenizer(folder)
