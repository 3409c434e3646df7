"""Least squares for the projection of values along a text (Linformer, arXiv 2006.04768).

With keys projected by a fixed matrix, an attention outputs A F V: weights A [tokens, rank] over the projected keys, values V
[tokens, width], and F [rank, tokens], a projection of positions read at the columns of the tokens. It is linear in F. The F of
least error against the original's outputs T solves the normal equations Σ Aᵀ A F V Vᵀ = Σ Aᵀ T Vᵀ over samples and heads, which
is no single Kronecker product; conjugate gradients need products alone (CGLS, Hestenes and Stiefel 1952).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attended:
    """One sample.

    Attributes:
        weights: A, [heads, tokens, rank]. values: V, outputs: T, both [heads, tokens, width].
        columns: column of the projection that each token takes, int64 [tokens]. scale: factor of these columns.
    """

    weights: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor
    columns: torch.Tensor
    scale: float

    def product(self, projection: torch.Tensor) -> torch.Tensor:
        """A F V, [heads, tokens, width]."""
        return self.weights @ (projection[:, self.columns] * self.scale @ self.values)

    def adjoint(self, outputs: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Sum over heads of Aᵀ R Vᵀ at the columns, [rank, positions]."""
        inner = torch.einsum("htr,htd,hsd->rs", self.weights, outputs, self.values)
        return torch.zeros(shape, dtype=inner.dtype, device=inner.device).index_add_(
            1, self.columns, inner * self.scale
        )


def relative_error(samples: Sequence[Attended], projection: torch.Tensor) -> float:
    """Squared error of the outputs over their square."""
    errors = sum(float((s.product(projection) - s.outputs).square().sum()) for s in samples)
    return errors / sum(float(s.outputs.square().sum()) for s in samples)


def project_values(
    samples: Sequence[Attended], held_out: Sequence[Attended], start: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, list[float]]:
    """The projection of least error, by conjugate gradients from ``start`` [rank, positions].

    Args:
        held_out: samples on which the iteration is chosen, as later ones fit the noise of few samples.

    Returns:
        The projection, and the relative error on ``held_out`` of the start and after each iteration.
    """
    projection, best = start.clone(), start
    residuals = [s.outputs - s.product(projection) for s in samples]
    gradient = sum(
        (s.adjoint(r, start.shape) for s, r in zip(samples, residuals, strict=True)), torch.zeros_like(start)
    )
    direction, size = gradient.clone(), float(gradient.square().sum())
    errors = [relative_error(held_out, projection)]
    for _ in range(iterations):
        steps = [s.product(direction) for s in samples]
        curvature = sum(float(step.square().sum()) for step in steps)
        if not size > 0 or not curvature > 0:
            break
        length = size / curvature
        projection = projection + length * direction
        residuals = [r - length * step for r, step in zip(residuals, steps, strict=True)]
        errors.append(relative_error(held_out, projection))
        if errors[-1] <= min(errors):
            best = projection
        gradient = sum(
            (s.adjoint(r, start.shape) for s, r in zip(samples, residuals, strict=True)), torch.zeros_like(start)
        )
        before, size = size, float(gradient.square().sum())
        direction = gradient + size / before * direction
    return best, errors
