"""Neurons of an MLP divided into experts, and a linear router that chooses some of them for each token.

Letters: T tokens, I inputs of the MLP, N neurons that are not shared, E experts, A neurons of the MLP. The energy of a neuron
on a token is h² ‖w‖², with h its activation and w the column of the down projection that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.solvers.hessian import check_finite, damped_diagonal
from compress.solvers.obs import obs_prune_groups

#: Columns of the basis in which neurons are compared, and rounds of k-means.
_BASIS, _ROUNDS = 32, 10
#: Neurons that are tried for each first centre of k-means.
_DRAWN = 8
#: Most pairs of neurons that change places.
_EXCHANGES = 1024
#: Rounds of the router and the experts in turn. Each later one lowers the error by less; after the third by under 1 %.
_TURNS = 3
#: Steps of the router's training, in the first round and in later ones; tokens of a step; Adam's step.
_STEPS, _MORE_STEPS, _TOKENS, _RATE = 150, 80, 4096, 0.03
#: Standard deviation of the router's logits: each chosen expert has nearly the same weight, and few tokens lie so near to a tie
#: that the softmax, in float32, rounds it away. If all experts are chosen there are no ties.
SPREAD, SPREAD_OF_ALL = 1e-2, 3e-4
#: Damping of the least squares: directions that no token excites keep their weights.
_DAMP = 0.001


@dataclass(frozen=True)
class Carving:
    """An MLP divided into experts.

    Attributes:
        expert_A: the expert of each neuron, int64; -1 for shared neurons. router_EI: float32 weights of the router.
    """

    expert_A: torch.Tensor
    router_EI: torch.Tensor


def carve(
    x_TI: torch.Tensor,
    h_TA: torch.Tensor,
    W_OA: torch.Tensor,
    H_AA: torch.Tensor,
    *,
    count: int,
    size: int,
    active: int,
    seed: int,
) -> Carving:
    """Return the division of an MLP's neurons into shared ones and ``count`` experts of ``size``, and the router.

    Shared are the neurons that Optimal Brain Surgeon would keep. The others are grouped by the tokens they are active on. Then
    in turn: the router learns each expert's share of the energy, and neurons move to the expert whose tokens hold most of their
    energy.

    Args:
        x_TI: inputs of the MLP. h_TA: activations of its neurons on the same tokens. W_OA: the down projection.
        H_AA: sum of h hᵀ, over these or more tokens; not changed.
        active: experts that a token is sent to. seed: of k-means and of the order of training.

    Raises:
        ValueError: H holds NaN or infinite values.

    Source: CMoE (arXiv 2502.04416) for shared and routed neurons and balanced clusters; its shared neurons are those most often
    active, and its router reads a representative neuron of each expert.
    """
    check_finite(H_AA)
    shared = obs_prune_groups(W_OA, H_AA, count * size)
    routed_N = torch.ones(len(H_AA), dtype=torch.bool, device=H_AA.device)
    routed_N[shared] = False
    energy_TN = h_TA[:, routed_N].square() * W_OA[:, routed_N].float().square().sum(0)
    expert_N = clusters(energy_TN, count, size, seed)
    router_EI, steps = None, _STEPS
    for turn in range(_TURNS):
        energy_TE = energy_TN.new_zeros(len(energy_TN), count).index_add_(1, expert_N, energy_TN)
        router_EI = fit_router(x_TI, energy_TE, router_EI, steps, seed)
        steps = _MORE_STEPS
        if turn + 1 < _TURNS:
            expert_N = balanced(chosen(x_TI @ router_EI.T, active).T @ energy_TN, size)
    assert router_EI is not None
    expert_A = torch.full((len(H_AA),), -1, dtype=torch.int64, device=H_AA.device)
    expert_A[routed_N] = expert_N
    return Carving(expert_A, flat(router_EI, x_TI, SPREAD if active < count else SPREAD_OF_ALL))


def flat(router_EI: torch.Tensor, x_TI: torch.Tensor, spread: float) -> torch.Tensor:
    """Return the router with logits of that standard deviation on those tokens; it chooses the same experts."""
    return router_EI * (spread / (x_TI @ router_EI.T).std().clamp_min(1e-30))


def chosen(logits_TE: torch.Tensor, active: int) -> torch.Tensor:
    """Return 1 for the ``active`` experts of largest logits of each token, else 0, [T, E]."""
    return torch.zeros_like(logits_TE).scatter_(1, logits_TE.topk(active, 1).indices, 1.0)


def clusters(energy_TN: torch.Tensor, count: int, size: int, seed: int) -> torch.Tensor:
    """Return the group of each neuron, int64 [N]: ``count`` groups of ``size`` neurons that are active on the same tokens.

    Balanced k-means, in the leading singular directions of the roots of the energies less their means.
    """
    generator = torch.Generator().manual_seed(seed)
    active_TN = energy_TN.sqrt()
    active_TN = active_TN - active_TN.mean(0)
    active_TN /= active_TN.norm(dim=0).clamp_min(1e-30)
    neurons = active_TN.shape[1]
    basis_NK = torch.randn(neurons, min(_BASIS, neurons), generator=generator).to(active_TN)
    for _ in range(4):  # subspace iteration
        basis_NK = torch.linalg.qr(active_TN.T @ (active_TN @ basis_NK)).Q
    place_NK = torch.nn.functional.normalize(basis_NK * (active_TN @ basis_NK).norm(dim=0))
    centres_EK = place_NK[_first_centres(place_NK, count, generator)]
    group_N = torch.zeros(neurons, dtype=torch.int64)
    for _ in range(_ROUNDS):
        group_N = balanced(centres_EK @ place_NK.T, size, exchanges=0)
        sums_EK = torch.zeros_like(centres_EK).index_add_(0, group_N, place_NK)
        centres_EK = torch.nn.functional.normalize(sums_EK)
    return group_N


def _first_centres(place_NK: torch.Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Return the numbers of ``count`` rows of unit length that are far from each other.

    Each next row is the best of some that are drawn by their distance from the rows before, as in greedy k-means++.
    """
    picked = [int(torch.randint(len(place_NK), (1,), generator=generator))]
    far_N = (1 - place_NK @ place_NK[picked[0]]).clamp_min(1e-9)
    while len(picked) < count:
        drawn = torch.multinomial(far_N.double().cpu(), min(_DRAWN, len(far_N)), generator=generator)
        left_DN = torch.minimum(far_N, 1 - place_NK[drawn] @ place_NK.T)
        best = int(left_DN.sum(1).argmin())
        picked.append(int(drawn[best]))
        far_N = left_DN[best].clamp_min(1e-9)
    return picked


