"""A metric of evaluations: its value, its intervals, its gate, and how reports show it. Imports neither torch nor numpy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from compress import statistics
from compress.errors import ReportError
from compress.formatting import fixed, percent, signed, signed_percent
from compress.settings import Settings
from compress.statistics import Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compress.progress import Progress

#: Kinds of evaluations; each has a schema ``compress.KIND/1``. ``evaluation`` is that of causal language models.
Kind: TypeAlias = Literal["evaluation", "classification", "masked", "embeddings"]
#: An evaluation as reports hold it: ``unit``, ``documents`` (a row of sums per document or example), and more by kind.
Scored: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Resampling:
    """Settings of intervals: one-sided confidence, number of bootstrap draws, and their seed."""

    confidence: float = 0.95
    bootstrap: int = 10_000
    seed: int = 0

    def sums(self, statistic: Callable[[Any], Any], columns: Sequence[NDArray[np.float64]]) -> Interval:
        """Bootstrap interval of a statistic of the columns' sums, [columns] or [columns, draws]."""
        return statistics.resample(statistic, columns, self.confidence, self.bootstrap, self.seed)

    def draws(self, statistic: Callable[[Any], Any], units: int) -> Interval:
        """Bootstrap interval of a statistic of the draws: counts of each unit, [units, draws], to values [draws]."""
        return statistics.bootstrap_statistic(statistic, units, self.confidence, self.bootstrap, self.seed)


class Metric(ABC):
    """A metric of evaluations. A subclass in a file of this folder, or an entry point ``compress.metrics``, registers it.

    Attributes:
        name: key in evaluations, recipes and gates.
        title: name in summaries. row: name in the table before ▶ after; by default the title.
        place: position among the metrics.
        evaluations: kinds of evaluations that have it, and its description in the schema of reports.
        default: kinds of evaluations that measure it by default.
        lower: lower is better.
        compares: it compares with the original model, whose own value is perfect.
        labelled: it needs labelled data.
        nullable: an evaluation may lack its value.
        gate: bounds of its gate: ``increase`` (max, max_increase), ``divergence`` (max), ``agreement`` or ``score`` (both
            min, max_drop), ``repetition`` (as ``increase``, at a distance). help: description of the gate.
        unit: unit of levels. decimals: of levels; None for shares, which are shown as percentages.
        settings: model of its settings in a recipe, all with defaults; None for a metric without settings.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    row: ClassVar[str] = ""
    place: ClassVar[int] = 1000
    evaluations: ClassVar[Mapping[Kind, str]]
    default: ClassVar[frozenset[Kind]] = frozenset()
    lower: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    labelled: ClassVar[bool] = False
    nullable: ClassVar[bool] = False
    gate: ClassVar[Literal["increase", "divergence", "agreement", "score", "repetition"]]
    help: ClassVar[str]
    unit: ClassVar[str] = "share"
    decimals: ClassVar[int | None] = 4
    settings: ClassVar[type[Settings] | None] = None

    @abstractmethod
    def value(self, evaluation: Scored) -> float | None:
        """Value over all documents; None if the rows lack what it needs."""

    @abstractmethod
    def level(self, evaluation: Scored, resampling: Resampling) -> Interval:
        """Value with its interval. Raises `ReportError` if the rows lack what it needs."""

    def increase(self, before: Scored, after: Scored, resampling: Resampling, *, relative: bool) -> Interval:
        """Paired increase from ``before`` to ``after``, absolute or as a share of ``before``. For `lower` metrics.

        Raises:
            ReportError: the evaluations differ in documents or windows.
        """
        raise ReportError(f"an increase of {self.name} is not defined")

    def drop(self, before: Scored, after: Scored, resampling: Resampling) -> Interval:
        """Paired drop from ``before`` to ``after`` in points (1/100). For metrics of which higher is better.

        Raises:
            ReportError: the evaluations differ in documents.
        """
        raise ReportError(f"a drop of {self.name} is not defined")

    def paired(self, before: Scored, after: Scored, resampling: Resampling) -> dict[str, float] | None:
        """Entry of ``paired`` in the output of ``compress eval``: its relative increase, its drop, or its level."""
        if self.compares:
            key, interval = "value", self.level(after, resampling)
        elif self.lower:
            key, interval = "increase", self.increase(before, after, resampling, relative=True)
        else:
            key, interval = "drop", self.drop(before, after, resampling)
        return {key: interval.value, "lower": interval.lower, "upper": interval.upper}

    def at(self, evaluation: Scored, place: int) -> Scored:
        """The evaluation at one place alone, such as a distance. Raises `ReportError` if it was not measured there."""
        raise ReportError(f"{self.name} is not measured at a place")

    @property
    def perfect(self) -> float:
        """The original's own level, of a metric that compares with the original."""
        return 0.0 if self.lower else 1.0

    def text(self, value: float) -> str:
        """A level as text."""
        return percent(value) if self.decimals is None else fixed(value, self.decimals)

    def rounded(self, value: float) -> float:
        """A finite level with the digits of its text."""
        return float(fixed(value, 4 if self.decimals is None else self.decimals).replace(",", ""))

    def cost(self, before: float, after: float) -> float:
        """How much worse ``after`` is: the increase, or the drop in points."""
        return (after - before if self.lower else -100 * (after - before)) + 0.0

    def cost_text(self, cost: float) -> str:
        """A cost as text."""
        return signed(cost, self.decimals or 0) if self.lower else f"{signed(cost, 2)} points"

    def cells(self, before: Scored, after: Scored) -> tuple[str, str, str, str] | None:
        """Row of the table before ▶ after: name, both values, change; None if a value is missing."""
        x, y = before.get(self.name), after.get(self.name)
        if x is None or y is None:
            return None
        change = f"{signed(100 * (y - x), 2)} points" if not self.lower else signed_percent(y / x - 1) if x else ""
        return self.row or self.title, self.text(x), self.text(y), change

    def rows(self, before: Scored, after: Scored) -> list[tuple[str, str, str, str]]:
        """Rows of the table before ▶ after."""
        cells = self.cells(before, after)
        return [] if cells is None else [cells]

    def units(self, evaluation: Scored) -> str:
        """Plural of the unit that intervals resample."""
        return f"{evaluation['unit']}s"


