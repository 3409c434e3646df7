"""Windows by measured loss: logits that stand for what a window drops, and the choice of who keeps everything.

A window changes what heads hand to the output projection from a to a_w. With g the gradient there of the log-likelihood of a
token drawn from the model, the expected divergence is ½ E (g · (a_w - a))² to second order. All of it is computed from three
numbers per token and head: g · a, g · a_w, and the log-sum of the scores that the window keeps.

A sink logit s in the softmax's denominator scales a_w by σ(log-sum - s) (GPT-OSS; StreamingLLM, arXiv 2309.17453, has tokens).
The rest of the weight goes to a constant value c, that of the first tokens, which the window drops: a_w σ + c (1 - σ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.solvers import knapsack

#: A logit that changes nothing: exp(-1e4) is zero, and minus infinity would give NaN.
NO_SINK = -1e4
#: Offsets of the line search, in nats about the start, and most rounds over the heads.
_REACH, _STEP, _ROUNDS = 6.0, 0.25, 8


@dataclass(frozen=True)
class HeadProducts:
    """One block's products with the gradient under one window, float32.

    Attributes:
        full, kept: g · a and g · a_w, [heads, tokens]. mass: log-sum of the scores that the window keeps, [heads, tokens].
        start: mean over queries of the log-sum of what the window drops, [heads]; minus infinity where it drops nothing.
        sunk: g · c, [heads, tokens].
    """

    full: torch.Tensor
    kept: torch.Tensor
    mass: torch.Tensor
    start: torch.Tensor
    sunk: torch.Tensor

    def change(self, head: int, logits: torch.Tensor) -> torch.Tensor:
        """g · (a_w - a) of a head under each of the logits [n], float32 [n, tokens]."""
        share = torch.sigmoid(self.mass[head] - logits[:, None])
        return (self.kept[head] - self.sunk[head]) * share + self.sunk[head] - self.full[head]

    def changes(self, logits: torch.Tensor | None) -> torch.Tensor:
        """g · (a_w - a) under a logit per head, or without any, [heads, tokens]."""
        if logits is None:
            return self.kept - self.full
        return (self.kept - self.sunk) * torch.sigmoid(self.mass - logits[:, None]) + self.sunk - self.full


def sink_logits(products: HeadProducts, groups: int) -> torch.Tensor:
    """The logit of each head, float32 [heads]: `NO_SINK`, or the best of a grid of a quarter of a nat around the start.

    The loss is ½ Σ_t (Σ_h g · (a_w - a))², summed over the heads of a group before squaring. Heads are searched in turn, with
    the others fixed, until nothing changes; the first round begins with no sink anywhere.

    Args:
        groups: number of groups of adjacent heads; 1 where the whole block is one.
    """
    heads = len(products.full)
    size = heads // groups
    offsets = torch.arange(-_REACH, _REACH + _STEP / 2, _STEP, device=products.full.device)
    logits = torch.full((heads,), NO_SINK, device=products.full.device)
    current = products.changes(logits)
    for _ in range(_ROUNDS):
        before = logits.clone()
        for head in range(heads):
            if not torch.isfinite(products.start[head]):
                continue
            first = head // size * size
            rest = current[first : first + size].sum(0) - current[head]
            tried = torch.cat([logits.new_tensor([NO_SINK]), products.start[head] + offsets])
            tried = torch.cat([logits[head : head + 1], tried])  # the present one first: it wins ties
            changes = products.change(head, tried)
            best = int((rest + changes).double().square().sum(1).argmin())
            logits[head], current[head] = tried[best], changes[best]
        if torch.equal(logits, before):
            break
    return logits


def losses(changes: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Half the weighted mean over tokens of the product of each two units' changes: float64 [units, units].

    Its diagonal is the expected divergence of one unit's change alone, in nats per token; the sum over several units' rows
    and columns that of their changes together.

    Args:
        changes: of the log-likelihood, [units, tokens]. counts: what each token counts, 0 for padding, float64 [tokens].
    """
    wide = changes.double() * counts.sqrt()
    return wide @ wide.T / (2 * max(1.0, float(counts.sum())))


