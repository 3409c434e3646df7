"""One pass outside a run: a recipe of one pass whose stage is written to the output, without gates, report or run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architectures.unforeseen import refused
from compress.errors import DataError, PassError
from compress.files import expanded
from compress.pipeline.machine import check_dtype
from compress.pipeline.publish import check_absent
from compress.pipeline.stages import apply_stage
from compress.pipeline.state import Run

if TYPE_CHECKING:
    import torch

    from compress.data.batches import Batches
    from compress.progress import Progress
    from compress.recipe import Recipe


@dataclass(frozen=True)
class GivenIds:
    """Token ids that stand for every data set: integers [samples, length], cut to ``samples`` and ``length``."""

    ids: torch.Tensor
    samples: int | None = None
    length: int | None = None

    def batches(self, run: Run, name: str) -> Batches:
        """The samples, for the data set ``name``. Raises `DataError` where the model cannot read them."""
        from compress.data import batches, pairs, token_ids

        assert run.data.structure is not None
        drawn = batches.first(token_ids.given_ids(self.ids), self.samples, self.length, "data")
        batches.check_vocabulary(drawn, run.data.structure.config.get("vocab_size"))
        batches.check_positions(drawn.ids.shape[1], run.data.positions, name=name)
        start = run.data.start()
        return drawn if start is None else pairs.with_targets(drawn, start)


@dataclass(frozen=True)
class GivenInputs:
    """Arguments of the model's forward by name, which stand for every data set; see `given_inputs`."""

    values: Mapping[str, torch.Tensor]
    samples: int | None = None

    def batches(self, run: Run, name: str) -> Batches:
        """The samples, for the data set ``name``. Raises `DataError` where the model cannot read them."""
        from compress.data import batches
        from compress.data.given_inputs import given_inputs

        assert run.data.structure is not None
        if name == "training":
            raise DataError("inputs by name are for calibration", where="data", fix="give text files or token ids")
        drawn = given_inputs(self.values, self.samples)
        if drawn.ids is drawn.values.get("input_ids"):
            batches.check_vocabulary(drawn, run.data.structure.config.get("vocab_size"))
            batches.check_positions(drawn.ids.shape[1], run.data.positions, name=name)
        return drawn


def apply_pass(recipe: Recipe, progress: Progress, given: GivenIds | GivenInputs | None) -> dict[str, Any]:
    """Apply the one pass of a recipe to its model and write the output, which must not exist.

    Args:
        given: token ids or inputs in place of the recipe's data.

    Returns:
        Details of the pass for a report, JSON values.

    Raises:
        CompressError: the pass does not apply, or the output cannot be written.
    """
    check_dtype(recipe.dtype)
    run, model = Run(recipe, progress), expanded(recipe.reference)
    check_absent(run.output, model if model.exists() else None)
    name = recipe.passes[0].name

    def batches(data_set: str) -> Batches:
        if given is not None:
            return given.batches(run, data_set)
        if getattr(run.recipe.data, data_set) is None:
            raise DataError(f"{name} needs {data_set} data", fix="give data=, text files or token ids")
        return run.data.batches(data_set)

    try:
        run.open()
        (stage,) = run.plan.stages
        with tempfile.TemporaryDirectory(prefix="compress-") as work, refused(run.original.spec, name):
            applied = apply_stage(run, stage, run.original, work=Path(work), folder=run.output, data=batches)
    except PassError as error:
        if error.where == f"passes.0.{name}":  # the user wrote no recipe
            error.where = None
        raise
    ((_, _, details),) = applied.passes
    return dict(details)
