"""Which samples a step takes, what counts in them, what is hidden; how rates go."""

from __future__ import annotations

import torch

from compress.data.batches import Batches
from compress.evaluation.tasks import LANGUAGE, MASKED
from compress.training.data import Masking, Order, Samples


def test_order_takes_every_sample_once_an_epoch():
    order = Order(10, 4, seed=3)
    taken = [pair for step in range(5) for pair in order.step(step)]
    assert [row for row, epoch in taken if epoch == 0] == list(range(10))
    second = [row for row, epoch in taken if epoch == 1]
    assert sorted(second) == list(range(10))
    assert second != list(range(10))
    assert Order(10, 4, seed=3).step(4) == order.step(4)
    assert Order(10, 10, seed=1).step(1) != Order(10, 10, seed=2).step(1)


def test_order_groups_samples_of_similar_length():
    lengths = [(i * 37) % 100 + 1 for i in range(64)]
    order = Order(64, 8, seed=0, lengths=lengths)
    batches = [[row for row, _ in order.step(step)] for step in range(8)]
    assert sorted(row for batch in batches for row in batch) == list(range(64))
    wasted = lambda found: sum(max(lengths[i] for i in b) * len(b) for b in found) / sum(lengths)  # noqa: E731
    assert wasted(batches) < 1.15 < wasted([list(range(i, i + 8)) for i in range(0, 64, 8)])


def padded():
    ids = torch.arange(2, 26).view(4, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4, [1] + [0] * 5]).bool()
    return Batches(ids, mask)


def test_samples_targets_are_next_tokens():
    samples = Samples(padded(), LANGUAGE, 1)
    taken = [(0, 0), (1, 0), (2, 0)]
    counts = samples.counts(taken)
    batch = samples.batch(taken, counts, "cpu", size=5)
    assert counts == (12, 9) == (int(batch.counted.sum()), int(batch.predict.sum()))
    assert batch.targets.tolist() == [3, 4, 5, 6, 7, 9, 10, 11, 15]
    assert batch.rows.tolist() == [0, 1, 2, -1, -1]
    assert samples.train == 3
    assert samples.held == [(3, 0)]
    # the longest of the batch sets its width
    assert samples.batch([(2, 0)], (2, 1), "cpu").inputs["input_ids"].tolist() == [[14, 15]]


def test_masking_hides_a_sixth_of_plain_tokens():
    ids = torch.randint(5, 200, (40, 60), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    masking = Masking(mask=3, special=frozenset({0, 1, 2, 3}), vocabulary=200, seed=0)
    samples = Samples(Batches(ids), MASKED, 0, masking)
    taken = [(row, 0) for row in range(40)]
    counts = samples.counts(taken)
    batch = samples.batch(taken, counts, "cpu")
    assert counts[1] == int(batch.predict.sum()) == 40 * round(0.15 * 59)
    assert not batch.predict[:, 0].any()
    assert torch.equal(batch.targets, ids[batch.predict])
    given = batch.inputs["input_ids"]
    assert torch.equal(given[~batch.predict], ids[~batch.predict])
    assert 0.7 < float((given[batch.predict] == 3).float().mean()) < 0.9
    assert 0.05 < float((given[batch.predict] == batch.targets).float().mean()) < 0.2
    again, later = samples.batch(taken, counts, "cpu"), samples.batch([(row, 1) for row in range(40)], counts, "cpu")
    assert torch.equal(again.predict, batch.predict)
    assert not torch.equal(later.predict, batch.predict)
    fixed = Samples(Batches(ids), MASKED, 0, Masking(3, masking.special, 200, 0, fixed=True))
    assert torch.equal(fixed.batch([(5, 0)], counts, "cpu").predict, fixed.batch([(5, 7)], counts, "cpu").predict)
