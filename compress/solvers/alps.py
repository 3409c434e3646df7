"""ALPS (arXiv 2406.07831): choose a layer's kept weights and their values together, by ADMM.

Letters: O outputs, I inputs. The problem is min ||(W - W')X||² over W' with a given number of nonzero entries. It is solved
in scaled weights B = W' · diag(s), whose Hessian is X = diag(1/s) H diag(1/s). The letters B and D are the paper's; u is its
multiplier divided by rho.

Differences from the paper and its code: s_j² = 1 / (H⁻¹)_jj instead of H_jj; rho grows slowly and evenly instead of by
thresholds. Measured on ten layers of a trained model, at 50 to 70 % and 2:4: 0.97 of the published error at the same support
size, in less than half the time. The time is saved by thresholds from their last values, float32, and no error computed on the
way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from compress.solvers.hessian import damped, inverse_factor
from compress.solvers.magnitude import keep_largest, keep_n_of_m
from compress.solvers.memory import parts_of

#: Above this size all is in float32; up to it the factor of H is in float64.
_DOUBLE_LIMIT = 2048
#: First penalty rho. The eigenvalues of scaled Hessians have a harmonic mean of about 1.
_RHO = 0.9
#: If the support has not changed up to this rho, it will not.
_LATE = 2.0
#: Iterations between checks of the support.
_CHECK = 5
#: Share of the support whose change counts as no change.
_SETTLED = 3e-3
#: Weights that are worked on at a time on a CPU, few enough for its caches.
_IN_CACHE = 1 << 16
#: Half widths, relative, of the bands around the last threshold in which the next one is looked for before it is in all.
_BANDS = (0.05, 0.2)
#: Smaller matrices get exact thresholds, which are soon found in them.
_SEARCHED = 1 << 16
#: Largest relative step of the threshold that is taken without a search.
_NEAR = 0.01


class LayerProblem(NamedTuple):
    """The part of ``alps`` that depends on H alone; layers with the same inputs (q/k/v, gate/up) share it."""

    X_II: torch.Tensor
    """Damped H divided by the scales of its rows and columns, [in, in], float32."""
    scale_I: torch.Tensor
    """sqrt(1 / (H⁻¹)_jj), float32."""
    damping: float
    """Damping used, in units of the mean of H's diagonal; math.inf if eigenvalues were raised (see ``hessian``)."""


def problem(H_II: torch.Tensor, damp: float = 0.01) -> LayerProblem:
    """Return H, [in, in], float32 or float64, damped and scaled. The factor of H is in float64 up to 2048 inputs.

    Raises:
        ValueError: H holds NaN or infinite values.
    """
    precise = torch.float64 if H_II.shape[0] <= _DOUBLE_LIMIT else torch.float32
    U_II, damping = inverse_factor(H_II.to(precise), damp)
    scale_I = U_II.square().sum(0).rsqrt_()
    if math.isinf(damping):
        X_II = torch.cholesky_inverse(U_II, upper=True)
    else:
        del U_II
        X_II = damped(H_II.to(precise), damping)[0]
    X_II.div_(scale_I).div_(scale_I[:, None])
    return LayerProblem(X_II.float(), scale_I.float(), damping)


