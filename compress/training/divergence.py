"""Divergences of a student's distribution from a teacher's, per row, in nats.

Distributions are log-probabilities [N, B] over the same B buckets: the vocabulary, or a teacher's k likeliest tokens and one
bucket for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

#: A log-probability whose exponential is 0 in any float.
_LEAST = -1e30


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student), [N] (Hinton et al., arXiv 1503.02531)."""
    return _expected(teacher, teacher - student)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(student ‖ teacher), [N] (MiniLLM, arXiv 2306.08543)."""
    return _expected(student, student - teacher)


def skewed_kl(teacher: torch.Tensor, student: torch.Tensor, share: float = 0.1) -> torch.Tensor:
    """KL(teacher ‖ share · teacher + (1 - share) · student), [N] (DistiLLM, arXiv 2402.03898)."""
    return forward_kl(teacher, mixed(teacher, student, share))


def jensen_shannon(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Half of the KL of each from their mean, [N] (Lin 1991; as a loss: f-DISTILL, arXiv 2307.15190)."""
    middle = mixed(teacher, student, 0.5)
    return 0.5 * (forward_kl(teacher, middle) + forward_kl(student, middle))


#: Names in recipes ▶ what they compute.
DIVERGENCES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "skewed_kl": skewed_kl,
    "js": jensen_shannon,
}


def mixed(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """Log of ``share`` · first + (1 - share) · second, of log-probabilities."""
    weight = torch.tensor(share, dtype=first.dtype, device=first.device)
    # where both are 0, the gradient of logaddexp is not a number
    first, second = first.clamp_min(_LEAST), second.clamp_min(_LEAST)
    return torch.logaddexp(first + weight.log(), second + (1 - weight).log())


def ensemble(members: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Log of the weighted mean of probabilities, of log-probabilities [N, B] each; weights sum to 1."""
    if len(members) == 1:
        return members[0]
    stacked = torch.stack([m + torch.tensor(w, dtype=m.dtype).log() for m, w in zip(members, weights, strict=True)])
    return stacked.logsumexp(0)


def bucketed(log_probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, k + 1] of the tokens ``ids`` [N, k] and of all others together, from log-probabilities [N, V]."""
    kept = log_probabilities.gather(1, ids)
    others = log_probabilities.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([kept, others], 1)


def _expected(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ exp(weights) · values over buckets; a bucket of weight 0 counts nothing."""
    # buckets of probability 0 on both sides would be inf - inf, and their gradient too
    finite = weights > -torch.inf
    return (weights.exp() * torch.where(finite, values, 0.0)).sum(-1)
