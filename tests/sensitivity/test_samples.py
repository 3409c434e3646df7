"""The loop over samples leaves padding out, and its losses are those of a plain forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from compress.data.batches import Batches
from compress.models.loading import load_model
from compress.sensitivity.labels import draw
from compress.sensitivity.samples import SampleLoop, token_losses
from tests import pico

LENGTHS = (9, 12, 5)


@pytest.fixture(scope="module")
def batches():
    ids = torch.randint(2, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12)[None] < torch.tensor(LENGTHS)[:, None]
    return Batches(ids, mask)


def plain_losses(model, ids, next_token):
    """Losses of samples without padding, one by one, with labels drawn as for padded ones."""
    losses = []
    generator = torch.Generator().manual_seed(1)
    for row, length in zip(ids, LENGTHS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=row[None], attention_mask=(torch.arange(12)[None] < length).long())[0][0].float()
        labels = draw(logits, generator)
        if next_token:
            losses.append(cross_entropy(logits[: length - 1], row[1:length], reduction="none"))
        else:
            losses.append(cross_entropy(logits[:length], labels[:length], reduction="none"))
    return losses


@pytest.mark.parametrize("next_token", [False, True])
def test_token_losses_match_a_plain_forward(next_token, batches):
    model = load_model(pico.folder("llama"), dtype="float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        losses = [token_losses(model, s, generator, next_token=next_token) for s in SampleLoop(batches, "cpu")]
    for one, expected in zip(losses, plain_losses(model, batches.ids, next_token), strict=True):
        assert torch.allclose(one, expected, atol=1e-5)


def test_counted_takes_tokens_or_samples(batches):
    loop = SampleLoop(batches, "cpu", tokens=36)
    (sample,) = loop
    assert loop.current is sample
    tokens = torch.arange(36)
    assert sample.counted(tokens).tolist() == [12 * i + j for i, n in enumerate(LENGTHS) for j in range(n)]
    assert sample.counted(torch.arange(3)).tolist() == [0, 1, 2]  # a classifier's: one row per sample
    with pytest.raises(IndexError):
        sample.counted(torch.arange(7))


def test_samples_of_pairs_count_tokens_of_each_text():
    """Rows of the source count by its mask, rows of the target by its own, and rows of sounds all."""
    from compress.sensitivity.samples import Sample

    source, target = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False, False]])
    sample = Sample({}, target, source, paired=True)
    assert [len(sample.counted(torch.zeros(n, 2))) for n in (3, 4, 7)] == [1, 2, 7]
