"""The state of one run: its recipe, the opened original, the plan, the data sets and the run folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import passes
from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.distributed import ProcessGroup
from compress.errors import ResourceError
from compress.evaluation.tasks import TEXT_METRICS, is_seq2seq, task_of
from compress.files import place
from compress.pipeline.datasets import DataSets
from compress.pipeline.fingerprint import fingerprint, hash_input, stage_fingerprint, versions
from compress.pipeline.folder import RunFolder
from compress.pipeline.hub_data import check_hub_data, with_hub_data
from compress.pipeline.machine import resolve_device
from compress.pipeline.preflight import check_folders, check_plan, check_sets, check_window
from compress.pipeline.shared import SharedWork
from compress.pipeline.trackers import check_trackers
from compress.planning import PlannedPass, PlannedStage, make_plan
from compress.progress import Progress
from compress.recipe import resolved

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.checkpoint.open import Stored
    from compress.recipe import Recipe


@dataclass
class Run:
    """The state of one run.

    Attributes:
        recipe: with the metrics that fit the model, once it is open. fresh: compute every stage and measurement anew.
        processes: of torchrun; one otherwise. shared: work that other runs share; None without.
        notes: sentences for the report.
        original, data, plan: known once `open` has returned.
        predicted: seconds of the stages to compute, by number; None where it is not known.
        keys: names of the stages in the run folder. files: those of the last stage, as its record lists them.
    """

    recipe: Recipe
    progress: Progress
    fresh: bool = False
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    shared: SharedWork | None = None
    notes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    predicted: dict[int, float | None] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output = place(self.recipe.output)
        self.folder = RunFolder.of(self.output, None if self.fresh else self.shared)
        self.device = resolve_device(self.recipe.device)

    @property
    def measures(self) -> bool:
        """Whether anything is measured after the stages."""
        return bool(self.recipe.metrics)

    @property
    def parts(self) -> int:
        """Number of stages, and one for the evaluation if there is one; known once `open` has returned."""
        return len(self.plan.stages) + self.measures

    def open(self) -> None:
        """Open the recipe's model and make the plan. Raises `CompressError` where a pass does not apply."""
        recipe = self.recipe
        self.original = self.open_other(recipe.reference)
        assert self.original.folder is not None
        spec = self.original.spec
        self.notes += spec.notes
        self.recipe = recipe = with_hub_data(recipe).fitted(task_of(spec.structure.class_name))
        self.data = DataSets(recipe, self.original.folder, spec.structure, model_map(spec).positions)
        self.plan = make_plan(recipe, spec, self.original.metadata)
        if (note := self._targets_note()) is not None:
            self.notes.append(note)

    def _targets_note(self) -> str | None:
        """A sentence where an encoder-decoder is calibrated on plain text; None elsewhere."""
        section, structure = self.recipe.data.calibration, self.original.spec.structure
        passes_ = (p for stage in self.plan.stages for p in stage.passes)
        if section is None or "calibration" not in needed_data(passes_) or not is_seq2seq(structure):
            return None
        if section.text is not None or section.sounds is not None:
            return None
        return (
            f"each plain text for calibration is both what {structure.class_name} reads and what it writes; for pairs name "
            "two columns: `text: [source, target]`"
        )

    def prepare(self) -> None:
        """Open, plan, and refuse a recipe that cannot run, before any work. Raises `CompressError`."""
        check_folders(self.recipe)
        check_sets(self.recipe)
        check_hub_data(self.recipe)
        check_trackers(self.recipe)
        self.open()
        check_plan(self.recipe, self.plan)
        check_window(self.recipe, self.original.spec)
        self.data.check_disjoint()
        for name in needed_data(p for stage in self.plan.stages for p in stage.passes):
            self.data.check_ids(name)

    def open_other(self, name: str | Path) -> Stored:
        """A checkpoint by folder or hub id, opened as the recipe allows."""
        recipe = self.recipe
        return open_checkpoint(
            name,
            trust_remote_code=recipe.trust_remote_code,
            ignore_auto_map=recipe.ignore_auto_map,
            offline=recipe.offline,
        )

    # ---- what can be refused once it is known which stages are missing ----

    def check_disk(self, missing: list[PlannedStage]) -> None:
        """Check that the file system has room for the missing stages. Raises `ResourceError`."""
        parent = self.output.absolute().parent
        while not parent.exists():
            parent = parent.parent
        need = sum(stage.size.bytes for stage in missing)
        if need > (free := shutil.disk_usage(parent).free):
            raise ResourceError(
                f"the run needs {need / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free",
                where=str(parent),
                fix="free some space, or see `compress clean`",
            )

    def check_samples(self, missing: list[PlannedStage]) -> None:
        """Check that the data of the missing stages can be drawn and that the tokenizer can show models the evaluation data."""
        planned = [p for stage in missing for p in stage.passes]
        for name in needed_data(planned):
            self.data.batches(name)
        if planned and TEXT_METRICS & set(self.recipe.metrics):
            self.data.check_shown(self.original.spec)

    # ---- fingerprints ----

    def fingerprints(self) -> list[str]:
        """A fingerprint for each stage; each covers all stages before it."""
        before = hash_input(self.original, self.folder.hashes())
        result = []
        for stage in self.plan.stages:
            before = self._fingerprint(stage, before)
            result.append(before)
        return result

    def _fingerprint(self, stage: PlannedStage, before: str) -> str:
        recipe, needed = self.recipe, needed_data(stage.passes)
        environment: dict[str, Any] = {
            "store": recipe.store,
            "max_shard_size": recipe.max_shard_size,
            "seed": recipe.seed,
            "versions": versions(),
        }
        if needed:
            environment |= {"device": self.device, "dtype": recipe.dtype}
        others = [name for p in stage.passes for name in passes.get(p.name).checkpoints(p.settings)]
        if others:
            environment["checkpoints"] = [
                hash_input(self.open_other(name), self.folder.hashes(f"inputs-{fingerprint(name)[:12]}"))
                for name in others
            ]
        return stage_fingerprint(
            before,
            [(p.name, p.settings.model_dump(mode="json")) for p in stage.passes],
            {name: self.data.fingerprint(name) for name in needed},
            environment,
        )

    def identity(self) -> str:
        """The fingerprint of the whole run: the recipe with every default, the stages and the evaluation data."""
        data = self.data.fingerprint("evaluation") if self.data.files("evaluation") else None
        return fingerprint([resolved(self.recipe), self.fingerprints(), data])


def needed_data(planned: Iterable[PlannedPass]) -> list[str]:
    """Names of the data sets that passes read, sorted."""
    return sorted(set().union(*(passes.get(p.name).required_data(p.settings) for p in planned)))
