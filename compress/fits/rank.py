"""Combinations ranked by what their parts cost: divergences of the families' amounts add up, and bits fill the bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from compress.fits.families import Choice, Concession
from compress.recipe.fit import FamilyName

#: Beyond the finest and coarsest bits that were measured, a bit changes the divergence by this factor: rounding errors are
#: quartered by each bit, their squares' effect too.
_BIT = 4.0


@dataclass(frozen=True)
class Curve:
    """Divergence by bits per cast weight: logarithms between measured points are linear.

    Attributes:
        points: bits and divergence, ascending by bits, at least one.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, bits: float) -> float:
        """The divergence at so many bits per weight."""
        (low, at_low), (high, at_high) = self.points[0], self.points[-1]
        if bits >= high:
            return at_high * float(_BIT ** (high - bits))
        if bits <= low:
            return at_low * float(_BIT ** (low - bits))
        (x0, y0), (x1, y1) = next(pair for pair in itertools.pairwise(self.points) if bits <= pair[1][0])
        share = (bits - x0) / (x1 - x0)
        return math.exp((1 - share) * math.log(max(y0, 1e-12)) + share * math.log(max(y1, 1e-12)))


@dataclass(frozen=True)
class Weights:
    """The weights of a combination that are cast, and the bytes beside them, from its plan.

    Attributes:
        cast: number of weights that get codes. beside: bytes of everything else. kept: share of those that masks keep.
    """

    cast: int
    beside: int
    kept: float = 1.0

    def bits(self, most: int) -> float:
        """Bits per kept weight, scales included, within so many bytes; a mask takes one bit for each weight."""
        whole = 8 * (most - self.beside) / max(self.cast, 1)
        return whole if self.kept == 1 else (whole - 1) / self.kept

    def bytes(self, bits: float) -> int:
        """Bytes at so many bits per kept weight."""
        mask = 0 if self.kept == 1 else self.cast
        return math.ceil(self.beside + (self.cast * self.kept * bits + mask) / 8)


@dataclass(frozen=True)
class Ranked:
    """A combination with what it is expected to cost.

    Attributes:
        bits: per weight that the bound leaves. divergence: expected, nats per token.
    """

    choice: Choice
    bits: float
    divergence: float


def ranked(
    costs: Mapping[FamilyName, Mapping[Concession, float]],
    curve: Callable[[Choice], Curve],
    weights: Callable[[Choice], Weights | None],
    most: int,
    least_bits: float,
) -> list[Ranked]:
    """Every combination that can keep the bound, the cheapest first.

    Args:
        costs: family ▶ amount ▶ its divergence alone. curve: of the codes of a combination.
        weights: of a combination; None where its passes do not go together. least_bits: per weight, of the smallest format.
    """
    result = []
    for choice in combinations(costs):
        if (of := weights(choice)) is None or (bits := of.bits(most)) < least_bits:
            continue
        divergence = sum(costs[family][amount] for family, amount in choice.items())
        result.append(Ranked(choice, bits, divergence + curve(choice).at(bits)))
    return sorted(result, key=lambda one: (one.divergence, len(one.choice)))


def combinations(costs: Mapping[FamilyName, Mapping[Concession, float]]) -> Iterator[Choice]:
    """Every combination of the amounts, the empty one first."""
    options = [[None, *amounts] for amounts in costs.values()]
    for picked in itertools.product(*options):
        yield {family: amount for family, amount in zip(costs, picked, strict=True) if amount is not None}


def finalists(result: Sequence[Ranked], count: int, possible: Callable[[Ranked], bool]) -> list[Ranked]:
    """The best of each set of families, so that one wrong cost does not decide about all; then the next best.

    Args:
        possible: whether the passes of a combination, planned exactly, keep the bound; asked of few.
    """
    chosen: list[Ranked] = []
    sets: set[frozenset[str]] = set()
    refused: set[int] = set()
    for distinct in (True, False):
        for one in result:
            if len(chosen) == count:
                return chosen
            of = frozenset(one.choice) - {"embeddings"}
            if id(one) in refused or (distinct and of in sets) or any(one is other for other in chosen):
                continue
            if possible(one):
                chosen.append(one)
                sets.add(of)
            else:
                refused.add(id(one))
    return chosen
