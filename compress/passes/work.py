"""The work of block runners and of whole models, from headers: products, Hessians, solvers, reconstruction. No torch here.

How often samples go through a block, and what a training step costs beside the forward pass, are the numbers below.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.architectures.matrices import Linear, ModelBlock
from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import (
    FLOAT64_MAX_WIDTH,
    HELD_OUT,
    SAMPLES_PER_STEP,
    TOKENS_PER_BATCH,
    curvatures_that_fit,
)
from compress.spec.spec import Spec
from compress.work import TERMS, Work

#: Passes over each value that a matrix reads or writes in a forward pass: norms, activations, sums, copies.
_VALUES = 2.0
#: Small operations of a forward pass of a batch through a block, with the work of Python beside them.
_CALLS = 300
#: Bytes that wait on disk in front of a group for each value that it reads, which float32 has four of, and the residual.
_WAITING = 8
#: Forward passes that gradients take: by the inputs alone, and by the weights too.
BACK, BACK_WITH_WEIGHTS = 1.0, 2.0
#: Samples on which divergences of matrices are measured, as `compress.sensitivity.matrices` has them.
DIVERGENCE_SAMPLES = 32
#: Samples whose outputs are compared before the work, whole and block by block.
_CHECKED = 2


@dataclass(frozen=True)
class SampleSize:
    """How many samples there are, and how many tokens each has."""

    samples: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self.samples * self.length


@dataclass(frozen=True)
class DataSizes:
    """Sizes of a recipe's data; None without such data, or where only reading them tells.

    Attributes:
        original: headers of the recipe's model, which may be a teacher.
    """

    calibration: SampleSize | None = None
    training: SampleSize | None = None
    original: Spec | None = None


@dataclass(frozen=True)
class Tuning:
    """Block reconstruction: its epochs, and what it trains."""

    epochs: float
    trains: Literal["floats", "scales"]


def runner_work(
    spec: Spec,
    names: Collection[str],
    size: SampleSize,
    solvers: Sequence[str],
    *,
    factor: str | None,
    asymmetric: bool = False,
    curvature: int = 0,
    tuning: Tuning | None = None,
    targets: bool = False,
    passes: float = 1.0,
) -> Work:
    """Return the work of a block runner that changes the tensors ``names``.

    Samples go through a block once for the statistics of all groups, which also gives its outputs unless it is tuned
    afterwards. With targets the original block runs too. With asymmetric calibration that is the pass which takes a second sum
    of products; see `compress.blockwise.asymmetric`.

    Args:
        solvers: kinds of work on each matrix. factor: kind of work on each Hessian; None for none.
        curvature: output errors are weighed by gradients of so many tokens; 0 for none.
        targets: the original block runs although nothing is tuned.
        passes: of the samples through a block that changes, for its statistics.
    """
    mapped, result = model_map(spec), Work()
    targets = targets or tuning is not None or asymmetric or curvature > 0
    for block in mapped.blocks:
        one = _BlockWork(block, size, mapped.experts_per_token)
        changed = [x for x in block.linears if x.name in names and x.shared_with is None]
        mixed = any(one.experts(x) > 1 for x in changed)
        again = (passes if changed else 1.0) + asymmetric + (tuning is not None) + mixed
        one.forward(again + (targets and not asymmetric), size.tokens)
        one.forward(1.0, _CHECKED * size.length)
        one.solve(changed, solvers, factor, 2 if asymmetric else 1)
        if curvature and mapped.has_head:
            kinds = ["kronecker", *(["yaqa"] if "quantease" in solvers else [])]
            _curvature(one, changed, min(size.tokens, curvature), kinds)
        if tuning is not None:
            one.tune(tuning)
        result.add_all(one.work)
    if curvature and mapped.has_head:
        result.add_all(prediction_work(spec, min(size.tokens, curvature), BACK))
    return result


def model_work(spec: Spec, size: SampleSize, passes: float = 1.0) -> Work:
    """Return the work of so many passes of all samples through all blocks.

    Args:
        passes: a backward pass is `BACK` of them, or `BACK_WITH_WEIGHTS`.
    """
    mapped, result = model_map(spec), Work()
    for block in mapped.blocks:
        one = _BlockWork(block, size, mapped.experts_per_token)
        one.forward(passes, size.tokens)
        result.add_all(one.work)
    return result


def prediction_work(spec: Spec, tokens: float, back: float = 0.0) -> Work:
    """Return the work of predicting so many tokens from the last hidden states; nothing for a model without a head.

    Args:
        back: products of the backward pass for each one of the forward pass.
    """
    mapped, result = model_map(spec), Work()
    if mapped.has_head and (head := mapped.head_weight) is not None:
        result.add("product", head.shape[0], head.shape[1], (1 + back) * tokens)
        result.add("logits", 0, 1, (1 + (back > 0)) * head.shape[0] * tokens)
    return result


def divergence_work(spec: Spec, probes: Mapping[str, int], size: SampleSize) -> Work:
    """Return the work of measuring what changes of matrices cost; see `compress.sensitivity.matrices.divergences`.

    Args:
        probes: number of changes by tensor.
    """
    some = SampleSize(min(DIVERGENCE_SAMPLES, size.samples), size.length)
    result = model_work(spec, some, 1 + BACK)
    result.add_all(prediction_work(spec, some.tokens, BACK))
    for name, count in probes.items():
        x = model_map(spec).linears[name]
        result.add("product", x.O, x.I, count * some.tokens)
    return result


class _BlockWork:
    """The work on one block."""

    def __init__(self, block: ModelBlock, size: SampleSize, experts_per_token: int) -> None:
        self.block, self.size, self.work = block, size, Work()
        named = len({x.expert for x in block.linears if x.expert is not None})
        self._count, self._active = max([named, *(x.experts for x in block.linears)]), experts_per_token

    def experts(self, linear: Linear) -> int:
        """Number of experts beside the one that a matrix belongs to, itself included; 1 for one that all tokens take."""
        return self._count if linear.experts or linear.expert is not None else 1

    def _matrices(self, linear: Linear) -> tuple[int, int, float]:
        """Outputs of each matrix in a tensor, their number, and the share of the tokens that each takes."""
        count = max(1, linear.experts)
        share = min(1.0, self._active / self._count) if self.experts(linear) > 1 else 1.0
        return linear.O // count, count, share

    def forward(self, times: float, tokens: int) -> None:
        """Add forward passes of so many tokens."""
        for x in self.block.linears:
            outputs, count, share = self._matrices(x)
            rows = times * tokens * count * share
            self.work.add("product", outputs, x.I, rows)
            self.work.add("values", 0, 1, _VALUES * rows * (outputs + x.I))
        self.work.add("calls", 0, 1, _CALLS * times * tokens / TOKENS_PER_BATCH["cpu"])
        width = max((x.I for x in self.block.linears if x.role == "attention"), default=0)
        self.work.add("attention", width, self.size.length, times * tokens)

    def solve(self, changed: Sequence[Linear], solvers: Sequence[str], factor: str | None, sums: int) -> None:
        """Add sums of Hessians, their factors, and the solver of each matrix."""
        for width, tokens, count in self._hessians(changed):
            single = width > FLOAT64_MAX_WIDTH
            self.work.add("hessian_wide" if single else "hessian", 0, width, tokens * count)
            self.work.add("spill", 0, 1, sums * _WAITING * width * tokens * count)
            if sums > 1:  # of products that are not symmetric
                self.work.add("product", width, width, (sums - 1) * tokens * count)
            if factor is not None:
                wide = f"{factor}_wide"
                self.work.add(wide if single and wide in TERMS else factor, 0, width, count)
        for x in changed:
            outputs, count, _ = self._matrices(x)
            for solver in solvers:
                self.work.add(solver, outputs, x.I, count)

    def _hessians(self, changed: Sequence[Linear]) -> list[tuple[int, float, int]]:
        """Width, tokens and number of the Hessians; matrices that read the same have one.

        Of a module those of one width share their inputs, but for attention's output, which reads what the others made.
        """
        widths = Counter((x.part.rpartition(".")[0], x.I, x.expert, x.experts, x.role) for x in changed)
        attention = {module for module, *_, role in widths if role == "attention"}
        result = []
        for _, width, expert, many, _ in widths:
            share = min(1.0, self._active / self._count) if many or expert is not None else 1.0
            result.append((width, self.size.tokens * share, max(1, many)))
        for module in attention:
            own = [(width, count) for (one, width, *_), count in widths.items() if one == module]
            if len(own) == 1 and own[0][1] > 1:
                result.append((own[0][0], float(self.size.tokens), 1))
        return result

    def tune(self, tuning: Tuning) -> None:
        """Add block reconstruction, with the first rate that is tried."""
        held = max(1, round(HELD_OUT * self.size.samples))
        train = max(1, self.size.samples - held)
        self.forward(2.0, held * self.size.length)
        self.forward(tuning.epochs * (1 + BACK_WITH_WEIGHTS), train * self.size.length)
        steps = math.ceil(tuning.epochs * -(-train // SAMPLES_PER_STEP[tuning.trains]))
        count = sum(t.count for t in self.block.tensors.values())
        if tuning.trains == "floats":
            self.work.add("adam", 0, 1, steps * count)
        else:  # gradients of scales, and weights from codes and scales
            self.work.add("values", 0, 1, 2.0 * steps * count)


def _curvature(one: _BlockWork, changed: Sequence[Linear], tokens: int, kinds: Sequence[str]) -> None:
    """Add gradients of the whole model at this block, then at its matrices' outputs, their sums of products, and solvers."""
    one.forward(2 + BACK, tokens)
    one.forward(1 + BACK, tokens)
    alone = [x for x in changed if one.experts(x) == 1 and not x.kernel]
    fitting = Counter(curvatures_that_fit(x.O for x in alone))
    for x in sorted(alone, key=lambda x: x.O):
        if fitting[x.O] > 0:
            fitting[x.O] -= 1
            one.work.add("product", x.O, x.O, tokens)
            for kind in kinds:
                one.work.add(kind, x.O, x.I)
