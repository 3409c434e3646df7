"""Data sets of the hub in a recipe: what can be checked before a download, and the recipe with the files of their rows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from compress.data.hub import check_package, kept_rows
from compress.errors import DataError, located
from compress.recipe.data import Data, TextFiles

if TYPE_CHECKING:
    from compress.recipe import Recipe


def check_hub_data(recipe: Recipe) -> None:
    """Check that data sets of the hub can be read, and that no pass reads the rows that are evaluated. Raises `DataError`."""
    evaluation = recipe.data.evaluation
    for name, section in _named(recipe.data).items():
        with located(f"data.{name}"):
            check_package(str(section.dataset))
            if name != "evaluation" and evaluation is not None and _same(section, evaluation):
                raise DataError(
                    f"reads the rows that data.evaluation reads: {section.dataset}, {section.split}",
                    fix="evaluate on another split",
                )


def with_hub_data(recipe: Recipe) -> Recipe:
    """The recipe with the rows of its data sets in files, which are downloaded where they are not there yet.

    Raises:
        DataError: a data set cannot be read; the place is its key in the recipe.
    """
    offline = recipe.offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    update = {}
    for name, section in _named(recipe.data).items():
        with located(f"data.{name}"):
            assert section.dataset is not None
            columns = tuple(section.named_columns)
            path = kept_rows(section.dataset, section.subset, section.split, section.rows, columns, offline=offline)
            update[name] = section.model_copy(update={"files": (str(path),)})
    if not update:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})


def _named(data: Data) -> dict[str, TextFiles]:
    """The sections that name a data set of the hub."""
    sections = {name: getattr(data, name) for name in Data.model_fields}
    return {name: section for name, section in sections.items() if section is not None and section.dataset is not None}


def _same(one: TextFiles, other: TextFiles) -> bool:
    keys = ("dataset", "subset", "split")
    return all(getattr(one, key) == getattr(other, key) for key in keys)
