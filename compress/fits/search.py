"""The search for the best combination of families within a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from compress import passes
from compress.architectures.model_map import model_map
from compress.checkpoint.store import Store
from compress.errors import CompressError, PassError
from compress.fits.families import TRELLIS, Choice, Concession, Making, amounts, at_least, tables, text
from compress.fits.rank import Curve, Ranked, Weights, finalists, ranked
from compress.fits.trials import TrialRunner, Tried
from compress.formatting import format_bytes
from compress.passes.cast.cast import Cast
from compress.passes.cast.plan import undecided
from compress.passes.cast.settings import CastSettings
from compress.planning.make import plan_pass
from compress.planning.sizes import planned_size
from compress.progress import Progress
from compress.recipe.entries import parse_pass
from compress.recipe.fit import Bound, FamilyName
from compress.spec.spec import DTYPE_BITS, Spec

#: Formats by which the cost of rounding is measured, the same for all matrices: allocating formats takes minutes each time.
LADDER = ("int2", "int3", "int4")
#: Codes of 8 bits with a scale for each output: from here on nothing is gained by more.
_FINEST = 8.1
#: Bits per weight from which on trellis codes are not tried: integers of so many round as well.
_MANY_BITS = 5.5
#: A family is measured no further from this cost on, nats per token: such a model is of no use.
_USELESS = 4.0
#: Samples that trials of one amount are calibrated on, at most; finalists have all.
_SAMPLES = 32


@dataclass
class PlannedBytes:
    """Bytes of combinations, from headers. ``store``: of the result."""

    spec: Spec
    store: Store
    max_shard_size: int
    _known: dict[tuple[tuple[str, Any], ...], Weights | None] = field(default_factory=dict)

    def weights(self, choice: Choice) -> Weights | None:
        """The weights of a combination; None where a pass does not take what the others leave."""
        key = tuple(sorted(choice.items()))
        if key not in self._known:
            try:
                self._known[key] = self._weights(choice)
            except PassError:
                self._known[key] = None
        return self._known[key]

    def planned(self, entries: Sequence[Mapping[str, Any]]) -> Spec:
        """The checkpoint after passes. Raises `PassError` where one does not apply."""
        spec = self.spec
        for each in entries:
            entry = parse_pass(dict(each))
            instance = passes.get(entry.name)
            settings = instance.completed(entry.settings, ["calibration", "training"], self.store)
            spec = plan_pass(spec, instance, settings, self.store)
        return spec

    def bytes(self, spec: Spec) -> int:
        """Bytes of the weight files."""
        return planned_size(spec, self.store, self.max_shard_size).bytes

    def least(self, choice: Choice) -> int | None:
        """Fewest bytes of a combination; None where it cannot be made."""
        weights = self.weights(choice)
        return None if weights is None else weights.bytes(self.least_bits)

    @cached_property
    def least_bits(self) -> float:
        """Bits per weight of the smallest format, scales included, of the checkpoint's matrices."""
        return self.bits(CastSettings(weights="int2", group_size="channel", method="rtn"))

    def bits(self, settings: CastSettings) -> float:
        """Bits per weight of the checkpoint's matrices after a cast, scales included."""
        names = undecided(self.spec, CastSettings(bits=8))
        count = sum(self.spec.tensors[n].count for n in names)
        floats = sum(DTYPE_BITS[self.spec.tensors[n].dtype] * self.spec.tensors[n].count // 8 for n in names)
        cast = Cast().plan(self.spec, settings)
        return 8 * (self.bytes(cast) - self.bytes(self.spec) + floats) / count

    def _weights(self, choice: Choice) -> Weights:
        if "trellis" in choice:
            others: Choice = {f: a for f, a in choice.items() if f != "trellis"}
            if (weights := self.weights(others)) is None or self.store != "compact":
                raise PassError("only the compact store has trellis codes")
            self.planned([*Making("fast").smaller(others), trellis_cast(3)])
            return weights
        entries = Making("fast").smaller({f: a for f, a in choice.items() if f != "sparsity"})
        if "embeddings" in choice:
            entries.append(table_cast(self.spec, choice["embeddings"]))
        spec = self.planned(entries)
        names = undecided(spec, CastSettings(bits=8))
        count = sum(spec.tensors[n].count for n in names)
        floats = sum(DTYPE_BITS[spec.tensors[n].dtype] * spec.tensors[n].count // 8 for n in names)
        kept = 1 - float(choice["sparsity"]) if "sparsity" in choice else 1.0
        if kept < 1:
            if self.store != "compact":
                raise PassError("only the compact store has fewer bytes for removed weights")
            self.planned(Making("fast").smaller({"sparsity": choice["sparsity"]}))
        return Weights(count, self.bytes(spec) - floats, kept)


def table_cast(spec: Spec, amount: Concession) -> dict[str, Any]:
    """The cast of the tables alone."""
    return {"cast": {"weights": amount, "method": "rtn", "only": tables(spec)}}


def trellis_cast(bits: int) -> dict[str, Any]:
    """The cast of all matrices to trellis codes of one number of bits."""
    return {"cast": {"weights": f"trellis{bits}", "effort": "fast"}}


@dataclass
class Search:
    """A search within a bound.

    Attributes:
        most: bytes. settings: of the section `fit`. samples: number of calibration samples.
        curve, costs, trellis: as far as they are measured; the curves of integers and of trellis codes.
        left_out: family ▶ why it is not used.
    """

    most: int
    settings: Bound
    sizes: PlannedBytes
    trials: TrialRunner
    samples: int
    progress: Progress
    curve: Curve | None = None
    costs: dict[FamilyName, dict[Concession, float]] = field(default_factory=dict)
    left_out: dict[FamilyName, str] = field(default_factory=dict)
    trellis: Curve | None = None

    @property
    def spec(self) -> Spec:
        """The original's headers."""
        return self.sizes.spec

    def measure(self) -> list[Ranked]:
        """Measure bits and families, and rank the combinations that keep the bound.

        Raises:
            CompressError: none can; it names what the smallest takes.
        """
        self._measure_bits()
        first: list[FamilyName] = ["embeddings", "trellis"]  # they bound what the others may cost
        for family in sorted(self.settings.families, key=lambda f: first.index(f) if f in first else len(first)):
            if family == "trellis":
                self._measure_trellis()
            else:
                self._measure_family(family)
        ranking = self._ranked()
        if not ranking:
            raise self._hopeless()
        return ranking

    def ahead(self, *, every: bool) -> list[tuple[list[dict[str, Any]], int]]:
        """Trials that the search can make, as passes and number of samples, those of finalists last.

        Args:
            every: with all amounts of each family, in place of the least alone.
        """
        few = min(self.samples, _SAMPLES)
        trials = [([{"cast": {"weights": name, "effort": "fast"}}], few) for name in LADDER]
        for family in self.settings.families:
            possible = [a for a in amounts(family, self.spec) if self.sizes.weights({family: a}) is not None]
            trials += [(self._alone(family, amount), few) for amount in (possible if every else possible[:1])]
        whole = self.entries(self._keeps_the_bound(), Making("fast", self.settings.tokens))
        return [*trials, *[(whole, self.samples)] * self.settings.finalists]

    def _keeps_the_bound(self) -> Choice:
        """A combination that keeps the bound, of few families."""
        few: list[Choice] = [{}]
        if "embeddings" in self.settings.families:
            few += [{"embeddings": name} for name in amounts("embeddings", self.spec)]
        few += self._extremes()
        return next(choice for choice in few if (least := self.sizes.least(choice)) is not None and least <= self.most)

    def final(self, ranking: Sequence[Ranked]) -> list[tuple[Ranked, Tried]]:
        """The finalists, tried whole, the best first."""
        making, done = Making("fast", self.settings.tokens), []
        chosen = finalists(ranking, self.settings.finalists, lambda one: self._planned(one, making))
        for number, one in enumerate(chosen, 1):
            self._say(f"finalist {number} of {len(chosen)}: {text(one.choice, self.spec)}, {one.bits:.2f} bits")
            tried = self.trials.run(self.entries(one.choice, making), self.samples, finalist=True)
            if tried.refused is None:
                self._say(f"  {tried.divergence:.4f} nats per token, {one.divergence:.4f} expected")
                done.append((one, tried))
            else:
                self._say(f"  refused: {tried.refused}")
        if not done:
            raise CompressError("no finalist keeps the bound", fix="allow more bytes, or name fewer families")
        return sorted(done, key=lambda pair: pair[1].divergence)

    def _planned(self, one: Ranked, making: Making) -> bool:
        """Whether the exact plan of a combination keeps the bound; near the smallest formats its bits are a guess."""
        try:
            return self.sizes.bytes(self.sizes.planned(self.entries(one.choice, making))) <= self.most
        except PassError:
            return False

    def entries(self, choice: Choice, making: Making) -> list[dict[str, Any]]:
        """The passes of a combination within the bound."""
        weights = self.sizes.weights(choice)
        assert weights is not None
        smaller = making.smaller(choice)
        if self.sizes.bytes(self.sizes.planned(smaller)) <= self.most:
            return smaller
        return [*smaller, making.cast(choice, tables(self.spec), {"max_bytes": self.most})]

    def alone(self, choice: Choice, bits: float | None = None) -> int:
        """Bytes of a combination with so many bits per weight; None for the original's floats."""
        weights = self.sizes.weights(choice)
        assert weights is not None
        return weights.bytes(_float_bits(self.spec) if bits is None else bits)

    def paid(self, choice: Choice) -> list[dict[str, Any]]:
        """The price of each family of a combination: its amount, bytes at the combination's bits, and divergence."""
        weights = self.sizes.weights(choice)
        assert weights is not None
        bits = weights.bits(self.most)
        rows = []
        for family, amount in choice.items():
            if family == "trellis":
                continue
            without = self.sizes.weights({f: a for f, a in choice.items() if f != family})
            assert without is not None
            spared = without.bytes(bits) - weights.bytes(bits)
            rows.append({"family": family, "amount": amount, "bytes": spared, "divergence": self.costs[family][amount]})
        dense = self.alone({f: a for f, a in choice.items() if f != "sparsity"})
        codes, cost = "trellis" if "trellis" in choice else "bits", self.curve_of(choice).at(bits)
        rows.append({"family": codes, "amount": bits, "bytes": dense - self.most, "divergence": cost})
        return rows

    def require_possible(self) -> None:
        """Raise `CompressError` if no combination keeps the bound; it names the least that the families reach."""
        least = min(filter(None, (self.sizes.least(c) for c in self._extremes())), default=None)
        if least is None or least > self.most:
            raise self._hopeless()

    def _extremes(self) -> list[Choice]:
        """The largest amounts that go together, family by family."""
        choice: dict[FamilyName, Concession] = {}
        largest: list[Choice] = [{}]
        for family in self.settings.families:
            for amount in reversed(amounts(family, self.spec)):
                if self.sizes.weights({**choice, family: amount}) is not None:
                    choice[family] = amount
                    largest.append(dict(choice))
                    break
        return largest

    def _measure_bits(self) -> None:
        whole = self.sizes.weights({})
        if whole is None:
            raise CompressError(f"{model_map(self.spec).record.head or 'this model'} has no matrices that take codes")
        points = []
        for name in LADDER:
            settings = {"weights": name, "effort": "fast"}
            bits = self.sizes.bits(CastSettings.model_validate(settings))
            tried = self._try(f"{name}, {bits:.2f} bits per weight", [{"cast": settings}])
            if tried is not None:
                points.append((bits, tried.divergence))
        if not points:
            raise CompressError("no bits per weight could be measured")
        self.curve = Curve(tuple(points))

    def _measure_family(self, family: FamilyName) -> None:
        """Measure a family's amounts as long as one of them could pay."""
        measured: dict[Concession, float] = {}
        self.costs[family] = measured
        before = math.inf
        for amount in amounts(family, self.spec):
            if self.sizes.weights({family: amount}) is None:
                continue
            best = self._best()
            if measured and at_least(family, measured, amount, self.spec) >= min(best, _USELESS):
                break
            tried = self._try(text({family: amount}, self.spec), self._alone(family, amount))
            if tried is None:
                self.left_out.setdefault(family, "its pass refuses this model")
                continue
            cost = tried.divergence
            if cost >= min(best, _USELESS):
                if not measured:
                    self.left_out[family] = (
                        f"{text({family: amount}, self.spec)}: {cost:.4f} nats per token, and what keeps the bound costs "
                        + (f"{best:.4f}" if math.isfinite(best) else "less")
                    )
                break
            measured[amount] = cost
            if before <= self._best() < math.inf:
                break  # more of it does not pay
            before = self._best()
        if not measured:
            del self.costs[family]
            self.left_out.setdefault(family, "this model has nothing to give up there")

    def _measure_trellis(self) -> None:
        """Measure trellis codes of about as many bits as the best combination so far has."""
        ranking = self._ranked()
        bits = ranking[0].bits if ranking else self.sizes.least_bits
        if self.sizes.weights({"trellis": TRELLIS}) is None:
            self.left_out["trellis"] = "this model's matrices, or its store, take no trellis codes"
        elif bits > _MANY_BITS:
            self.left_out["trellis"] = f"{bits:.2f} bits per weight are enough for integers"
        else:
            entries = [trellis_cast(min(4, max(2, round(bits))))]
            stored = self.sizes.bits(CastSettings.model_validate(entries[0]["cast"]))
            tried = self._try(f"{entries[0]['cast']['weights']}, {stored:.2f} bits per weight", entries)
            if tried is not None:
                self.trellis = Curve(((stored, tried.divergence),))

    def curve_of(self, choice: Choice) -> Curve:
        """The curve of a combination's codes."""
        curve = self.trellis if "trellis" in choice else self.curve
        assert curve is not None
        return curve

    def _alone(self, family: FamilyName, amount: Concession) -> list[dict[str, Any]]:
        if family == "trellis":
            return [trellis_cast(3)]
        if family == "embeddings":
            return [table_cast(self.spec, amount)]
        return Making("fast").smaller({family: amount})

    def _try(self, what: str, entries: list[dict[str, Any]]) -> Tried | None:
        """A trial of one amount; None where a pass refused."""
        tried = self.trials.run(entries, min(self.samples, _SAMPLES))
        self._say(f"{what}: " + (tried.refused or f"{tried.divergence:.4f} nats per token"))
        return tried if tried.refused is None else None

    def _best(self) -> float:
        ranking = self._ranked()
        return ranking[0].divergence if ranking else math.inf

    def _ranked(self) -> list[Ranked]:
        costs = {f: c for f in self.settings.families if (c := self.costs.get(f))}
        if self.trellis is not None:
            costs["trellis"] = {TRELLIS: 0.0}
        return ranked(costs, self.curve_of, self.sizes.weights, self.most, self.sizes.least_bits)

    def _hopeless(self) -> CompressError:
        least = min(filter(None, (self.sizes.least(c) for c in self._extremes())), default=None)
        least_text = "" if least is None else f": {format_bytes(least)} is the least that the families reach together"
        return CompressError(
            f"no combination keeps {format_bytes(self.most)}{least_text}", where="fit.max_bytes", fix="allow more bytes"
        )

    def _say(self, line: str) -> None:
        self.progress.message(line)


def _float_bits(spec: Spec) -> int:
    names = undecided(spec, CastSettings(bits=8))
    return max(DTYPE_BITS[spec.tensors[n].dtype] for n in names)
