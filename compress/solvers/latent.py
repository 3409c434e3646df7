"""Low rank in keys and values across the heads of a block, for latent attention.

Letters: G key-value groups, H query heads, F rotary frequencies, D = 2 F numbers of a head, I inputs, R kept components, T
tokens. A rotary key of one group is F complex numbers: number f is entry f plus i times entry f + F. Its rotation at position p
multiplies it by exp(i p θ_f). So any complex matrix that mixes the groups within one frequency commutes with the rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Weights of a metric below this share of the largest are raised to it, so that every part can be decoded.
_FLOOR = 1e-9


@dataclass(frozen=True)
class Components:
    """Principal components in a metric, the most important first.

    Attributes:
        losses: [..., N], falling: the metric's error that is added where a component is left out.
        encode: [..., N, N], components in rows: component = encode @ x. decode: its inverse, so x = decode @ components.
    """

    losses: torch.Tensor
    encode: torch.Tensor
    decode: torch.Tensor


def rotary(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection [heads · D, I] as complex rows [heads, F, I], complex128."""
    halves = rows.double().view(heads, 2, -1, rows.shape[-1])
    return torch.complex(halves[:, 0], halves[:, 1])


def unrotary(rows: torch.Tensor) -> torch.Tensor:
    """Complex rows [heads, F, I] as real ones [heads · D, I], float64; undoes `rotary`."""
    return torch.stack((rows.real, rows.imag), 1).flatten(0, 2)


def key_components(keys: torch.Tensor, energies: torch.Tensor, moment: torch.Tensor) -> Components:
    """Components of the keys across groups, for each frequency.

    An error δ of the key of group g changes the scores of its heads by Re(q conj(δ)). Summed over heads, its expected square is
    Σ|q|² |δ|² / 2 for directions of q that are independent of δ. So the metric of frequency f is diagonal: the energy of the
    queries that read group g there. The best R components are the eigenvectors of diag(√e) E[k kᴴ] diag(√e).

    Args:
        keys: complex rows [G, F, I] of the key projection; a bias is the weight of an input that is 1.
        energies: E Σ|q|² over the query heads of a group, [F, G].
        moment: E x xᵀ of the inputs, [I, I].

    Returns:
        Components of each frequency, ``losses`` [F, G], complex ``encode`` and ``decode`` [F, G, G].

    Source: TransMLA's RoRoPE (arXiv 2502.07864) mixes real and imaginary parts alike; the complex form is more general.
    """
    rows = keys.transpose(0, 1)
    covariance = rows @ moment.to(rows.dtype) @ rows.mH
    energies = energies.double()
    weights = energies.clamp_min(_FLOOR * float(energies.max().clamp_min(1e-30))).sqrt()
    losses, vectors = torch.linalg.eigh(weights[:, :, None] * covariance * weights[:, None, :])
    losses, vectors = losses.flip(-1).clamp_min(0), vectors.flip(-1)
    return Components(losses, vectors.mH * weights[:, None, :], vectors / weights[:, :, None])


def value_components(values: torch.Tensor, metric: torch.Tensor, covariance: torch.Tensor) -> Components:
    """Components of the values of all groups together.

    Args:
        values: rows [G · D, I] of the value projection. metric: M of errors of the values, symmetric, [G · D, G · D].
        covariance: E (x - mean)(x - mean)ᵀ of the inputs, [I, I]. The mean of the values costs no component: the weights of
            attention sum to 1, so it is a bias of the output projection.

    Returns:
        Eigenvectors of √M E[(v - mean)(v - mean)ᵀ] √M: ``losses`` [G · D], ``encode`` and ``decode`` [G · D, G · D], whose
        columns have norm 1.
    """
    strengths, axes = torch.linalg.eigh(metric.double())
    strengths = strengths.clamp_min(_FLOOR * float(strengths[-1].clamp_min(1e-30)))
    root, inverse = ((axes * strengths**power) @ axes.T for power in (0.5, -0.5))
    rows = root @ values.double()
    losses, vectors = torch.linalg.eigh(rows @ covariance.double() @ rows.T)
    losses, vectors = losses.flip(0).clamp_min(0), vectors.flip(1)
    decode = inverse @ vectors
    norms = decode.norm(dim=0)
    return Components(losses, norms[:, None] * (vectors.T @ root), decode / norms)


