"""Optimal Brain Surgeon in groups: which inputs of a linear layer to keep, and least squares for the weights that read them.

Letters: O outputs, I inputs, S kept inputs. Inputs come in units of ``width`` neighbours: a neuron, or a head. H_II is the sum
of x xᵀ over tokens; for a layer with a bias that of x - mean(x), since the bias compensates for the mean.
"""

from __future__ import annotations

import torch

from compress.solvers.hessian import check_finite, damped_diagonal, inverse

#: Units that are removed one at a time; if more are removed, several go in each step.
_STEPS = 256
#: Rows of H that are copied at a time.
_ROWS = 1024
#: Damping of the least squares: directions that no token excites keep their weights.
_DAMP = 0.001


def obs_prune_groups(
    W_OI: torch.Tensor, H_II: torch.Tensor, remove: int, *, width: int = 1, runs: int = 1
) -> list[int]:
    """Return the indices of the units to keep. Units are removed greedily, each time the one of least loss.

    The loss of a unit G is the rise of ||(W - W')X||² if its weights become zero and all others compensate (`_losses`). With
    P = H⁻¹ the compensated weights are W - W_G P_GG⁻¹ P_G, and the inverse Hessian of the rest is P - P_:G P_GG⁻¹ P_G. If more
    than 256 units are removed, several go in each step.

    Args:
        W_OI: weights of the layer that reads the units, [out, in].
        H_II: sum of x xᵀ, [in, in]; the work is done in its dtype.
        remove: number of units to remove.
        width: neighbouring inputs of a unit.
        runs: number of equal runs that the units lie in; each run loses the same number.

    Raises:
        ValueError: H holds NaN or infinite values.

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
        removed = loss.topk(min(at_once, remove), largest=False).indices
        inputs = (removed[:, None] * width + torch.arange(width, device=W_OI.device)).flatten()
        rows = torch.linalg.solve(P_II[inputs][:, inputs], P_II[inputs])
        weight.addmm_(weight[:, inputs], rows, alpha=-1)
        P_II.addmm_(P_II[:, inputs], rows, alpha=-1)
        P_II[inputs, inputs] = 1  # so that removed units divide by 1
        alive[removed] = False
        remove -= len(removed)
        for r in run[removed].tolist():
            quota[r] -= 1
    kept: list[int] = alive.nonzero().flatten().tolist()
    return kept


def _losses(W_OI: torch.Tensor, P_II: torch.Tensor, width: int) -> torch.Tensor:
    """Return the loss tr(W_G P_GG⁻¹ W_Gᵀ) of removing each unit G, [units]; P is the inverse Hessian of the kept inputs.

    It is the minimum of tr(D H Dᵀ) over changes D with D_G = -W_G. A Lagrange multiplier for each constraint gives
    D = -W_G P_GG⁻¹ P_G, and with it this value. For single inputs it is ||W_j||² / P_jj.
    """
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
    """Return the indices of the units to keep when those of least score go, the same number from each of ``runs`` equal runs.

    Args:
        score: of each unit, [U]; of equal scores the first go.
    """
    by_run = score.view(runs, -1)
    order = by_run.argsort(dim=1, stable=True)[:, remove // runs :] + by_run.shape[1] * torch.arange(runs)[:, None]
    kept: list[int] = order.flatten().sort().values.tolist()
    return kept


def least_squares(W_OI: torch.Tensor, H_II: torch.Tensor, keep_S: torch.Tensor) -> torch.Tensor:
    """Return the weights V [O, S] on the inputs ``keep_S`` of least ||W X - V X_S||² + λ||W_S - V||², in H's dtype.

    V = (W (H + λ))_:S (H_SS + λ)⁻¹. λ is a thousandth of the mean of H's diagonal, more if H_SS + λ has no Cholesky factor. If
    all inputs stay, V is W.

    Raises:
        ValueError: H holds NaN or infinite values.

    Source: the normal equations; as in ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110).
    """
    check_finite(H_II)
    weight, damp = W_OI.to(H_II.dtype), _DAMP
    while True:
        diagonal_I = damped_diagonal(H_II, damp)
        factor_SS = _square(H_II, keep_S)
        factor_SS.diagonal().copy_(diagonal_I[keep_S])
        failed = torch.empty((), dtype=torch.int32, device=H_II.device)
        torch.linalg.cholesky_ex(factor_SS, out=(factor_SS, failed))
        if not int(failed):
            target = weight @ H_II
            target += weight * (diagonal_I - H_II.diagonal())
            return torch.cholesky_solve(target[:, keep_S].mT, factor_SS).mT.contiguous()
        del factor_SS
        damp *= 10


def _square(H_II: torch.Tensor, keep_S: torch.Tensor) -> torch.Tensor:
    """Return H_SS [S, S], column-major as LAPACK wants it, without a copy of all whole rows."""
    result_SS = H_II.new_empty(len(keep_S), len(keep_S))
    for start in range(0, len(keep_S), _ROWS):
        result_SS[start : start + _ROWS] = H_II[keep_S[start : start + _ROWS]][:, keep_S]
    return result_SS.mT  # symmetric, so its transpose is itself