def noise(changes: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Variance of each of the `losses`, with the same arguments, taking tokens as independent: float64 [units, units]."""
    joint, tokens = losses(changes, counts), int((counts > 0).sum())
    squares = (changes.double() * counts.sqrt()).square() / (2 * max(1.0, float(counts.sum())))
    return (squares @ squares.T - joint.square() / max(1, tokens)) * tokens / max(1, tokens - 1)


def shrunk(joint: torch.Tensor, noise: torch.Tensor, windows: int) -> torch.Tensor:
    """The joint losses, those of pairs of different units drawn towards zero as far as they are noise.

    A covariance shrunk towards its diagonal by the intensity Σ noise / Σ joint², over those pairs, at most 1 (Ledoit and Wolf
    2004; Schäfer and Strimmer 2005). Otherwise a choice relies on changes that cancel on few tokens by chance.

    Args:
        windows: adjacent rows that are one unit's.
    """
    unit = torch.arange(len(joint), device=joint.device) // windows
    others = unit[:, None] != unit[None]
    signal = float(joint[others].square().sum())
    intensity = min(1.0, float(noise[others].sum()) / signal) if signal > 0 else 0.0
    return torch.where(others, (1 - intensity) * joint, joint)


def choose(costs: Sequence[Sequence[int]], joint: torch.Tensor, budget: int) -> list[int] | None:
    """The option of each unit: least loss within a budget; None if the cheapest options exceed it.

    Option 0 changes nothing. The knapsack over the single losses is improved by exchanges: one unit or two take another
    option while that lowers the sum over all pairs, and the budget holds. So units that can stand in for each other are not
    all lost.

    Args:
        costs: cost of each option of each unit, all with as many options.
        joint: loss of each pair of (unit, option from 1 up), float64 [units * (options - 1), the same]; see `losses`.

    Returns:
        The options; those of the knapsack where no exchange helps.
    """
    units, options = len(costs), len(costs[0])
    padded = torch.zeros(units, options, units, options, dtype=torch.float64)
    padded[:, 1:, :, 1:] = joint.double().cpu().view(units, options - 1, units, options - 1)
    single = padded.view(units * options, -1).diagonal().view(units, options).tolist()
    chosen = knapsack.choose(costs, single, budget)
    if chosen is None:
        return None
    prices = torch.tensor(costs)
    flat = padded.view(units * options, units * options)
    while (better := _exchange(prices, flat, chosen, budget)) is not None:
        chosen = better
    return chosen


def total(joint: torch.Tensor, chosen: Sequence[int], options: int) -> float:
    """The expected divergence of all chosen options together, nats per token; arguments as in `choose`."""
    rows = [unit * (options - 1) + option - 1 for unit, option in enumerate(chosen) if option]
    return float(joint[rows][:, rows].sum())


def _exchange(prices: torch.Tensor, joint: torch.Tensor, chosen: list[int], budget: int) -> list[int] | None:
    """The choice after the best move of one unit or two that holds the budget; None where none lowers the loss."""
    units, options = prices.shape
    at = torch.arange(units) * options + torch.tensor(chosen)
    before, after = at.repeat_interleave(options), torch.arange(units * options)
    pull = joint[:, at].sum(1)
    moved = joint[after][:, after] - joint[after][:, before] - joint[before][:, after] + joint[before][:, before]
    alone = 2 * (pull[after] - pull[before]) + moved.diagonal()
    gain = alone[:, None] + alone[None] + 2 * moved
    extra = prices.flatten() - prices.flatten()[before]
    spent = int(prices.flatten()[at].sum()) + extra[:, None] + extra[None]
    unit = torch.arange(units).repeat_interleave(options)
    same = unit[:, None] == unit[None]
    gain[same | (spent > budget)] = torch.inf
    single = torch.where(spent.diagonal() - extra <= budget, alone, torch.inf)
    best, pair = float(gain.min()), int(gain.argmin())
    scale = float(joint[at][:, at].sum().abs())
    if min(best, float(single.min())) >= -1e-9 * max(scale, 1e-30):
        return None
    moves = [int(single.argmin())] if float(single.min()) <= best else [pair // len(after), pair % len(after)]
    result = list(chosen)
    for move in moves:
        result[move // options] = move % options
    return result