def alps(
    W_OI: torch.Tensor,
    H_II: torch.Tensor | LayerProblem,
    *,
    kept: int | None = None,
    pattern: tuple[int, int] | None = None,
    earlier: torch.Tensor | None = None,
    damp: float = 0.01,
    max_iterations: int = 300,
    pcg_iterations: int = 4,
    growth: float = 1.15,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pruned and refitted weights, [out, in] in W's dtype, and the keep-mask [out, in], True for kept weights.

    Give exactly one of ``kept`` and ``pattern``. The work is done in float32.

    Args:
        W_OI: weights, [out, in], any float dtype.
        H_II: sum of x xᵀ, [in, in], float32 or float64; or the result of ``problem``, and then ``damp`` is not used.
        kept: number of weights to keep in the whole matrix, exact; all that ``earlier`` kept if those are fewer.
        pattern: (n, m): n of every m consecutive inputs are kept; m divides in.
        earlier: a keep-mask. Weights that it removed are zero and stay removed.
        damp: damping of H, in units of the mean of its diagonal.
        max_iterations: most iterations of ADMM, which usually needs 50 to 100.
        pcg_iterations: most conjugate-gradient steps on the final support; it stops once all gradients fell to a thousandth.
        growth: factor of rho after every five iterations. 1.2 takes a seventh less and raises the error by 0.2 %.

    Raises:
        ValueError: both or none of ``kept`` and ``pattern`` are given; H holds NaN or infinite values.
    """
    if (kept is None) == (pattern is None):
        raise ValueError("give either kept or pattern")
    alive = W_OI.numel() if earlier is None else int(earlier.sum())
    if kept == 0:
        return torch.zeros_like(W_OI), torch.zeros_like(W_OI, dtype=torch.bool)
    if kept is not None and kept >= alive:
        mask_OI = torch.ones_like(W_OI, dtype=torch.bool) if earlier is None else earlier.clone()
        return W_OI * mask_OI, mask_OI
    this = H_II if isinstance(H_II, LayerProblem) else problem(H_II, damp)
    target_OI = W_OI.float() * this.scale_I
    if earlier is not None:
        target_OI *= earlier

    def exactly(values_OI: torch.Tensor) -> torch.Tensor:
        if pattern is not None:
            return keep_n_of_m(values_OI, *pattern, earlier=earlier)
        assert kept is not None
        return keep_largest(values_OI, kept, earlier)

    B_OI = _admm(target_OI, this, _Projection(kept, pattern, earlier), max_iterations, growth)
    mask_OI = exactly(B_OI)
    B_OI *= mask_OI
    for rows in parts_of(B_OI):  # on a given support outputs do not depend on one another
        B_OI[rows] = _conjugate_gradients(target_OI[rows], this.X_II, mask_OI[rows], B_OI[rows], pcg_iterations, 1e-3)
    return B_OI.div_(this.scale_I).to(W_OI.dtype), mask_OI


def solve_support(
    W_OI: torch.Tensor, H_II: torch.Tensor, mask_OI: torch.Tensor, damp: float = 0.01, max_iterations: int = 1000
) -> torch.Tensor:
    """Return the weights W', zero outside ``mask_OI``, of least ||(W - W')X||² + damping · ||W - W'||²; in W's dtype.

    Conjugate gradients in H's dtype run until no row's gradient exceeds 1e-10 (float32: 1e-6) of its value at W' = 0.

    Args:
        W_OI: the dense weights, [out, in], any float dtype.
        H_II: sum of x xᵀ, [in, in], float32 or float64.
        mask_OI: bool [out, in], True where W' may differ from zero.
        damp: damping in units of the mean of H's diagonal. It pulls towards W, not towards zero.
        max_iterations: the result after that many iterations is returned, converged or not.
    """
    X_II = damped(H_II, damp)[0]
    scale_I = X_II.diagonal().sqrt()
    X_II.div_(scale_I).div_(scale_I[:, None])
    target_OI = W_OI.to(X_II.dtype) * scale_I
    tolerance = 1e-10 if X_II.dtype == torch.float64 else 1e-6
    start_OI = target_OI * mask_OI
    solved_OI = _conjugate_gradients(target_OI, X_II, mask_OI, start_OI, max_iterations, tolerance)
    return solved_OI.div_(scale_I).to(W_OI.dtype)


class _Projection:
    """Keeps the largest entries of a matrix and zeroes the others; the count may differ a little, or by ties."""

    def __init__(self, kept: int | None, pattern: tuple[int, int] | None, earlier: torch.Tensor | None) -> None:
        self.kept, self.pattern = kept, pattern
        self.allowed = earlier
        self.last = 0.0
        self._density = 0.0  # entries for each relative change of the threshold
        self._before, self._drop = 0.0, 1.0

    def grown(self) -> None:
        """Expect the threshold to fall as it did when rho last grew."""
        self._before, self.last = self.last, self.last * self._drop

    def take(self, Z_OI: torch.Tensor) -> None:
        """Take the threshold from Z, [out, in]."""
        self.last = self._adjusted(Z_OI) or self._threshold(Z_OI)
        if self._before:
            self._drop, self._before = self.last / self._before, 0.0

    def __call__(self, Z_PI: torch.Tensor, rows: slice, out: torch.Tensor) -> torch.Tensor:
        """Write the projection of some rows Z of the matrix into ``out`` and return it."""
        allowed_PI = None if self.allowed is None else self.allowed[rows]
        if self.pattern is None:
            torch.ops.aten.hardshrink.out(Z_PI, self.last, out=out)
        else:
            size_PI = torch.abs(Z_PI, out=out)
            if allowed_PI is not None:
                size_PI *= allowed_PI
            groups_Gm = size_PI.view(-1, self.pattern[1])
            torch.mul(Z_PI, (groups_Gm >= _nth_largest(groups_Gm, self.pattern[0])).view(Z_PI.shape), out=out)
        if allowed_PI is not None:
            out *= allowed_PI
        return out

    def _adjusted(self, Z_OI: torch.Tensor) -> float:
        """The last threshold after a step of Newton's method towards the count to keep; 0 where it is not near.

        This reads the matrix once. What the count is off by goes into the next step.
        """
        if not self._density or Z_OI.numel() < _SEARCHED:
            return 0.0
        flat, above = Z_OI.view(-1), 0
        size = flat.numel() if flat.is_cuda else _IN_CACHE
        scratch = torch.empty_like(flat[:size])
        allowed = None if self.allowed is None else torch.split(self.allowed.view(-1), size)
        for number, part in enumerate(torch.split(flat, size)):
            size_P = torch.abs(part, out=scratch[: part.numel()])
            if allowed is not None:
                size_P *= allowed[number]
            above += int(torch.gt(size_P, self.last, out=size_P).sum())
        step = (above - (self.kept or 0)) / self._density
        return self.last * (1 + step) if abs(step) < _NEAR else 0.0

    def _threshold(self, Z_OI: torch.Tensor) -> float:
        """Return the largest magnitude that is not kept. A band around the last one is searched first."""
        size_OI = Z_OI.abs()
        if self.allowed is not None:
            size_OI *= self.allowed
        rank = (self.kept or 0) + 1
        for band in _BANDS if self.last else ():
            above_OI = size_OI > self.last * (1 + band)
            rest = rank - int(torch.count_nonzero(above_OI))
            if rest < 1:  # it has grown more
                continue
            near = size_OI[(size_OI > self.last * (1 - band)) ^ above_OI]
            if rest <= near.numel():
                self._density = near.numel() / (2 * band)
                return float(near.kthvalue(near.numel() - rest + 1).values)
        return float(size_OI.flatten().kthvalue(size_OI.numel() - rank + 1).values)


def _nth_largest(groups_Gm: torch.Tensor, n: int) -> torch.Tensor:
    """Return the n-th largest of each row, [groups, 1], by insertion: faster than sorting for a pattern's few columns."""
    best: list[torch.Tensor] = []
    for value_G in groups_Gm.unbind(1):
        for rank, other_G in enumerate(best):
            best[rank] = torch.maximum(other_G, value_G)
            value_G = torch.minimum(other_G, value_G)
        if len(best) < n:
            best.append(value_G)
    return best[-1][:, None]


