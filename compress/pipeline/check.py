"""The checks of a recipe that need no weights: its folders, its columns, and its plan if its model is a local folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_headers
from compress.data.kinds import holds_ids
from compress.evaluation.tasks import task_of
from compress.files import expanded
from compress.pipeline.hub_data import check_hub_data, with_hub_data
from compress.pipeline.preflight import (
    check_chats,
    check_folders,
    check_ids,
    check_plan,
    check_sets,
    check_tokenizer,
    check_window,
    hopeless_gates,
)
from compress.planning import make_plan
from compress.recipe.located import Located
from compress.tabular import Shown

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.spec.spec import Structure


@dataclass(frozen=True, repr=False)
class CheckResult(Shown):
    """A recipe without mistakes.

    Attributes:
        recipe: with the defaults that depend on its model. notes: a sentence each, such as what of the data was compared.
        local: whether its model is a local folder, so that its passes were checked against it.
    """

    recipe: Recipe
    notes: tuple[str, ...]
    local: bool

    def lines(self, name: str) -> list[str]:
        """The result as lines of text, the first of which begins with the recipe's name."""
        model = self.recipe.model
        hint = "" if self.local else f" (no folder {model} here: read as a hub id, passes were not checked against it)"
        return [f"{name}: no mistakes found{hint}", *self.notes]

    def headline(self) -> str:
        """No mistakes found, what was not checked, and the notes."""
        return "; ".join(self.lines(f"{self.recipe.model} ▶ {self.recipe.output}"))


def check(recipe: Recipe, *, data: bool = False) -> CheckResult:
    """Check a recipe. Raises `CompressError` with the first mistake, at its line where the recipe came from a file.

    Args:
        data: read the text too, and search for evaluation text in training and calibration text.
    """
    local = expanded(recipe.reference)
    notes: list[str] = []
    structure: Structure | None = None
    with Located(recipe):
        check_folders(recipe)
        check_sets(recipe)
        check_hub_data(recipe)
        if local.exists():
            spec, metadata = open_headers(
                local, trust_remote_code=recipe.trust_remote_code, ignore_auto_map=recipe.ignore_auto_map
            )
            structure, planned = spec.structure, make_plan(recipe, spec, metadata)
            check_plan(recipe, planned)
            notes += [*spec.notes, *hopeless_gates(recipe, planned)]
            recipe = recipe.fitted(task_of(structure.class_name))
            check_window(recipe, spec)
            check_tokenizer(recipe, local)
        check_ids(recipe, model_map(spec).positions if local.exists() else None)
        notes += _read_data(recipe, structure, data)
    return CheckResult(recipe, tuple(notes), local.exists())


def _read_data(recipe: Recipe, structure: Structure | None, everything: bool) -> list[str]:
    """Read labelled texts and images, and with ``everything`` all text. Returns sentences about what was compared.

    Raises:
        DataError: the model does not have a label of the data, or evaluation and passes share text.
    """
    recipe = with_hub_data(recipe) if everything else recipe
    evaluation = recipe.data.evaluation
    labelled = structure is not None and evaluation is not None and evaluation.given != "text"
    if not labelled and not everything:
        return []
    from compress.pipeline.datasets import DataSets  # half of a start-up, and rarely needed

    data = DataSets(recipe, expanded(recipe.reference), structure)
    if labelled:
        data.documents("evaluation")
    if not everything:
        return []
    if structure is None and recipe.data.needs_model:
        return ["data: not read, because labels and classes come from the model, which is not a local folder"]
    compared = data.check_disjoint(ids=False)
    for name in ("training", "calibration", "evaluation"):
        if (files := data.files(name)) and not holds_ids(files[0]):
            documents = data.documents(name)
            if structure is not None:
                check_chats(data.folder, documents)
    counts = [f"data: {len(data.documents('evaluation')):,} documents of evaluation"] if evaluation is not None else []
    counts += [f"{len(data.documents(name)):,} of {name}, none shared" for name in compared]
    return [", ".join(counts)] if counts else ["data: nothing to compare"]
