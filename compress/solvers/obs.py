"""Which inputs of a linear layer stay, and the weights that then give nearly the same outputs.

Letters: O outputs, I inputs, S inputs that stay. Inputs come in units of ``width`` neighbours: one neuron, or a head. H_II is
the sum of x xᵀ over tokens; for a layer with a bias that of x - mean(x), as the bias makes up for the mean.
"""

from __future__ import annotations

import torch

from compress.solvers.hessian import check_finite, damped_diagonal, inverse

#: Steps in which single inputs go; with more inputs than that, several go in each.
_STEPS = 256
#: Rows of H that are copied at a time.
_ROWS = 1024
#: Damping of the least squares: beside it, what no token has told is kept as it was.
_DAMP = 0.001


def obs_prune_groups(
    W_OI: torch.Tensor, H_II: torch.Tensor, remove: int, *, width: int = 1, runs: int = 1
) -> list[int]:
    """Numbers of the units that stay when units go one after another, each the one whose loss is least.

    The loss of a unit G is what ||(W - W')X||² grows by when its weights are zero and all others move to make up for it:
    tr(W_G (H⁻¹_GG)⁻¹ W_Gᵀ). Weights and H⁻¹ then move on. Of more than 256 units that go, several go in each step.

    Args:
        remove: how many units go. width: neighbouring inputs of a unit.
        runs: the units lie in so many equal runs, each of which loses the same number.

    Source: Optimal Brain Surgeon (Hassibi and Stork 1993), in groups as in ZipLM (arXiv 2302.04089), algorithm 1.
    """
    P_II, _ = inverse(H_II)
    weight = W_OI.to(P_II.dtype, copy=True)
    units = W_OI.shape[1] // width
    alive = torch.ones(units, dtype=torch.bool, device=W_OI.device)
    run = torch.arange(units, device=W_OI.device) // (units // runs)
    quota = [remove // runs] * runs
    at_once = max(1, remove // _STEPS) if runs == 1 else 1
    while remove:
        loss = _losses(weight, P_II, width)
        full = torch.tensor([left == 0 for left in quota], device=W_OI.device)
        loss[~alive | full[run]] = torch.inf
        gone = loss.topk(min(at_once, remove), largest=False).indices
        inputs = (gone[:, None] * width + torch.arange(width, device=W_OI.device)).flatten()
        rows = torch.linalg.solve(P_II[inputs][:, inputs], P_II[inputs])
        weight.addmm_(weight[:, inputs], rows, alpha=-1)
        P_II.addmm_(P_II[:, inputs], rows, alpha=-1)
        P_II[inputs, inputs] = 1  # nothing divides by what is gone
        alive[gone] = False
        remove -= len(gone)
        for r in run[gone].tolist():
            quota[r] -= 1
    kept: list[int] = alive.nonzero().flatten().tolist()
    return kept


def _losses(W_OI: torch.Tensor, P_II: torch.Tensor, width: int) -> torch.Tensor:
    if width == 1:
        single: torch.Tensor = W_OI.square().sum(0) / P_II.diagonal()
        return single
    units = W_OI.shape[1] // width
    numbers = torch.arange(units, device=P_II.device)
    blocks = P_II.view(units, width, units, width)[numbers, :, numbers, :]  # [units, width, width]
    columns = W_OI.T.reshape(units, width, -1)
    loss: torch.Tensor = (torch.linalg.solve(blocks, columns) * columns).sum((1, 2))
    return loss


def keep_by_score(score: torch.Tensor, remove: int, *, runs: int = 1) -> list[int]:
    """Numbers of the units [U] that stay when those of least score go, the same number from each of ``runs`` equal runs."""
    by_run = score.view(runs, -1)
    order = by_run.argsort(dim=1, stable=True)[:, remove // runs :] + by_run.shape[1] * torch.arange(runs)[:, None]
    kept: list[int] = order.flatten().sort().values.tolist()
    return kept


def least_squares(W_OI: torch.Tensor, H_II: torch.Tensor, stay_S: torch.Tensor) -> torch.Tensor:
    """Weights [O, S] over the inputs ``stay_S`` that minimise ||W X - V X_S||² + λ||W_S - V||².

    V = (W (H + λ))_{:,S} (H_SS + λ)⁻¹ with λ a thousandth of the mean of H's diagonal, more where that has no Cholesky
    factor. Where all stay, V is W. In H's dtype.

    Raises:
        ValueError: H holds NaN or infinite values.

    Source: the normal equations; as in ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110).
    """
    check_finite(H_II)
    weight, damp = W_OI.to(H_II.dtype), _DAMP
    while True:
        diagonal_I = damped_diagonal(H_II, damp)
        factor_SS = _square(H_II, stay_S)
        factor_SS.diagonal().copy_(diagonal_I[stay_S])
        failed = torch.empty((), dtype=torch.int32, device=H_II.device)
        torch.linalg.cholesky_ex(factor_SS, out=(factor_SS, failed))
        if not int(failed):
            target = weight @ H_II
            target += weight * (diagonal_I - H_II.diagonal())
            return torch.cholesky_solve(target[:, stay_S].mT, factor_SS).mT.contiguous()
        del factor_SS
        damp *= 10


def _square(H_II: torch.Tensor, stay_S: torch.Tensor) -> torch.Tensor:
    """H between survivors [S, S], column-major as LAPACK wants it, without a copy of whole rows."""
    found_SS = H_II.new_empty(len(stay_S), len(stay_S))
    for start in range(0, len(stay_S), _ROWS):
        found_SS[start : start + _ROWS] = H_II[stay_S[start : start + _ROWS]][:, stay_S]
    return found_SS.mT  # of a symmetric one