def _admm(
    target_OI: torch.Tensor, this: LayerProblem, project: _Projection, max_iterations: int, growth: float
) -> torch.Tensor:
    """Return the paper's B after convergence, dense, [out, in]; its largest entries are the support."""

    def advance(rows: slice) -> None:
        u_PI = u_OI[rows]
        u_PI -= project(u_PI, rows, work_OI[rows])

    def right_hand_side(rows: slice) -> None:
        D_PI = work_OI[rows].sub_(u_OI[rows])
        torch.add(G_OI[rows], D_PI, alpha=rho, out=D_PI)

    G_OI = target_OI @ this.X_II
    rho = _RHO
    inverse_II = torch.empty_like(this.X_II).mT
    _invert(this, rho, inverse_II)
    B_OI = torch.empty_like(target_OI)
    work_OI = torch.empty_like(target_OI)  # holds D and the right-hand side in turn
    u_OI = torch.zeros_like(target_OI)
    outputs, inputs = target_OI.shape
    step = outputs if target_OI.is_cuda else max(1, _IN_CACHE // inputs)
    parts = [slice(start, start + step) for start in range(0, outputs, step)]
    if project.pattern is None:
        project.take(target_OI)
    support_OI = project(target_OI, slice(None), work_OI) != 0
    for rows in parts:
        right_hand_side(rows)
    size = max(1, int(support_OI.sum()))
    changed = False
    for iteration in range(1, max_iterations + 1):
        torch.mm(work_OI, inverse_II, out=B_OI)
        if iteration == max_iterations:
            break
        for rows in parts:
            u_OI[rows] += B_OI[rows]
        if project.pattern is None:
            project.take(u_OI)
        if iteration % _CHECK:
            for rows in parts:
                advance(rows)
                right_hand_side(rows)
            continue
        for rows in parts:
            advance(rows)
        before_OI, support_OI = support_OI, work_OI != 0
        settled = int(torch.count_nonzero(before_OI ^ support_OI)) < _SETTLED * size
        if settled and (changed or rho > _LATE):  # while rho is small the support need not move yet
            break
        changed = changed or not settled
        u_OI /= growth
        rho *= growth
        project.grown()
        _invert(this, rho, inverse_II)
        for rows in parts:
            right_hand_side(rows)
    return B_OI


def _invert(this: LayerProblem, rho: float, out: torch.Tensor) -> None:
    """Write (X + rho)⁻¹ into ``out``, [in, in], column-major as LAPACK wants it.

    By a Cholesky factor, which costs half of what eigenvectors take for one rho, and they would have to be found first. In
    float32: the eigenvalues of X are around 1, and rho is at least `_RHO`.
    """
    out.copy_(this.X_II).diagonal().add_(rho)
    torch.linalg.cholesky(out, out=out)
    torch.cholesky_inverse(out, out=out)


def _conjugate_gradients(
    target_OI: torch.Tensor,
    X_II: torch.Tensor,
    mask_OI: torch.Tensor,
    start_OI: torch.Tensor,
    iterations: int,
    tolerance: float,
) -> torch.Tensor:
    """Return B, zero outside the mask, of a lower (B - target) X (B - target)ᵀ than ``start_OI``; no row gets worse."""
    mask_OI = mask_OI.to(X_II.dtype)
    jacobi_I = X_II.diagonal().reciprocal()
    floor = torch.finfo(X_II.dtype).tiny
    best_OI = start_OI.clone()
    gradient_OI = (target_OI - start_OI) @ X_II
    least_O1 = (gradient_OI * (target_OI - start_OI)).sum(1, keepdim=True)
    residual_OI = gradient_OI.mul_(mask_OI)
    goal_O = tolerance * ((target_OI @ X_II) * mask_OI).norm(dim=1)
    B_OI = start_OI
    step_OI = residual_OI * jacobi_I
    power_O1 = (residual_OI * step_OI).sum(1, keepdim=True)
    for _ in range(iterations):
        if bool((residual_OI.norm(dim=1) <= goal_O).all()):
            break
        image_OI = step_OI @ X_II
        length_O1 = power_O1 / (step_OI * image_OI).sum(1, keepdim=True).clamp_(min=floor)
        B_OI = B_OI + length_O1 * step_OI
        residual_OI -= image_OI.mul_(mask_OI).mul_(length_O1)
        z_OI = residual_OI * jacobi_I
        now_O1 = (residual_OI * z_OI).sum(1, keepdim=True)
        step_OI = step_OI.mul_(now_O1 / power_O1.clamp(min=floor)).add_(z_OI)
        power_O1 = now_O1
    off_OI = target_OI - B_OI
    better_O1 = ((off_OI @ X_II) * off_OI).sum(1, keepdim=True) <= least_O1
    return torch.where(better_O1, B_OI, best_OI)
