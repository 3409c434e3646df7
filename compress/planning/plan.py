"""The plan of a run: passes, stages, bytes, memory, time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.architectures.cache import cache_bytes
from compress.checkpoint.runtimes import runtimes_note
from compress.checkpoint.store import Store, with_storage
from compress.formatting import format_bytes
from compress.planning.sizes import Size, other_store
from compress.recipe.work import WorkBeside
from compress.spec.spec import Spec
from compress.tabular import Column, Shown, TextTable
from compress.work import Work, seconds_of

if TYPE_CHECKING:
    from compress.work import Rates


@dataclass(frozen=True)
class PlannedPass:
    """One pass of a plan.

    Attributes:
        index: number of the pass, from 0. name, settings: as in the recipe.
        spec: the checkpoint after the pass. size: its size in the recipe's store. other_store: in the other store, if it fits.
        peak_memory: resident bytes at the peak, the interpreter included. notes: one sentence each, for the user.
        work: what it computes and writes; None where that is not known.
    """

    index: int
    name: str
    settings: Any
    spec: Spec
    size: Size
    other_store: Size | None
    peak_memory: int
    notes: tuple[str, ...] = ()
    work: Work | None = None


@dataclass(frozen=True)
class PlannedStage:
    """Passes that run in one read and one write. ``index``: number of the stage, from 1."""

    index: int
    passes: tuple[PlannedPass, ...]

    @property
    def size(self) -> Size:
        """The size after the last of its passes."""
        return self.passes[-1].size


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The plan of a run.

    Attributes:
        original, original_spec: the recipe's model. store: where the result is written. stages: in order.
        peak_memory: resident bytes at the peak. lengths: at which bytes of the cache are shown. beside: work beside its passes.
    """

    original: Size
    original_spec: Spec
    store: Store
    stages: tuple[PlannedStage, ...]
    peak_memory: int
    lengths: tuple[int, ...]
    beside: WorkBeside

    def headline(self) -> str:
        """Bytes before and after, passes, peak memory."""
        before, after = self.original.bytes, self.stages[-1].size.bytes
        names = " ▶ ".join(p.name for stage in self.stages for p in stage.passes)
        return (
            f"{format_bytes(before)} ▶ {format_bytes(after)} (× {after / max(before, 1):.3f}), store: {self.store}; {names}; "
            f"peak memory about {format_bytes(self.peak_memory)}"
        )

    def tables(self) -> list[TextTable]:
        """A row for the original and each pass."""
        rows = [("original", *_cells(self.original), "")]
        for planned in (p for stage in self.stages for p in stage.passes):
            rows.append((planned.name, *_cells(planned.size), format_bytes(planned.peak_memory)))
        head: list[Column] = [("pass", "whole")]
        return [
            TextTable("", head + [(n, "right") for n in ("parameters", "bytes", "bits per weight", "memory")], rows)
        ]

    @property
    def disk(self) -> int:
        """Bytes of the weight files that the stages write into the run folder."""
        return sum(stage.size.bytes for stage in self.stages)

    @property
    def cache(self) -> list[dict[str, int]]:
        """Planned bytes of the cache at each length, of the original and of the result; empty where one is not known."""
        before, after = self.original_spec, self.stages[-1].passes[-1].spec
        rows = []
        for length in self.lengths:
            original, result = cache_bytes(before, length), cache_bytes(after, length)
            if original is not None and result is not None:
                rows.append({"length": length, "original": original, "result": result})
        return rows

    @property
    def opens(self) -> str | None:
        """A sentence on the runtimes that open the result; None where nothing like it was tried."""
        return runtimes_note(with_storage(self.stages[-1].passes[-1].spec, self.store))

    def to_dict(self, rates: Rates | None = None) -> dict[str, Any]:
        """JSON values, schema ``compress.plan/1``. ``rates``: of this machine, for the time of each pass."""
        return {
            "schema": "compress.plan/1",
            "store": self.store,
            "original": asdict(self.original),
            "notes": list(self.original_spec.notes),
            "cache": self.cache,
            "opens": self.opens,
            "seconds": self.beside.seconds(rates),
            "stages": [
                {
                    "index": stage.index,
                    "passes": [
                        {
                            "name": p.name,
                            "settings": p.settings.model_dump(mode="json"),
                            "planned": asdict(p.size),
                            "exact": p.spec.exact,
                            "bytes_by_store": {
                                self.store: p.size.bytes,
                                **({other_store(self.store): p.other_store.bytes} if p.other_store else {}),
                            },
                            "peak_memory": p.peak_memory,
                            "seconds": seconds_of(p.work, rates),
                            "notes": list(p.notes),
                        }
                        for p in stage.passes
                    ],
                }
                for stage in self.stages
            ],
            "peak_memory": self.peak_memory,
            "disk": self.disk,
        }


def _cells(size: Size) -> tuple[str, str, str]:
    return f"{size.parameters:,}", format_bytes(size.bytes), f"{size.bits_per_weight:.2f}"