def balanced(benefit_EN: torch.Tensor, size: int, exchanges: int = _EXCHANGES) -> torch.Tensor:
    """Return the group of each neuron, int64 [N], each of ``size``, for a large sum of benefits.

    Neurons choose in the order of what they gain over the mean of all groups. Then, as long as it raises the sum, the best two
    neurons of a pair of groups change places, at most so many times. The result is within a few per cent of the optimum, which
    takes N³ time.
    """
    groups, neurons = benefit_EN.shape
    gain_EN = (benefit_EN - benefit_EN.mean(0)).double().cpu()
    room, group = [size] * groups, [-1] * neurons
    for flat_index in gain_EN.flatten().argsort(descending=True, stable=True).tolist():
        e, n = divmod(flat_index, neurons)
        if group[n] < 0 and room[e]:
            group[n], room[e] = e, room[e] - 1
    group_N = torch.tensor(group)
    for _ in range(exchanges):
        # gains of neurons of group a in group b, at most one pair changes places in a step
        own_N = gain_EN.gather(0, group_N[None])[0]
        best_EE = torch.full((groups, groups), -torch.inf, dtype=torch.float64)  # [to, from]
        best_EE.scatter_reduce_(1, group_N.expand(groups, -1), gain_EN - own_N, "amax")
        swap_EE = (best_EE + best_EE.T).fill_diagonal_(0)
        value, where = swap_EE.flatten().max(0)
        if float(value) <= 1e-9 * float(gain_EN.abs().max()):
            break
        to, source = divmod(int(where), groups)
        for here, there in ((source, to), (to, source)):
            moved = torch.where(group_N == here, gain_EN[there] - own_N, -torch.inf).argmax()
            own_N[moved] = torch.inf  # it has moved already
            group_N[moved] = there
    return group_N.to(benefit_EN.device)


def fit_router(
    x_TI: torch.Tensor, energy_TE: torch.Tensor, start_EI: torch.Tensor | None, steps: int, seed: int
) -> torch.Tensor:
    """Return router weights [E, I], float32, whose softmax is near each expert's share of a token's energy.

    The loss is the cross-entropy with the shares; Adam, with a step that falls linearly to zero.

    Args:
        start_EI: weights to start from; None for zeros.
    """
    scale = x_TI.square().mean().sqrt().clamp_min(1e-30)
    share_TE = energy_TE / energy_TE.sum(1, keepdim=True).clamp_min(1e-30)
    weights = torch.zeros(energy_TE.shape[1], x_TI.shape[1]).to(x_TI) if start_EI is None else start_EI * scale
    weights = weights.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], _RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / steps)
            rows = torch.randint(len(x_TI), (min(_TOKENS, len(x_TI)),), generator=generator).to(x_TI.device)
            logits = (x_TI[rows] / scale) @ weights.T
            loss = -(share_TE[rows] * torch.log_softmax(logits, 1)).sum(1).mean()
            (weights.grad,) = torch.autograd.grad(loss, [weights])
            optimizer.step()
    return weights.detach() / scale


def solve_down(W_OA: torch.Tensor, cross_AA: torch.Tensor, gram_AA: torch.Tensor) -> torch.Tensor:
    """Return the weights V [O, A] of least Σ ‖W h - V m‖² + λ‖W - V‖², where m are the activations that the router leaves of h.

    V = W (C + λ) (G + λ)⁻¹. λ is a thousandth of the mean of G's diagonal, more if G + λ has no Cholesky factor.

    Args:
        cross_AA: C = Σ h mᵀ. gram_AA: G = Σ m mᵀ. Both of one float dtype, that of the result.

    Raises:
        ValueError: G holds NaN or infinite values.

    Source: the normal equations.
    """
    check_finite(gram_AA)
    weight, damp = W_OA.to(gram_AA.dtype), _DAMP
    while True:
        diagonal_A = damped_diagonal(gram_AA, damp)
        damped_AA = gram_AA.clone()
        damped_AA.diagonal().copy_(diagonal_A)
        factor_AA, failed = damped_AA.mT, torch.empty((), dtype=torch.int32, device=gram_AA.device)
        torch.linalg.cholesky_ex(factor_AA, out=(factor_AA, failed))  # in place: column-major, as LAPACK wants it
        if not int(failed):
            target_OA = weight @ cross_AA + weight * (diagonal_A - gram_AA.diagonal())
            return torch.cholesky_solve(target_OA.mT, factor_AA).mT.contiguous()
        damp *= 10
