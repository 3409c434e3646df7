"""The Python API: the commands of the command line as functions that return values and print nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from compress.errors import CompressError, DataError, from_os
from compress.files import expanded, place
from compress.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from compress.checkpoint.store import Store
    from compress.pipeline.apply import GivenIds, GivenInputs
    from compress.pipeline.run import RunResult
    from compress.planning import Plan
    from compress.recipe import Recipe
    from compress.recipe.data import Data
    from compress.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound="Settings")


def read_recipe(recipe: str | Path | Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """A recipe from a file or from a mapping. ``sets`` override keys, as `--set`. Raises `RecipeError` with every mistake."""
    from compress.recipe import load_recipe, recipe_from_mapping

    if isinstance(recipe, Mapping):
        return recipe_from_mapping(dict(recipe), sets)
    return load_recipe(Path(recipe), sets)


def _files(function: Callable[P, R]) -> Callable[P, R]:
    """Turn errors of files in a function into `CompressError`."""

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            if (known := from_os(error)) is None:
                raise
            raise known from error

    return guarded


@_files
def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    fresh: bool = False,
    publish_anyway: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Run a recipe, given as a path or as a mapping with the same keys.

    A failed gate raises nothing; ``result.verdict`` holds it.

    Args:
        sets: overrides, as ``--set``: ``passes.0.cast.weights=fp16``.
        fresh: compute every stage anew. publish_anyway: publish even where a gate fails.

    Raises:
        CompressError: the run cannot end with a model.
    """
    from compress.pipeline.run import run as run_recipe

    path = None if isinstance(recipe, Mapping) else str(recipe)
    return run_recipe(
        read_recipe(recipe, sets), fresh=fresh, publish_anyway=publish_anyway, progress=progress, recipe_path=path
    )


@_files
def plan(recipe: str | Path | Mapping[str, Any], *, sets: Sequence[str] = ()) -> Plan:
    """The plan of a run, from headers only; reads no weights and imports no torch."""
    from compress.checkpoint.open import open_headers
    from compress.planning import make_plan

    loaded = read_recipe(recipe, sets)
    spec, metadata = open_headers(
        loaded.reference,
        trust_remote_code=loaded.trust_remote_code,
        ignore_auto_map=loaded.ignore_auto_map,
        offline=loaded.offline,
    )
    return make_plan(loaded, spec, metadata)


@_files
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
    progress: Progress | None = None,
    details: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Apply one pass to a checkpoint and write the result to ``output``, which must not exist.

    Args:
        name: of the pass; ``settings`` are its settings as in a recipe.
        data: for calibration or training: text files, a file or tensor of token ids [samples, length], or a folder of images
            for each class; for calibration also a folder of .wav files, or arguments of the model's forward by name, samples
            first. ``field`` to ``length`` are keys of a recipe's ``data`` sections; they also cut a tensor.
        details: is filled with the pass's part of a report. A training that did not help leaves the weights unchanged and
            warns unless ``allow_noop`` is set; see ``details["training"]["helped"]``.

    Returns:
        ``output`` as a path.

    Raises:
        CompressError: the settings are wrong, the pass does not apply, or the output cannot be written.
    """
    import warnings

    from compress.passes.distill.plan import unhelped
    from compress.pipeline.apply import apply_pass
    from compress.progress import SilentProgress

    section = {"field": field, "text": text, "template": template, "mode": mode, "samples": samples, "length": length}
    recipe, given = _recipe_of_one(name, settings, data, {**section, "label": label}, {
        "model": str(model), "output": str(output), "store": store, "device": device, "dtype": dtype, "seed": seed,
        "max_shard_size": _bytes(max_shard_size), "document_separator": document_separator,
        "trust_remote_code": trust_remote_code, "ignore_auto_map": ignore_auto_map, "allow_links": allow_links,
    })  # fmt: skip
    facts = apply_pass(recipe, progress or SilentProgress(), given)
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


@_files
def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    quantized_activations: bool = True,
    quantized_kv_cache: bool = False,
    attention: Literal["auto", "compress_local", "sdpa", "eager"] | None = "auto",
) -> PreTrainedModel:
    """Load a checkpoint of this project, or any stock one, as a transformers model in evaluation mode.

    This package reads compact checkpoints itself; it never runs the file bundled in the folder.

    Args:
        trust_remote_code: allow code in the checkpoint. ignore_auto_map: use transformers' own class instead.
        allow_links: follow links that lead out of the folder.
        quantized_activations: round the inputs of linear layers if the config has it so, as stock transformers does.
        quantized_kv_cache: round keys and values if the config has it so, as vLLM does and stock transformers does not;
            evaluation rounds them.
        attention: ``compress_local`` computes windows and logits of sinks without masks of all pairs. ``auto`` takes it for
            models with windows, None leaves the choice to transformers.
    """
    from compress.checkpoint.sidecars import with_links
    from compress.models.loading import load_model

    return load_model(
        with_links(model, allow_links),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        ignore_auto_map=ignore_auto_map,
        quantized_activations=quantized_activations,
        quantized_kv_cache=quantized_kv_cache,
        attention=attention,
    )


def register_attention() -> None:
    """Make ``compress_local`` known to transformers, so that ``from_pretrained`` takes it as ``attn_implementation``."""
    from compress.checkpoint.attention.interface import register

    register()


@_files
def unpack(
    model: str | Path,
    output: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the dense stock twin of a compact or quantised checkpoint to ``output``, which must not exist."""
    from compress.checkpoint.edits.twin import dense
    from compress.checkpoint.open import open_checkpoint
    from compress.checkpoint.sidecars import safe_file, with_links
    from compress.checkpoint.write import write_checkpoint
    from compress.pipeline.publish import check_absent

    output = place(output)
    model = with_links(model, allow_links)
    local = expanded(model)
    check_absent(output, local if local.exists() else None)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code, ignore_auto_map=ignore_auto_map)
    assert checkpoint.folder is not None
    readme = safe_file(checkpoint.folder, "README.md")
    files = {"README.md": readme.read_bytes()} if readme.is_file() else {}

    write_checkpoint(
        dense(checkpoint),
        output,
        store="stock",
        max_shard=_bytes(max_shard_size),
        extra_files=files,
        progress=progress,
    )
    return output


def _validated(name: str, kind: type[M], settings: Mapping[str, Any]) -> M:
    """An instance of a settings model. Raises `CompressError` with the first mistake, located in ``name``."""
    from pydantic import ValidationError

    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise CompressError(first["msg"].removeprefix("Value error, "), where=where) from None


def _bytes(size: int | str) -> int:
    """A size as bytes. Raises `CompressError`."""
    from pydantic_core import PydanticCustomError

    from compress.settings import parse_size

    try:
        return parse_size(size)
    except PydanticCustomError as error:
        raise CompressError(str(error), where="max_shard_size") from None
