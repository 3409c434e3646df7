"""Measures the original and every stage of a run, paired; measurements are kept in the run folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import passes
from compress.checkpoint.open import Stored, open_checkpoint
from compress.checkpoint.running import emulated
from compress.data.text import holds_ids
from compress.evaluation.scorer import Scorer
from compress.evaluation.tasks import SPEED_METRICS, TEXT_METRICS
from compress.pipeline.datasets import DataSets
from compress.pipeline.fingerprint import fingerprint, versions
from compress.pipeline.folder import RunFolder
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.recipe import Recipe


@dataclass
class Measurements:
    """Evaluations by checkpoint. ``original`` and ``original_latency`` are None where nothing was asked for."""

    recipe: Recipe
    data: DataSets
    folder: RunFolder
    device: str
    progress: Progress
    fresh: bool = False
    original: dict[str, Any] | None = None
    original_latency: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    _input: str = ""

    def add(self, original: Stored, rows: list[dict[str, Any]]) -> None:
        """Put ``evaluation`` and ``latency`` into each stage's row; latency of the last stage alone."""
        wanted = set(self.recipe.metrics)
        self._input = rows[0]["fingerprint"]  # covers the original's contents
        for row in rows:
            row["evaluation"] = row["latency"] = None
        if wanted & TEXT_METRICS and self.data.files("evaluation"):
            self._text(original, rows)
        if wanted & SPEED_METRICS:
            self._speed(original, rows[-1])

    def _key(self, *parts: Any) -> str:
        return fingerprint([*parts, self.device, self.recipe.dtype, versions()])[:24]

    def _text(self, original: Stored, rows: list[dict[str, Any]]) -> None:
        from compress.models.loading import load_checkpoint

        section = self.recipe.data.evaluation
        assert section is not None
        cached = section.quantized_kv_cache
        base = self._key("text", "emulated", cached, self.data.fingerprint("evaluation"))
        keys = [self._key(base, row["fingerprint"], row["content"]) for row in rows]
        names = [f"original-{self._key(base, self._input)}", *(f"stage-{key}" for key in keys)]
        found = [None if self.fresh else self.folder.cached(name) for name in names]
        if any(item is None for item in found):
            documents = self.data.documents("evaluation")
            if section.max_documents is not None:
                documents = documents[: section.max_documents]
            score = Scorer(
                original.spec.structure, self.data.folder, self.data.processor(), documents, section, self.progress
            )
            how: dict[str, Any] = {"dtype": self.recipe.dtype, "device": self.device, "quantized_kv_cache": cached}
            reference = load_checkpoint(original, **how)
            for i, name in enumerate(names):
                if found[i] is not None:
                    continue
                start = time.perf_counter()
                trust = self.recipe.trust_remote_code
                stored = original if i == 0 else open_checkpoint(rows[i - 1]["folder"], trust_remote_code=trust)
                model = reference if i == 0 else load_checkpoint(stored, **how)
                evaluation = score(
                    model,
                    None if i == 0 else reference,
                    "evaluate the original" if i == 0 else f"evaluate stage {i} of {len(rows)}",
                )
                evaluation["emulated"] = emulated(stored.spec, kv_cache=cached)
                measured = {"evaluation": evaluation, "seconds": round(time.perf_counter() - start, 3)}
                self.folder.cache(name, measured)
                found[i] = measured
                del model
        first, *others = found
        assert first is not None
        self.original = first["evaluation"]
        for row, item in zip(rows, others, strict=True):
            assert item is not None
            row["evaluation"] = item["evaluation"]
            row["seconds"] = {**row["seconds"], "evaluate": item["seconds"]}

    def _speed(self, original: Stored, row: dict[str, Any]) -> None:
        from compress.evaluation.latency import measure_latency

        name = f"speed-{self._key('speed', row['fingerprint'], row['content'])}"
        data = None if self.fresh else self.folder.cached(name)
        if data is None:
            assert original.folder is not None
            data = measure_latency(
                [original.folder, Path(row["folder"])],
                dtype=self.recipe.dtype,
                device=self.device,
                trust_remote_code=self.recipe.trust_remote_code,
                ignore_auto_map=self.recipe.ignore_auto_map,
                threads=self.recipe.threads,
                seed=self.recipe.seed,
                progress=self.progress,
            )
            self.folder.cache(name, data)
        stored = open_checkpoint(row["folder"], trust_remote_code=self.recipe.trust_remote_code)
        self.original_latency = data["original"]
        row["latency"] = {**data["candidate"], "left_out": emulated(stored.spec, kv_cache=True)}

    def data_summary(self) -> dict[str, Any]:
        """What text was used, for the report."""
        summary: dict[str, Any] = {"evaluation": None, "calibration": None}
        if self.original is not None:
            summary["evaluation"] = {
                "files": list(self.data.files("evaluation")),
                "sha256": self.data.fingerprint("evaluation"),
                "documents": len(self.original["documents"]),
                "unit": self.original["unit"],
            }
        if files := self.data.files("calibration"):
            section = self.recipe.data.calibration
            assert section is not None
            summary["calibration"] = {
                "files": list(files),
                "sha256": self.data.fingerprint("calibration"),
                "mode": "ids" if holds_ids(files[0]) else section.mode,
                "seed": self.recipe.seed,
                **(self._chosen() or dict.fromkeys(("samples", "length", "ids_sha256", "chosen"))),
            }
        return summary

    def _chosen(self) -> dict[str, Any] | None:
        """The calibration samples, kept beside the measurements; None where no pass of the recipe looks at them."""
        if not any("calibration" in passes.get(p.name).required_data(p.settings) for p in self.recipe.passes):
            return None
        name = f"calibration-{self._key(self.data.fingerprint('calibration'), self.recipe.seed, self._input)}"
        found = None if self.fresh else self.folder.cached(name)
        if found is None:
            drawn = self.data.batches("calibration")
            samples, length = drawn.ids.shape
            found = {"samples": samples, "length": length, "ids_sha256": drawn.sha256(), "chosen": list(drawn.chosen)}
            self.folder.cache(name, found)
        return found