class MetricOfPasses(Metric):
    """A metric with settings that makes forward passes of its own, as rows of documents are not enough for it."""

    settings: ClassVar[type[Settings]]

    @abstractmethod
    def check(self, settings: Settings, *, window: int, positions: int | None) -> None:
        """Check the settings before any work. Raises `CompressError`.

        Args:
            window: tokens of a window of the evaluation. positions: of the model, None for any number.
        """

    @abstractmethod
    def check_data(self, processor: Any, documents: Sequence[Any], settings: Settings, *, window: int) -> None:
        """Check by the tokenizer alone that it can be measured on the documents. Raises `DataError`."""

    @abstractmethod
    def measure(
        self,
        model: Any,
        processor: Any,
        documents: Sequence[Any],
        settings: Settings,
        *,
        window: int,
        reference: Any,
        progress: Progress,
    ) -> dict[str, Any]:
        """Keys to add to an evaluation, before its value is computed.

        Args:
            window: tokens of a window of the evaluation. reference: model to compare with, or None.
        """


def check_paired(before: Scored, after: Scored, *, tokens: bool) -> None:
    """Check that two evaluations have the same documents and windows and, for metrics per ``tokens``, the same tokens.

    Raises:
        ReportError: they differ.
    """
    for key in ("unit", "window", "stride", "streaming", "labels", "pooling"):
        if (before.get(key) or None) != (after.get(key) or None):
            raise ReportError(f"the two evaluations differ in {key}: {before.get(key)} and {after.get(key)}")
    same = ("id", "bytes", "label", "score")
    names = [[[d.get(key) for key in same] for d in e["documents"]] for e in (before, after)]
    if names[0] != names[1]:
        raise ReportError("the two evaluations are of different documents")
    if tokens and not same_tokens(before, after):
        raise ReportError("the two models split the text into different tokens", fix="compare bits_per_byte")


def same_tokens(before: Scored, after: Scored) -> bool:
    """Whether the scored tokens of every document are as many in both evaluations."""
    first, second = ([d.get("tokens") for d in e["documents"]] for e in (before, after))
    return first == second


def column(evaluation: Scored, key: str) -> NDArray[np.float64]:
    """One value of every row, float64 [documents]. Raises `ReportError` if a row has none."""
    import numpy as np

    rows = evaluation["documents"]
    if any(row[key] is None for row in rows):
        raise ReportError("the evaluation was made without a model to compare with")
    return np.array([row[key] for row in rows], dtype=np.float64)


def is_examples(evaluation: Scored) -> bool:
    """Whether rows are labelled examples or embedded texts, not sums over tokens."""
    return bool(evaluation["unit"] == "example")
