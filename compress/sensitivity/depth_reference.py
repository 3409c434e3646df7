"""Divergence of outputs from those of the original, by sample."""

from __future__ import annotations

import torch


class Reference:
    """Outputs of the original for some samples, from which others diverge.

    Args:
        outputs: logits or hidden states, float32 [samples, tokens, …]; or logits by sample, [samples, labels].
        mask: which tokens count, bool [samples, tokens]; None for all. predicts: the outputs are logits.
    """

    def __init__(self, outputs: torch.Tensor, mask: torch.Tensor | None, predicts: bool) -> None:
        self._outputs, self._mask, self._predicts = _by_token(outputs), mask, predicts
        if predicts:
            self._logs = self._outputs.log_softmax(-1)
            self._shares = self._logs.exp()
            self._scratch = torch.empty_like(self._logs)  # pages of new memory cost as much as the sums

    def divergences(self, outputs: torch.Tensor) -> torch.Tensor:
        """Divergence of each sample summed over what counts, float64 [samples].

        KL of predictions in nats, or for a model without a head the squared error of hidden states over their variance in the
        sample.
        """
        after, before = _by_token(outputs), self._outputs
        if self._predicts:
            logs = torch.log_softmax(after, -1, out=self._scratch)
            values = torch.sub(self._logs, logs, out=logs).mul_(self._shares).sum(-1)
        else:
            values = (after - before).square().mean(-1)
        values = values.double().flatten(1)
        mask = self._mask
        counted = torch.ones_like(values, dtype=torch.bool) if mask is None or mask.shape != values.shape else mask
        sums = values.masked_fill(~counted, 0).sum(1)
        if self._predicts:
            return sums
        return sums / torch.stack([x.flatten(0, -2)[c].double().var() for x, c in zip(before, counted, strict=True)])


def _by_token(outputs: torch.Tensor) -> torch.Tensor:
    return outputs[:, None] if outputs.ndim == 2 else outputs


def counts_of(outputs: torch.Tensor, mask: torch.Tensor | None, samples: int) -> list[int]:
    """Number of predictions that count, by sample.

    Args:
        outputs: of one sample. mask: which tokens count, bool [samples, tokens]; None for all.
    """
    values = 1 if outputs.ndim == 2 else outputs.shape[1:-1].numel()
    if mask is None or outputs.ndim == 2 or mask.shape[1] != values:
        return [values] * samples
    counts: list[int] = mask.sum(1).tolist()
    return counts
