"""Repetition: the loss on a passage that comes again. A model that sees the first time copies it, one that does not cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, ReportError
from compress.evaluation.metrics.base import MetricOfPasses, Resampling, Scored
from compress.evaluation.repetition_settings import RepetitionSettings
from compress.formatting import signed
from compress.settings import Settings
from compress.statistics import Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from compress.progress import Progress


class Repetition(MetricOfPasses):
    """The mean loss of the repeated tokens but the first of each passage, which nothing announces."""

    name = "repetition"
    title = "repetition"
    place = 35
    evaluations = {"evaluation": "Mean loss on passages that come again, over all distances, nats per token."}
    lower = True
    nullable = True
    gate = "repetition"
    help = "Loss on a passage that comes again at a distance, nats per token."
    unit = "nats"
    settings = RepetitionSettings

    def value(self, evaluation: Scored) -> float | None:
        repetition = evaluation.get("repetitions")
        return None if repetition is None else float(_mean([column.sum() for column in _columns(repetition)]))

    def at(self, evaluation: Scored, place: int) -> Scored:
        """The evaluation with one distance alone."""
        repetition = evaluation.get("repetitions") or {"distances": []}
        rows = [row for row in repetition["distances"] if row["distance"] == place]
        if not rows:
            known = ", ".join(str(row["distance"]) for row in repetition["distances"]) or "none"
            raise ReportError(f"repetition was not measured at the distance {place}", fix=f"measured: {known}")
        return {**evaluation, "repetitions": {**repetition, "distances": rows}}

    def level(self, evaluation: Scored, resampling: Resampling) -> Interval:
        return resampling.sums(_mean, _columns(self._measured(evaluation)))

    def increase(self, before: Scored, after: Scored, resampling: Resampling, *, relative: bool) -> Interval:
        first, last = self._measured(before), self._measured(after)
        if _sizes(first) != _sizes(last):
            raise ReportError("the two evaluations repeat other passages, or at other distances")

        def change(sums: Any) -> Any:
            x, y = _mean(sums[:2]), _mean(sums[2:])
            return y / x - 1 if relative else y - x

        return resampling.sums(change, [*_columns(first), *_columns(last)])

    def paired(self, before: Scored, after: Scored, resampling: Resampling) -> dict[str, Any] | None:
        first, last = before.get(self.name), after.get(self.name)
        if first is None or last is None or _sizes(before["repetitions"]) != _sizes(after["repetitions"]):
            return None
        interval = self.increase(before, after, resampling, relative=False)
        return {
            "nats": interval.value,
            "lower": interval.lower,
            "upper": interval.upper,
            "units": interval.units,
            "unit": "sample",
        }

    def units(self, evaluation: Scored) -> str:
        return "samples"

    def rows(self, before: Scored, after: Scored) -> list[tuple[str, str, str, str]]:
        first, last = before.get("repetitions"), after.get("repetitions")
        if first is None or last is None or _sizes(first) != _sizes(last):
            return []
        cells = []
        for x, y in zip(first["distances"], last["distances"], strict=True):
            old, new = x["nats_per_token"], y["nats_per_token"]
            change = f"{signed(new - old, 4)} nats per token"
            cells.append((f"repetition at {x['distance']:,}", self.text(old), self.text(new), change))
        return cells

    def check(self, settings: Settings, *, window: int, positions: int | None) -> None:
        assert isinstance(settings, RepetitionSettings)
        passage, distances = settings.fitted(window)
        if positions is not None and distances[-1] + passage > positions:
            raise CompressError(
                f"a passage of {passage} tokens that comes again after {distances[-1]:,} takes "
                f"{distances[-1] + passage:,} positions, the model has {positions:,}",
                where="evaluate.repetition",
                fix=f"name `distances` up to {positions - passage:,}",
            )

    def check_data(self, processor: Any, documents: Sequence[Any], settings: Settings, *, window: int) -> None:
        from compress.evaluation.repetition import passages

        assert isinstance(settings, RepetitionSettings)
        passages(processor, documents, settings, window)

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
        from compress.evaluation.repetition import measure_repetition

        assert isinstance(settings, RepetitionSettings)
        measured = measure_repetition(
            model, processor, documents, settings, window=window, reference=reference, progress=progress
        )
        return {"repetitions": measured}

    def _measured(self, evaluation: Scored) -> Mapping[str, Any]:
        repetition: Mapping[str, Any] | None = evaluation.get("repetitions")
        if repetition is None:
            raise ReportError("repetition was not measured", fix="name it in `evaluate`")
        return repetition


def _sizes(repetition: Mapping[str, Any]) -> list[tuple[int, list[int]]]:
    return [(row["distance"], [sample["tokens"] for sample in row["samples"]]) for row in repetition["distances"]]


def _columns(repetition: Mapping[str, Any]) -> list[NDArray[np.float64]]:
    """Sums of nats and of tokens over the distances, of each sample, [samples] each."""
    import numpy as np

    rows = [row["samples"] for row in repetition["distances"]]
    return [
        np.array([[sample[key] for sample in row] for row in rows], dtype=np.float64).sum(0)
        for key in ("nll", "tokens")
    ]


def _mean(sums: Any) -> Any:
    """Nats per token of the sums of `_columns`, [2] or [2, draws]."""
    return sums[0] / sums[1]
