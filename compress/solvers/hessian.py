"""The Hessian of a linear layer's output error, damped, and the Cholesky factor of its inverse.

Letters: O outputs, I inputs. H_II is the sum of x xᵀ over tokens; for new weights W' the output error ||(W - W')X||² is
tr((W - W') H (W - W')ᵀ).
"""

from __future__ import annotations

import math

import torch

#: Damping never exceeds the mean of the diagonal; what still has no Cholesky factor there is not close to positive.
_MOST_DAMPING = 1.0


def damped(H_II: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """H with ``damp`` times the mean of its diagonal added to the diagonal, and which inputs are dead.

    Args:
        H_II: sum of x xᵀ, symmetric, [in, in], float32 or float64. It is left as it is; the result is its one copy.
        damp: at least 0, in units of the diagonal's mean over inputs that are not dead.

    Returns:
        The damped copy, and a bool tensor [in], True for inputs that were always zero (diagonal 0). They get the damping
        alone, whatever the scale of H, or 1 where that is zero: their weights do nothing, so they are the cheapest to remove.
    """
    damped_II = H_II.clone(memory_format=torch.contiguous_format)
    damped_II.diagonal().copy_(damped_diagonal(H_II, damp))
    return damped_II, H_II.diagonal() == 0


def damped_diagonal(H_II: torch.Tensor, damp: float) -> torch.Tensor:
    """The diagonal [in] that ``damped`` gives H."""
    diagonal_I = H_II.diagonal()
    alive = max(1, int((diagonal_I != 0).sum()))
    result_I = diagonal_I + damp * float(diagonal_I.sum(dtype=H_II.dtype)) / alive
    result_I[result_I == 0] = 1
    return result_I


def check_finite(H_II: torch.Tensor) -> None:
    """Raises `ValueError` where H holds NaN or infinite values: no damping gives it a Cholesky factor."""
    if not all(math.isfinite(float(bound)) for bound in torch.aminmax(H_II)):
        raise ValueError(
            f"H [{H_II.shape[0]}, {H_II.shape[1]}] holds NaN or infinite values; check the calibration inputs"
        )


def inverse_factor(H_II: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, float]:
    """Upper triangular U with Uᵀ U = (damped H)⁻¹, as GPTQ and SparseGPT use it, and the damping it took.

    Damping grows tenfold, up to 1, until the Cholesky factorisation succeeds. If it never does, H's eigenvalues are raised to
    at least ``damp`` times the mean of its diagonal instead.

    Args:
        H_II: sum of x xᵀ, symmetric, [in, in], float32 or float64; left as it is. One more matrix of its size is held at
            the peak, and a little; four in the eigenvalue decomposition.
        damp: where to start, in units of the diagonal's mean, as for ``damped``.

    Returns:
        U in H's dtype, with a positive diagonal, and the damping used: ``damp`` if all went well, math.inf if eigenvalues were
        raised. Callers should report any other value than ``damp``.

    Raises:
        ValueError: H holds NaN or infinite values.

    Source: GPTQ (arXiv 2210.17323), section 3.3, step 3.
    """
    return _inverted(H_II, damp, factor=True)


def inverse(H_II: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, float]:
    """(damped H)⁻¹, row-major, and the damping it took; as `inverse_factor`, also in memory."""
    found_II, used = _inverted(H_II, damp, factor=False)
    return (found_II.mT @ found_II if math.isinf(used) else found_II.mT), used


def _inverted(H_II: torch.Tensor, damp: float, *, factor: bool) -> tuple[torch.Tensor, float]:
    """The inverse, column-major, or its factor; where eigenvalues were raised always the factor."""
    check_finite(H_II)
    used = damp
    while True:
        # all in one matrix, column-major as LAPACK wants it: a symmetric one is its own transpose
        work_II = damped(H_II, used)[0].mT
        failed = torch.empty((), dtype=torch.int32, device=H_II.device)
        torch.linalg.cholesky_ex(work_II, out=(work_II, failed))
        if not int(failed):
            torch.cholesky_inverse(work_II, out=work_II)
            if factor:
                torch.linalg.cholesky_ex(work_II, upper=True, out=(work_II, failed))
            # an inverse of overflown or vanishing values is as good as none
            diagonal_I = work_II.diagonal()
            if not int(failed) and bool((diagonal_I.isfinite() & (diagonal_I > 0)).all()):
                return work_II, used
        del work_II
        if used >= _MOST_DAMPING:
            return _raised_factor(H_II, damp), math.inf
        used = min(_MOST_DAMPING, max(10 * used, 1e-4))


def _raised_factor(H_II: torch.Tensor, damp: float) -> torch.Tensor:
    """U with Uᵀ U = Q max(L, floor)⁻¹ Qᵀ: the R of QR of max(L, floor)^-½ Qᵀ."""
    values_I, vectors_II = torch.linalg.eigh(H_II)
    floor = max(damp, 1e-4) * float(H_II.diagonal().abs().mean()) or 1.0
    vectors_II *= values_I.clamp_(min=floor).rsqrt_()
    upper_II: torch.Tensor = torch.linalg.qr(vectors_II.mT, mode="r").R
    del vectors_II
    upper_II *= torch.where(upper_II.diagonal() < 0, -1, 1)[:, None]  # QR leaves the sign of each row open
    return upper_II
