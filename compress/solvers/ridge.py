"""Ridge regression of a layer's missing outputs on its inputs, with the ridge chosen on tokens that were held out.

Letters: O outputs, I inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Ridges to try, as shares of the mean of H's diagonal.
_RIDGES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


@dataclass
class RegressionSums:
    """Sums over tokens of a layer's inputs x and of the outputs r that are missing.

    Attributes:
        H_II: Σ x xᵀ. C_OI: Σ r xᵀ. energy: Σ |r|². tokens: their number.
    """

    H_II: torch.Tensor
    C_OI: torch.Tensor
    energy: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device | str) -> RegressionSums:
        """No tokens."""
        return cls(
            torch.zeros(inputs, inputs, dtype=dtype, device=device),
            torch.zeros(outputs, inputs, dtype=dtype, device=device),
        )

    def add(self, x_TI: torch.Tensor, r_TO: torch.Tensor) -> None:
        """Add tokens."""
        self.H_II += x_TI.T @ x_TI
        self.C_OI += r_TO.T @ x_TI
        self.energy += float(r_TO.double().square().sum())
        self.tokens += len(x_TI)

    def left(self, D_OI: torch.Tensor) -> float:
        """Σ |r - D x|², the energy that stays missing."""
        return self.energy - 2 * float((D_OI * self.C_OI).sum()) + float(((D_OI @ self.H_II) * D_OI).sum())


def ridge_change(
    fit: RegressionSums, held: RegressionSums, project: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | None:
    """The change D [O, I] of a layer's weights of least Σ |r - D x|² + λ |D|², over the tokens of both sums.

    λ is the ridge by which a change that was solved for on ``fit`` leaves least of ``held``. With no held-out tokens it is a
    hundredth of the mean of H's diagonal.

    Args:
        project: keeps what a change must keep, such as removed weights.

    Returns:
        None where every change raises the error on held-out tokens.
    """
    ridge, least = 0.01, held.energy
    if held.tokens:
        ridge = 0.0
        for each in _RIDGES:
            if (left := held.left(project(_solved(fit.H_II, fit.C_OI, each)))) < least:
                ridge, least = each, left
        if not ridge:
            return None
    return project(_solved(fit.H_II + held.H_II, fit.C_OI + held.C_OI, ridge))


def _solved(H_II: torch.Tensor, C_OI: torch.Tensor, ridge: float) -> torch.Tensor:
    """C (H + λ)⁻¹, [O, I]."""
    while True:
        damped_II = H_II.clone()
        damped_II.diagonal().add_(ridge * H_II.diagonal().mean().clamp(min=1e-30))
        factor_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not int(failed):
            return torch.cholesky_solve(C_OI.mT, factor_II).mT.contiguous()
        ridge *= 10