def best_counts(losses: torch.Tensor, total: int) -> list[int]:
    """Number of components of each frequency, ``total`` in all, that leaves the least loss out.

    Args:
        losses: [F, G], falling along the second axis, so that the largest are the best choice.
    """
    chosen = losses.flatten().argsort(descending=True, stable=True)[:total] // losses.shape[1]
    return torch.bincount(chosen, minlength=len(losses)).tolist()


def best_split(keys: torch.Tensor, values: torch.Tensor, budget: int, step: int = 1) -> int:
    """Number of key components of the least loss within a budget of numbers per token; a key component has two numbers.

    Args:
        keys: losses [F, G] of key components. values: losses [V] of value components, falling. Both in the same unit.
        step: the result is a multiple of it, where a multiple fits.
    """
    left = keys.flatten().sort(descending=True).values
    keys_lost = float(left.sum()) - torch.cat((left.new_zeros(1), left.cumsum(0)))
    values_lost = float(values.sum()) - torch.cat((values.new_zeros(1), values.cumsum(0)))
    counts = [n for n in range(1, len(left) + 1) if budget - 2 * n >= 1]
    counts = [n for n in counts if n % step == 0] or counts
    return min(counts, key=lambda n: float(keys_lost[n] + values_lost[min(budget - 2 * n, len(values))]))


@dataclass(frozen=True)
class LatentKeys:
    """Projections to rotary keys that all heads share, and to the queries that read them, float64.

    Attributes:
        key: [2 R, I], real parts before imaginary ones. query: [H, 2 R, J] for query rows with J inputs.
    """

    key: torch.Tensor
    query: torch.Tensor


def latent_keys(keys: torch.Tensor, queries: torch.Tensor, components: Components, counts: Sequence[int]) -> LatentKeys:
    """Fold the components of the keys into both projections: Re(q conj(k)) = Re Σ_j q conj(decode_gj) conj(component_j).

    Args:
        keys: complex rows [G, F, I]. queries: complex rows [H, F, J]; head h reads group h // (H / G).
        counts: number of components of each frequency. They follow each other by frequency.
    """
    shared, folded = [], []
    groups = torch.arange(len(queries), device=queries.device) // (len(queries) // len(keys))
    for f, count in enumerate(counts):
        encode, decode = components.encode[f, :count], components.decode[f, :, :count]
        # the unit of a component is free: equal energy in both factors
        scale = components.losses[f, :count].clamp_min(1e-30) ** -0.25
        shared.append(scale[:, None] * (encode @ keys[:, f]))
        folded.append((decode.conj() / scale)[groups, :, None] * queries[:, f][:, None, :])
    key, query = torch.cat(shared), torch.cat(folded, 1)
    unit = (keys.abs().square().mean() / key.abs().square().mean().clamp_min(1e-60)).sqrt()  # as large as the keys were
    key, query = key * unit, query / unit
    return LatentKeys(torch.cat((key.real, key.imag)), torch.cat((query.real, query.imag), 1))


def constant_channel(bound: float, width: int, margin: float = 512.0) -> tuple[float, float, float]:
    """A bias and a weight that make RMSNorm the identity on the channels beside a constant one.

    RMSNorm of (c, B) divides by B √((1 + |c|²/B²) / n), which is B/√n up to |c|²/2B².

    Args:
        bound: largest norm of c. width: n, the channels with the constant one. margin: least B over the bound.

    Returns:
        B; the weight of the norm; and the factor by which its outputs still have to be multiplied. B and the weight are powers
        of two, which every float format holds, so that no cast changes their ratio.
    """
    constant = 2.0 ** torch.tensor(max(bound, 1e-6) * margin).log2().ceil().item()
    weight = 2.0 ** torch.tensor(constant / width**0.5).log2().round().item()
    return constant, weight, constant / (weight * width**0.5)
