"""Evaluates the original and every stage of a run, paired; each evaluation is kept in the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import passes
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.running import emulated
from compress.data.kinds import holds_ids
from compress.evaluation.benchmarks import check_lm_eval, measure_tasks
from compress.evaluation.latency_settings import LatencySettings
from compress.evaluation.lm_eval_settings import LmEvalSettings
from compress.evaluation.scorer import Scorer
from compress.evaluation.tasks import OF_PASSES, SPEED_METRICS, TEXT_METRICS
from compress.files import sha256
from compress.models.processors import check_has_tokenizer
from compress.pipeline.datasets import DataSets
from compress.pipeline.fingerprint import fingerprint, hash_input, versions
from compress.pipeline.folder import RunFolder
from compress.progress import Progress
from compress.settings import Settings

if TYPE_CHECKING:
    from compress.recipe import Recipe


@dataclass
class Evaluations:
    """Evaluations of a run's checkpoints.

    Attributes:
        fresh: evaluate anew.
        original, original_latency, original_throughput, original_tasks: of the recipe's model; None where nothing was asked.
        notes: sentences for the report.
    """

    recipe: Recipe
    data: DataSets
    folder: RunFolder
    device: str
    progress: Progress
    fresh: bool = False
    original: dict[str, Any] | None = None
    original_latency: dict[str, Any] | None = None
    original_throughput: dict[str, Any] | None = None
    original_tasks: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    _input: str = ""

    def add(self, original: Stored, rows: list[dict[str, Any]]) -> None:
        """Put the results into the rows of the stages; all but ``evaluation`` are those of the last stage only."""
        wanted = set(self.recipe.metrics)
        for row in rows:
            row["evaluation"] = row["latency"] = row["throughput"] = row["lm_eval"] = None
        if wanted & TEXT_METRICS and self.data.files("evaluation"):
            self._evaluate(original, rows)
        if wanted & SPEED_METRICS:
            self._measure_speed(original, rows[-1])
        if "throughput" in wanted:
            self._measure_throughput(original, rows[-1])
        if "lm_eval" in wanted:
            rows[-1]["lm_eval"] = self._tasks(rows[-1]["content"], Path(rows[-1]["folder"]), compact=True)

    def begin(self, original: Stored) -> None:
        """Measure what needs no stage, before any: tasks of lm-eval on the original, which show whether their data are here."""
        self._input = hash_input(original, self.folder.hashes())
        if "lm_eval" in self.recipe.metrics:
            check_lm_eval(self._lm_eval)
            assert original.folder is not None
            check_has_tokenizer(original.folder)
            self.original_tasks = self._tasks(self._input, original.folder, compact=False)

    @property
    def _lm_eval(self) -> LmEvalSettings:
        settings = self.recipe.settings_of("lm_eval")
        assert isinstance(settings, LmEvalSettings)
        return settings

    def _tasks(self, content: str, folder: Path, *, compact: bool) -> dict[str, Any]:
        """Tasks of lm-eval on a checkpoint. ``compact``: it is one of this package, whose code may run."""
        settings = self._lm_eval
        files = [sha256(Path(task)) for task in settings.tasks if task.endswith(".yaml")]

        def measure() -> dict[str, Any]:
            self.progress.message(f"lm-eval: {', '.join(settings.tasks)} on {folder}")
            return measure_tasks(
                folder,
                settings,
                dtype=self.recipe.dtype,
                device=self.device,
                trust_remote_code=compact or self.recipe.trust_remote_code,
                offline=self.recipe.offline,
            )

        name = f"lm_eval-{self._key('lm_eval', content, settings.model_dump(mode='json'), files)}"
        return self.folder.cached(name, measure, fresh=self.fresh)

    def _key(self, *parts: Any) -> str:
        return fingerprint([*parts, self.device, self.recipe.dtype, versions()])[:24]

    def _evaluate(self, original: Stored, rows: list[dict[str, Any]]) -> None:
        section = self.recipe.data.evaluation
        assert section is not None
        measured = {name: settings.model_dump(mode="json") for name, settings in self._measured().items()}
        read = ("text", "emulated", section.quantized_kv_cache, self.data.fingerprint("evaluation"))
        base = self._key(*read, *([measured] if measured else []))
        evaluate = self._evaluator(original, rows)
        first = self.folder.cached(f"original-{self._key(base, self._input)}", lambda: evaluate(0), fresh=self.fresh)
        self.original = first["evaluation"]
        for number, row in enumerate(rows, 1):
            name = f"stage-{self._key(base, row['fingerprint'], row['content'])}"
            item = self.folder.cached(name, lambda number=number: evaluate(number), fresh=self.fresh)  # type: ignore[misc]
            row["evaluation"] = item["evaluation"]
            row["seconds"] = {**row["seconds"], "evaluate": item["seconds"]}

    def _measured(self) -> dict[str, Settings]:
        """Metrics that make forward passes of their own, with their settings."""
        chosen = {name: self.recipe.settings_of(name) for name in self.recipe.metrics if name in OF_PASSES}
        return {name: settings for name, settings in chosen.items() if settings is not None}

    def _evaluator(self, original: Stored, rows: list[dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
        """A function that evaluates the checkpoint of a number: 0 is the original, then the stages from 1."""
        from compress.models.loading import load_checkpoint

        section = self.recipe.data.evaluation
        assert section is not None
        rounded = section.quantized_kv_cache
        loading: dict[str, Any] = {
            "dtype": self.recipe.dtype,
            "device": self.device,
            "quantized_kv_cache": rounded,
        }

        @cache
        def reference() -> Any:
            return load_checkpoint(original, **loading)

        @cache
        def scorer() -> Scorer:
            documents = self.data.documents("evaluation")[: section.max_documents]
            return Scorer(
                original.spec.structure,
                self.data.folder,
                self.data.processor(),
                documents,
                section,
                self.progress,
                self._measured(),
            )

        def evaluate(number: int) -> dict[str, Any]:
            score, beside = scorer(), reference()
            start = time.perf_counter()
            if number == 0:
                score.check(original.spec)
                stored, evaluation = original, score(beside, None, "evaluate the original")
            else:
                stored = open_checkpoint(rows[number - 1]["folder"], trust_remote_code=self.recipe.trust_remote_code)
                score.check(stored.spec)
                title = f"evaluate stage {number} of {len(rows)}"
                evaluation = score(load_checkpoint(stored, **loading), beside, title)
            evaluation["emulated"] = emulated(stored.spec, kv_cache=rounded)
            return {"evaluation": evaluation, "seconds": round(time.perf_counter() - start, 3)}

        return evaluate

    def _measure_speed(self, original: Stored, row: dict[str, Any]) -> None:
        from compress.evaluation.latency import measure_latency
        from compress.evaluation.latency_lengths import with_planned

        lengths = self.recipe.settings_of("latency")
        assert isinstance(lengths, LatencySettings)

        def measure() -> dict[str, Any]:
            assert original.folder is not None
            return measure_latency(
                [original.folder, Path(row["folder"])],
                dtype=self.recipe.dtype,
                device=self.device,
                trust_remote_code=self.recipe.trust_remote_code,
                ignore_auto_map=self.recipe.ignore_auto_map,
                threads=self.recipe.threads,
                seed=self.recipe.seed,
                lengths=lengths,
                max_ram=self.recipe.max_ram,
                progress=self.progress,
            )

        asked = lengths.model_dump(mode="json") if lengths.lengths else None
        name = f"speed-{self._key('speed', row['fingerprint'], row['content'], *([asked] if asked else []))}"
        data = self.folder.cached(name, measure, fresh=self.fresh)
        stored = open_checkpoint(row["folder"], trust_remote_code=self.recipe.trust_remote_code)
        self.original_latency = with_planned(data["original"], original.spec)
        row["latency"] = {
            **with_planned(data["candidate"], stored.spec),
            "left_out": emulated(stored.spec, kv_cache=True),
        }

    def _measure_throughput(self, original: Stored, row: dict[str, Any]) -> None:
        from compress.pipeline.throughput import measure_throughput, throughput_settings

        settings = throughput_settings(self.recipe)
        assert settings is not None
        stored = open_checkpoint(row["folder"], trust_remote_code=self.recipe.trust_remote_code)
        exports = [[entry.name, entry.settings.model_dump(mode="json")] for entry in self.recipe.export]
        asked = (settings.model_dump(mode="json"), exports, self.recipe.threads, settings.variables)
        data = self.folder.cached(
            f"throughput-{self._key('throughput', row['fingerprint'], row['content'], *asked)}",
            lambda: measure_throughput(self.recipe, (original, stored), self.folder.path / "throughput", self.progress),
            fresh=self.fresh,
        )
        self.original_throughput, row["throughput"] = data["original"], data["candidate"]

    def data_summary(self) -> dict[str, Any]:
        """The data of the run, for the report."""
        summary: dict[str, Any] = {"evaluation": None, "calibration": None}
        if self.original is not None:
            summary["evaluation"] = {
                "files": self.data.names("evaluation"),
                "sha256": self.data.fingerprint("evaluation"),
                "documents": len(self.original["documents"]),
                "unit": self.original["unit"],
            }
        if files := self.data.files("calibration"):
            section = self.recipe.data.calibration
            assert section is not None
            summary["calibration"] = {
                "files": self.data.names("calibration"),
                "sha256": self.data.fingerprint("calibration"),
                "mode": "ids" if holds_ids(files[0]) else section.mode,
                "seed": self.recipe.seed,
                **(self._calibration() or dict.fromkeys(("samples", "length", "ids_sha256", "chosen"))),
            }
        return summary

    def _calibration(self) -> dict[str, Any] | None:
        """The calibration samples, kept beside the evaluations; None where no pass of the recipe reads them."""
        if not any("calibration" in passes.get(p.name).required_data(p.settings) for p in self.recipe.passes):
            return None

        def describe() -> dict[str, Any]:
            drawn = self.data.batches("calibration")
            samples, length = drawn.ids.shape
            return {"samples": samples, "length": length, "ids_sha256": drawn.sha256(), "chosen": list(drawn.chosen)}

        name = f"calibration-{self._key(self.data.fingerprint('calibration'), self.recipe.seed, self._input)}"
        return self.folder.cached(name, describe, fresh=self.fresh)
