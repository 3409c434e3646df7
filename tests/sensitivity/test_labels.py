"""Labels come with the probabilities of the model's predictions, and a class without any never."""

from __future__ import annotations

import pytest
import torch

from compress.errors import CheckpointError
from compress.sensitivity.labels import draw


def test_labels_have_the_frequencies_of_the_predictions():
    logits = torch.tensor([0.0, 1.0, (-1e9), 2.0, -1.0])
    labels = draw(logits.expand(200_000, 5), torch.Generator().manual_seed(0))
    seen = labels.bincount(minlength=5) / len(labels)
    assert torch.allclose(seen, logits.softmax(0), atol=4e-3)
    assert seen[2] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(value):
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        draw(logits, torch.Generator())
