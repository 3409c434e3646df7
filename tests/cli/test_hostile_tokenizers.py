"""Tokenizers with damaged settings, and ones that break on some texts, end a command with one line and status 2."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from compress.cli import main

TEXT = "a" * 40 + "! w1 w2 <|doc|>\n"


@pytest.fixture
def measured(tmp_path, pico_llama, monkeypatch, capfd):
    """Status and last line of `compress eval` on a pico Llama with some of a tokenizer's settings changed."""

    def run(file: str, **changes: object) -> tuple[int, str]:
        folder = shutil.copytree(pico_llama, tmp_path / "model")
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, **changes}))
        (tmp_path / "x.txt").write_text(TEXT)
        monkeypatch.setattr(
            sys, "argv", ["compress", "eval", str(folder), "--data", str(tmp_path / "x.txt"), "--window", "32", "-q"]
        )
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, capfd.readouterr().err.strip().splitlines()[-1]

    return run


def test_eval_refuses_a_tokenizer_that_panics(measured):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    status, said = measured("tokenizer.json", pre_tokenizer=split)
    assert (status, "the tokenizer breaks on it: " in said) == (2, True), said


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"model_max_length": "x"}), ("tokenizer_config.json", {"bos_token": [1]}), ("tokenizer_config.json", {"chat_template": 3}),
        ("tokenizer_config.json", {"tokenizer_class": "set_seed"}), ("tokenizer_config.json", {"padding_side": "up"}), ("tokenizer.json", {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}),
    ],
    ids=str,
)  # fmt: skip
def test_eval_refuses_tokenizer_settings_of_wrong_types(file, changes, measured):
    status, said = measured(file, **changes)
    assert (status, said.startswith("compress: ")) == (2, True) or status == 0, said
