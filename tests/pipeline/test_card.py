"""The base model that a card names."""

from __future__ import annotations

import pytest

from compress.pipeline.card import _base
from compress.report import Base


@pytest.mark.parametrize(
    ("config", "ancestor"),
    [({}, None), ({"_name_or_path": "org/tiny"}, "org/tiny"), ({"_name_or_path": "/root/x/y"}, None), ({"_name_or_path": 3}, None)],
)  # fmt: skip
def test_local_folder_is_no_hub_id(tmp_path, config, ancestor):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert _base(str(folder), folder, config) == Base("mine", False, ancestor=ancestor)


def test_path_that_exists_is_no_ancestor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/tiny").mkdir(parents=True)
    assert _base("out/tiny", tmp_path / "out/tiny", {"_name_or_path": "out/tiny"}).ancestor is None


def test_snapshot_of_the_cache_has_the_id_of_the_hub(tmp_path):
    folder = tmp_path / "hub/models--org--tiny-2/snapshots/0a1b"
    folder.mkdir(parents=True)
    assert _base(str(folder), folder, {}) == Base("org/tiny-2", True, "0a1b")


@pytest.mark.parametrize(
    ("model", "base"), [("org/tiny@v1", Base("org/tiny", True, "v1")), ("gpt2", Base("gpt2", False))]
)
def test_hub_id_is_taken_from_the_recipe(tmp_path, monkeypatch, model, base):
    monkeypatch.chdir(tmp_path)
    assert _base(model, tmp_path, {}) == base
