"""How far matrices follow the inputs that earlier changes moved: ridge regression, chosen on samples that it does not see.

Each matrix of each block is fitted to what the original outputs (GPTAQ). A fit also follows noise of its samples, and those
of all matrices add up: on the calibration text the model comes ever nearer to the original, and elsewhere it does not. So some
samples are left out of all of these fits, and say how strongly to fit.

T tokens that are held out, I inputs, O outputs, S outputs that are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compress.blockwise.linears import TargetLinear
from compress.distributed import ProcessGroup
from compress.solvers.gptq import asymmetric_target, ridge_factor

#: One sample of so many is held out; at least one, if there are two.
_EVERY = 8
#: Ridges to try, as shares of the mean of H's diagonal. The middle one where no sample is held out.
_RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03)
#: Outputs of each matrix that are looked at, and values of inputs that are kept for it.
_OUTPUTS, _VALUES = 64, 1 << 22


@dataclass
class InputMismatch:
    """Sums over tokens that are not held out; x and r belong to the original, x̂ and r̂ to the model as it is now.

    Attributes:
        inputs: Σ (x - x̂) x̂ᵀ [I, I].
        residual: Σ (r - r̂) x̂ᵀ [O, I] by the name of each linear that writes to the residual stream; its outputs are added
            to r.
        readers: number of linears that are still to read them; 0 keeps the sums.
        scale: all tokens, which H has, over those of the sums.
        ridge: as a share of the mean of H's diagonal. shares: by linear, how much of its correction it takes; 1 by default.
    """

    inputs: torch.Tensor
    residual: dict[str, torch.Tensor] = field(default_factory=dict)
    readers: int = 0
    scale: float = 1.0
    ridge: float = _RIDGES[len(_RIDGES) // 2]
    shares: dict[str, float] = field(default_factory=dict)

    def release(self) -> None:
        """One linear of ``readers`` has read the sums; they are freed after the last one."""
        self.readers -= 1
        if self.readers == 0:
            self.inputs = self.inputs.new_empty(0)
            self.residual = {}

    def pull(self, linear: TargetLinear, weight: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
        """Σ (W (x - x̂) + r - r̂) x̂ᵀ of some of a linear's outputs [S, I], as of all tokens. ``weight``: W of all outputs."""
        result = weight[rows].to(self.inputs.dtype) @ self.inputs
        if (residual := self.residual.get(linear.name)) is not None:
            result += (residual if linear.outputs is None else residual[linear.outputs])[rows]
        return result.mul_(self.scale)


@dataclass
class HeldOutTokens:
    """Values of held-out tokens: inputs x̂ and x - x̂ [T, I], and r - r̂ [T, O] by linear that writes to the residual stream."""

    inputs: list[torch.Tensor] = field(default_factory=list)
    moved: list[torch.Tensor] = field(default_factory=list)
    residual: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def add(self, x: torch.Tensor, moved: torch.Tensor, residual: torch.Tensor | None, names: Iterable[str]) -> None:
        """Add tokens of a sample."""
        self.inputs.append(x)
        self.moved.append(moved)
        if residual is not None:
            for name in names:
                self.residual.setdefault(name, []).append(residual)


def held_out(samples: int) -> set[int]:
    """Numbers of the samples that are left out of fits, of so many."""
    return set(range(samples - 1, 0, -_EVERY))


def tokens_of_each(samples: int, width: int) -> int:
    """Tokens that are kept of each held-out sample, of so many samples and inputs."""
    return max(1, _VALUES // (width * max(1, len(held_out(samples)))))


def choose(
    group: Sequence[TargetLinear],
    H: torch.Tensor,
    mismatch: InputMismatch,
    held: HeldOutTokens,
    processes: ProcessGroup,
) -> None:
    """Set the ridge and shares by which corrections leave least of what held-out tokens lack; all processes take part.

    A ridge is chosen for the group: the one of the largest sum of relative gains. A matrix's share of its correction is the
    one that leaves least, from 0 to 1.
    """
    x = torch.cat(held.inputs) if held.inputs else H.new_zeros(0, len(H), dtype=torch.float32)
    moved = torch.cat(held.moved) if held.moved else x
    rows = [_some(linear) for linear in group]
    lacking = [moved @ linear.weight[some].float().T for linear, some in zip(group, rows, strict=True)]
    for linear, some, target in zip(group, rows, lacking, strict=True):
        if linear.name in held.residual:
            target += torch.cat(held.residual[linear.name])[:, some]
    energies = processes.reduce_sum(*(float(target.square().sum()) for target in lacking))
    if not sum(energies) or not bool(H.isfinite().all()):  # nothing has changed yet; or the solver says what is wrong
        return
    pulls = [mismatch.pull(linear, linear.weight, some) for linear, some in zip(group, rows, strict=True)]
    most = 0.0
    mismatch.shares = {linear.name: 0.0 for linear in group}
    for ridge in _RIDGES:
        factor, sums = ridge_factor(H, ridge), []
        for pull, target in zip(pulls, lacking, strict=True):
            change = torch.cholesky_solve(pull.T, factor).T.float()
            step = x @ change.T
            sums += [float((step * target).sum()), float(step.square().sum())]
        del factor
        sums = processes.reduce_sum(*sums)
        shares = [min(max(dot / square, 0.0), 1.0) if square else 0.0 for dot, square in _pairs(sums)]
        gains = [share * (2 * dot - share * square) for share, (dot, square) in zip(shares, _pairs(sums), strict=True)]
        gain = sum(one / energy for one, energy in zip(gains, energies, strict=True) if energy)
        if gain > most:
            most, mismatch.ridge = gain, ridge
            mismatch.shares = {linear.name: share for linear, share in zip(group, shares, strict=True)}


def corrected(
    linear: TargetLinear, weight: torch.Tensor, H: torch.Tensor, mismatch: InputMismatch, shared: dict[str, Any]
) -> torch.Tensor:
    """Weights [O, I] that make of x̂ what the original makes of x, and add what the residual stream lacks.

    Args:
        weight: the original's, float32. H: Σ x̂ x̂ᵀ. shared: keeps the factor for linears with the same inputs.
    """
    result, share = weight, mismatch.shares.get(linear.name, 1.0)
    if share:
        if "ridge" not in shared:
            shared["ridge"] = ridge_factor(H, mismatch.ridge)
        result = asymmetric_target(
            weight, lambda rows: mismatch.pull(linear, weight, rows).mul_(share), shared["ridge"]
        )
    mismatch.release()
    if not mismatch.readers:
        shared.pop("ridge", None)
    return result


def _pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _some(linear: TargetLinear) -> torch.Tensor:
    """Numbers of some of a linear's outputs, evenly spaced."""
    outputs = len(linear.weight)
    count = min(outputs, _OUTPUTS)
    return torch.arange(count, device=linear.weight.device) * outputs // count
