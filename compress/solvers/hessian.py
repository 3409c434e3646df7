"""The Hessian of a linear layer's output error: damping, and the Cholesky factor of the inverse.

Letters: O outputs, I inputs. H_II is the sum of x xᵀ over tokens. For new weights W' the output error ||(W - W')X||² is
tr((W - W') H (W - W')ᵀ).
"""

from __future__ import annotations

import math

import torch

#: Largest damping, in units of the diagonal's mean. A matrix without a Cholesky factor there is far from positive.
_MOST_DAMPING = 1.0
#: Rows or columns of a triangular matrix that are worked on at a time.
_STRIP = 128


def damped(H_II: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Return H with ``damp`` times the mean of its diagonal added to the diagonal, and a mask of the dead inputs.

    Args:
        H_II: sum of x xᵀ, symmetric, [in, in], float32 or float64; not changed. The result is one copy of it.
        damp: at least 0, in units of the diagonal's mean over inputs that are not dead.

    Returns:
        The damped copy, and a bool tensor [in]: True for inputs that were always zero (diagonal 0). The diagonal of a dead
        input is the damping, or 1 if the damping is zero. Weights of dead inputs have no effect, so they are removed first.
    """
    damped_II = H_II.clone(memory_format=torch.contiguous_format)
    damped_II.diagonal().copy_(damped_diagonal(H_II, damp))
    return damped_II, H_II.diagonal() == 0


def damped_diagonal(H_II: torch.Tensor, damp: float) -> torch.Tensor:
    """Return the diagonal [in] of the damped H, as ``damped`` computes it."""
    return _damped_values(H_II.diagonal(), damp)


def _damped_values(diagonal_I: torch.Tensor, damp: float) -> torch.Tensor:
    alive = max(1, int((diagonal_I != 0).sum()))
    result_I = diagonal_I + damp * float(diagonal_I.sum(dtype=diagonal_I.dtype)) / alive
    result_I[result_I == 0] = 1
    return result_I


def check_finite(H_II: torch.Tensor) -> None:
    """Raise `ValueError` if H holds NaN or infinite values: no damping gives it a Cholesky factor."""
    if not all(math.isfinite(float(bound)) for bound in torch.aminmax(H_II)):
        raise ValueError(
            f"H [{H_II.shape[0]}, {H_II.shape[1]}] holds NaN or infinite values; check the calibration inputs"
        )


def inverse_factor(
    H_II: torch.Tensor, damp: float = 0.01, order_I: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Return the upper triangular U with Uᵀ U = (damped H)⁻¹, which GPTQ and SparseGPT use, and the damping used.

    The damping grows tenfold, up to 1, until the Cholesky factorisation succeeds. If it never does, the eigenvalues of H are
    raised to at least ``damp`` times the mean of its diagonal.

    Args:
        H_II: sum of x xᵀ, symmetric, [in, in], float32 or float64; not changed. The peak is one more matrix of its size, or
            four in the eigenvalue decomposition.
        damp: the first damping to try, in units of the diagonal's mean, as for ``damped``.
        order_I: an order of the inputs, in which U has its rows and columns; None for that of H.

    Returns:
        U [in, in] in H's dtype, with a positive diagonal; and the damping used: ``damp`` normally, math.inf if eigenvalues
        were raised. Callers should report any value other than ``damp``.

    Raises:
        ValueError: H holds NaN or infinite values.

    Source: GPTQ (arXiv 2210.17323), section 3.3, step 3.
    """
    return _inverted(H_II, damp, order_I, factor=True)


def inverse(H_II: torch.Tensor, damp: float = 0.01) -> tuple[torch.Tensor, float]:
    """Return (damped H)⁻¹ [in, in], row-major, and the damping used. Arguments, errors and memory are those of
    `inverse_factor`.
    """
    result_II, used = _inverted(H_II, damp, None, factor=False)
    return (result_II.mT @ result_II if math.isinf(used) else result_II.mT), used


def _inverted(
    H_II: torch.Tensor, damp: float, order_I: torch.Tensor | None, *, factor: bool
) -> tuple[torch.Tensor, float]:
    """Return the inverse, column-major, or its factor, and the damping; always the factor if eigenvalues were raised."""
    check_finite(H_II)
    used = damp
    while True:
        # one matrix throughout, column-major as LAPACK wants it: a symmetric matrix is its own transpose
        work_II = _in_order(H_II, order_I)
        work_II.diagonal().copy_(_damped_values(work_II.diagonal(), used))
        work_II = work_II.mT
        failed = torch.empty((), dtype=torch.int32, device=H_II.device)
        if factor:  # H⁻¹ = Uᵀ U where H = U⁻¹ U⁻ᵀ, which is the Cholesky factorisation from the last input to the first
            _reverse(work_II)
        torch.linalg.cholesky_ex(work_II, out=(work_II, failed))
        if not int(failed):
            if factor:
                _invert_lower(work_II)
                _reverse(work_II)
            else:
                torch.cholesky_inverse(work_II, out=work_II)
            # an inverse with infinite or zero values counts as a failure
            diagonal_I = work_II.diagonal()
            if bool((diagonal_I.isfinite() & (diagonal_I > 0)).all()):
                return work_II, used
        del work_II
        if used >= _MOST_DAMPING:
            return _raised_factor(H_II if order_I is None else _in_order(H_II, order_I), damp), math.inf
        used = min(_MOST_DAMPING, max(10 * used, 1e-4))


def _reverse(A_II: torch.Tensor) -> None:
    """Reverse the order of rows and columns, in place."""
    size = len(A_II)
    for start in range(0, size // 2, _STRIP):
        stop = min(start + _STRIP, size // 2)
        first = A_II[:, start:stop].flip(0, 1)
        A_II[:, start:stop] = A_II[:, size - stop : size - start].flip(0, 1)
        A_II[:, size - stop : size - start] = first
    if size % 2:
        A_II[:, size // 2] = A_II[:, size // 2].flip(0)


def _invert_lower(L_II: torch.Tensor) -> None:
    """Invert a lower triangular matrix in place: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]]."""
    size = len(L_II)
    if size <= _STRIP:
        one_II = torch.eye(size, dtype=L_II.dtype, device=L_II.device)
        L_II.copy_(torch.linalg.solve_triangular(L_II, one_II, upper=False))
        return
    middle = (size // 2 + _STRIP - 1) // _STRIP * _STRIP
    A_II, B_II, C_II = L_II[:middle, :middle], L_II[middle:, :middle], L_II[middle:, middle:]
    for some_II in torch.split(B_II, 4 * _STRIP):  # rows, then columns: matrices may be large
        some_II.copy_(torch.linalg.solve_triangular(A_II, some_II, upper=False, left=False))
    for some_II in torch.split(B_II, 4 * _STRIP, 1):
        some_II.copy_(torch.linalg.solve_triangular(C_II, some_II, upper=False).neg_())
    _invert_lower(A_II)
    _invert_lower(C_II)


def _in_order(H_II: torch.Tensor, order_I: torch.Tensor | None) -> torch.Tensor:
    """A copy of H, row-major, with rows and columns in that order."""
    if order_I is None:
        return H_II.clone(memory_format=torch.contiguous_format)
    return H_II[order_I[:, None], order_I]


def _raised_factor(H_II: torch.Tensor, damp: float) -> torch.Tensor:
    """Return U with Uᵀ U = Q max(L, floor)⁻¹ Qᵀ: the R of the QR decomposition of max(L, floor)^-½ Qᵀ."""
    values_I, vectors_II = torch.linalg.eigh(H_II)
    floor = max(damp, 1e-4) * float(H_II.diagonal().abs().mean()) or 1.0
    vectors_II *= values_I.clamp_(min=floor).rsqrt_()
    upper_II: torch.Tensor = torch.linalg.qr(vectors_II.mT, mode="r").R
    del vectors_II
    upper_II *= torch.where(upper_II.diagonal() < 0, -1, 1)[:, None]  # QR does not fix the sign of a row
    return upper_II
