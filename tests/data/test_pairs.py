"""Samples for encoder-decoders."""

from __future__ import annotations

import pytest
import torch

from compress.data.batches import Batches
from compress.data.documents import Document
from compress.data.pairs import padded, sample_pairs, start_token, with_targets
from compress.errors import DataError
from tests import pico


def test_sample_pairs_reads_pairs_chats_and_plain_texts():
    """The decoder reads the start token, then all of the target but its last token."""
    tokenizer = pico.tokenizer()
    chat = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    documents = [
        Document("a#0", "", pair=("source", "to")),
        Document("a#1", "", messages=chat),
        Document("a#2", "both"),
    ]
    drawn = sample_pairs(tokenizer, documents, None, 32, seed=0, start=7)
    assert drawn.targets is not None
    assert drawn.mask is not None
    assert drawn.target_mask is not None
    read = {}
    for i, id_ in enumerate(drawn.chosen):
        source, target = drawn.ids[i][drawn.mask[i]].tolist(), drawn.targets[i][drawn.target_mask[i]].tolist()
        assert target[0] == 7
        read[id_] = tokenizer.decode(source), tokenizer.decode(target[1:])
    assert read == {"a#0": ("source", "t"), "a#1": ("hi", "hell"), "a#2": ("both", "bot")}


def test_sample_pairs_cuts_and_tells_sources_from_targets_by_length():
    documents = [Document("a#0", "", pair=("x" * 9, "y" * 90)), Document("a#1", "", pair=("x", "y"))]
    drawn = sample_pairs(pico.tokenizer(), documents, 2, 8, seed=0, start=0)
    assert drawn.targets is not None
    assert drawn.ids.shape == (2, 8)
    assert drawn.targets.shape == (2, 9)  # not the length of the sources
    same = sample_pairs(
        pico.tokenizer(), [Document("a#0", "", pair=("xx", "yyy")), documents[1]], 2, 8, seed=0, start=0
    )
    assert same.targets is not None
    assert same.ids.shape != same.targets.shape


def test_sample_pairs_refuses_too_few_and_chats_without_answer():
    with pytest.raises(DataError, match="asks for 2 pairs of texts, the data has 1"):
        sample_pairs(pico.tokenizer(), [Document("a#0", "text")], 2, 8, seed=0, start=0)
    chat = ({"role": "user", "content": "hi"},)
    with pytest.raises(DataError, match="a#0: is a chat without an answer"):
        sample_pairs(pico.tokenizer(), [Document("a#0", "", messages=chat)], None, 8, seed=0, start=0)


def test_with_targets_shifts_windows():
    drawn = with_targets(Batches(torch.arange(6).view(2, 3)), 9)
    assert drawn.targets is not None
    assert drawn.targets.tolist() == [[9, 0, 1], [9, 3, 4]]
    assert drawn.sha256() != Batches(drawn.ids).sha256()
    assert drawn.first(1).values["decoder_input_ids"].tolist() == [[9, 0, 1]]


def test_padded_has_a_mask_only_where_something_is_padded():
    assert padded([[1, 2], [3, 4]], 0)[1] is None
    ids, mask = padded([[1, 2], [3]], 0, other_than=2)
    assert mask is not None
    assert ids.tolist() == [[1, 2, 0], [3, 0, 0]]
    assert mask.tolist() == [[True, True, False], [True, False, False]]


def test_start_token_takes_the_first_config_that_names_one():
    assert start_token({"pad_token_id": 3}, {"decoder_start_token_id": 5}) == 5
    assert start_token({"decoder_start_token_id": None, "bos_token_id": 4, "pad_token_id": 3}, {}) == 4
    assert start_token({}) == 0
