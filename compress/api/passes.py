"""One pass, applied to a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from compress.api.guarded import guarded
from compress.api.sizes import bytes_of
from compress.errors import CompressError, DataError
from compress.files import place
from compress.progress import Progress
from compress.progress.display import chosen

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.store import Store
    from compress.pipeline.apply import GivenIds, GivenInputs
    from compress.recipe import Recipe
    from compress.recipe.data import Data
    from compress.settings import Settings

M = TypeVar("M", bound="Settings")


@guarded
def apply(
    name: str,
    model: str | Path,
    output: str | Path,
    *,
    data: str | Path | Sequence[str | Path] | torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    field: str = "text",
    template: str | None = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    mode: Literal["packed", "padded"] | None = None,
    samples: int | None = None,
    length: int | None = None,
    store: Store = "stock",
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    document_separator: str | None = None,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    progress: Progress | bool | None = None,
    details: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Apply one pass to a checkpoint and write the result to ``output``, which must not exist.

    Args:
        name: of the pass; ``settings`` are its settings as in a recipe.
        data: for calibration or training: text files, a file or tensor of token ids [samples, length], or a folder of images
            for each class; for calibration also a folder of .wav files, or arguments of the model's forward by name, samples
            first. ``field`` to ``length`` are keys of a recipe's ``data`` sections; they also cut a tensor.
        progress: as of `compress.run`. details: is filled with the pass's part of a report. A training that did not help
            leaves the weights unchanged and warns unless ``allow_noop`` is set; see ``details["training"]["helped"]``.

    Returns:
        ``output`` as a path.

    Raises:
        CompressError: the settings are wrong, the pass does not apply, or the output cannot be written.
    """
    import warnings

    from compress.passes.distill.plan import unhelped
    from compress.pipeline.apply import apply_pass

    section = {"field": field, "text": text, "template": template, "mode": mode, "samples": samples, "length": length}
    recipe, given = _recipe_of_one(name, settings, data, {**section, "label": label}, {
        "model": str(model), "output": str(output), "store": store, "device": device, "dtype": dtype, "seed": seed,
        "max_shard_size": bytes_of(max_shard_size), "document_separator": document_separator,
        "trust_remote_code": trust_remote_code, "ignore_auto_map": ignore_auto_map, "allow_links": allow_links,
    })  # fmt: skip
    with chosen(progress) as shown:
        facts = apply_pass(recipe, shown, given)
    if details is not None:
        details.update(facts)
    if (note := unhelped(name, facts.get("training", {}))) and not recipe.passes[0].settings.allow_noop:
        warnings.warn(note, stacklevel=3)
    return place(output)


def _recipe_of_one(
    name: str, settings: Mapping[str, Any], data: Any, section: Mapping[str, Any], keys: Mapping[str, Any]
) -> tuple[Recipe, GivenIds | GivenInputs | None]:
    """A recipe of one pass, and token ids or inputs that were given in place of files.

    Args:
        settings: of the pass. data, section: see `_data`. keys: the recipe's other keys.
    """
    from pydantic import ValidationError

    from compress import passes
    from compress.passes.base import InputMultiple
    from compress.recipe import PassEntry, Recipe
    from compress.recipe.load import settings_error

    instance = passes.get(name)
    try:
        chosen = instance.settings(**settings)
    except ValidationError as error:
        raise settings_error(name, settings, error) from None
    chosen = instance.completed(chosen, ["calibration"] if data is not None else [], keys["store"])
    chosen = instance.followed_by(chosen, InputMultiple())
    sections, given = _data(data, instance.required_data(chosen), section)
    # not validated as a file is: the pass and the pipeline check what they read
    return Recipe.model_construct(None, passes=(PassEntry(name, chosen),), data=sections, **keys), given


def _data(data: Any, needed: Collection[str], asked: Mapping[str, Any]) -> tuple[Data, GivenIds | GivenInputs | None]:
    """The data section of a recipe of one pass, and token ids or inputs that were given in place of files.

    Args:
        needed: names of the data sets that the pass reads. asked: settings of each; None for those not given.
    """
    import torch

    from compress.data.kinds import FIELD
    from compress.pipeline.apply import GivenIds, GivenInputs
    from compress.recipe.data import CalibrationSection, Data, TrainingData

    if data is None:
        return Data(), None
    if isinstance(data, torch.Tensor):
        return Data(), GivenIds(data, asked["samples"], asked["length"])
    if isinstance(data, Mapping):
        if odd := next((key for key, value in asked.items() if value not in (None, FIELD) and key != "samples"), None):
            raise DataError(f"`{odd}` is no setting of inputs by name", where="data", fix="leave it out")
        return Data(), GivenInputs(data, asked["samples"])
    files = [str(data)] if isinstance(data, (str, Path)) else [str(file) for file in data]
    kind = TrainingData if "training" in needed else CalibrationSection
    values = {key: value for key, value in asked.items() if value is not None}
    if len(files) == 1 and Path(files[0]).is_dir():
        spoken = kind is CalibrationSection and any(Path(files[0]).rglob("*.wav"))
        values["speech" if spoken else "images"], files = files[0], []
    if files:
        values["files"] = tuple(files)
    section = _validated("data", kind, values)
    sections: dict[str, Any] = dict.fromkeys(needed, section)
    return Data.model_construct(None, **sections), None


def _validated(name: str, kind: type[M], settings: Mapping[str, Any]) -> M:
    """An instance of a settings model. Raises `CompressError` with the first mistake, located in ``name``."""
    from pydantic import ValidationError

    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise CompressError(first["msg"].removeprefix("Value error, "), where=where) from None
