"""Samples: parts, digests, and the checks of ids and positions."""

from __future__ import annotations

import hashlib

import pytest
import torch

from compress.data.batches import Batches, check_vocabulary, first
from compress.data.token_ids import given_ids
from compress.errors import DataError


def test_parts_cover_every_sample():
    ids = torch.arange(35).reshape(7, 5)
    parts = Batches(ids, ids % 2 == 0, tuple("abcdefg"), ids % 3).parts(11)
    assert [len(p.ids) for p in parts] == [2, 2, 2, 1]
    assert torch.equal(torch.cat([p.ids for p in parts]), ids)
    assert torch.equal(torch.cat([p.mask for p in parts]), ids % 2 == 0)
    assert torch.equal(torch.cat([p.inputs("cpu")["token_type_ids"] for p in parts]), ids % 3)
    assert "".join(c for p in parts for c in p.chosen) == "abcdefg"
    assert [(len(p.ids), p.mask, list(p.inputs("cpu"))) for p in Batches(ids).parts(1)] == [
        (1, None, ["input_ids"])
    ] * 7


def test_sha256_depends_on_ids_and_mask():
    ids = torch.tensor([[1, 2], [3, 4]])
    data = ids.numpy().astype("<i8").tobytes()
    assert Batches(ids).sha256() == hashlib.sha256(data).hexdigest()
    assert Batches(ids.T.contiguous().T).sha256() == Batches(ids).sha256()
    mask = torch.tensor([[True, True], [True, False]])
    assert Batches(ids, mask).sha256() == hashlib.sha256(data + b"\x01\x01\x01\x00").hexdigest()


def test_first_cuts_samples_and_tokens():
    batches = given_ids(torch.arange(12).reshape(3, 4))
    assert torch.equal(first(batches, None, None, "x").ids, batches.ids)
    cut = first(batches, 2, 3, "x")
    assert (cut.ids.tolist(), cut.chosen) == ([[0, 1, 2], [4, 5, 6]], ("data#0", "data#1"))
    with pytest.raises(DataError, match=r"x: holds 3 samples of 4 tokens, 4 of 4 are asked for; leave out"):
        first(batches, 4, None, "x")
    with pytest.raises(DataError, match=r"x: holds 3 samples of 4 tokens, 3 of 5 are asked for"):
        first(batches, None, 5, "x")


def test_check_vocabulary_names_the_first_bad_id():
    batches = given_ids(torch.tensor([[1, 2], [3, 300]]), "ids.npy")
    check_vocabulary(batches, 301)
    check_vocabulary(batches, None)
    with pytest.raises(DataError) as caught:
        check_vocabulary(batches, 300, "here/ids.npy")
    assert str(caught.value) == (
        "here/ids.npy: ids.npy#1 has token 300 at 1, the model knows 0 to 299; use the tokenizer that belongs to the model"
    )
    with pytest.raises(DataError, match=r"^data#0 has token -100 at 1; use"):
        check_vocabulary(given_ids(torch.tensor([[1, -100]])), None)
