"""The predictions of a model from hidden states behind its last block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: Numbers of samples and hidden states behind the last block [len(rows), length, …] ▶ logits [len(rows), length, vocabulary].
Predict = Callable[[Sequence[int], torch.Tensor], torch.Tensor]


def depends_on_hidden_alone(predict: Predict, hidden: torch.Tensor) -> bool:
    """Whether two samples with the same hidden states [1, length, …] have the same predictions, one for each token."""
    try:
        with torch.no_grad():
            first, second = predict([0], hidden), predict([1], hidden)
    except (TypeError, IndexError, ValueError, AttributeError, KeyError):
        return False
    return first.ndim == 3 and first.shape[:2] == hidden.shape[:2] and torch.equal(first, second)


def divergence(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """KL divergence of predictions, summed over the tokens that count; logits [n, length, vocabulary], mask [n, length]."""
    kl = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    return kl.sum() if mask is None else kl[mask].sum()
