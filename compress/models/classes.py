"""The transformers class and the config of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, ParamSpec, TypeVar

from compress.checkpoint.edits import to_json
from compress.checkpoint.remote import is_model_class, remote_class
from compress.checkpoint.values import Checkpoint
from compress.errors import CheckpointError, CompressError, DataError, is_lack
from compress.spec.floats import decoded
from compress.spec.spec import Structure

P = ParamSpec("P")
R = TypeVar("R")


def refusing(make: Callable[P, R]) -> Callable[P, R]:
    """Turn errors of transformers while it makes a model into `CheckpointError`: configs hold anything, classes check little.

    Decorates a function whose first argument is a `Checkpoint`. Errors of the machine, such as a lack of memory, pass through.
    """

    @functools.wraps(make)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return make(*args, **kwargs)
        except CompressError:
            raise
        except Exception as error:
            if is_lack(error):
                raise
            checkpoint: Any = args[0]
            message = f"config.json cannot be used: {type(error).__name__}: {first_line(error)}"
            raise CheckpointError(message, where=str(checkpoint.folder)) from error

    return guarded


def has_class(checkpoint: Checkpoint) -> bool:
    """Whether anything loads the checkpoint: transformers knows its model type, or it brings code that the user trusts."""
    import transformers

    structure = checkpoint.spec.structure
    trusted = bool(structure.config.get("auto_map")) and checkpoint.trust_remote_code
    return trusted or structure.model_type in transformers.CONFIG_MAPPING


@refusing
def stock_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The transformers class of a checkpoint, with its edits of structure, and its config object.

    Raises:
        CheckpointError: the model type or the class is unknown.
    """
    structure = checkpoint.spec.structure
    where = str(checkpoint.folder)
    cls = config = None
    if structure.config.get("auto_map") and checkpoint.trust_remote_code:
        assert checkpoint.folder is not None
        cls, config = remote_class(structure, checkpoint.folder)
    config = _config(structure, where) if config is None else config
    cls = _stock_class(structure, config, where) if cls is None else cls
    pooled = "add_pooling_layer" in inspect.signature(cls).parameters
    if pooled and not any(".pooler." in f".{name}" for name in checkpoint.spec.tensors):
        cls = _without_pooler(cls)
    if structure.edits:
        from compress.checkpoint.edits.editing import edited_class

        cls = edited_class(cls, to_json(structure.edits))
    return cls, config


def _config(structure: Structure, where: str) -> Any:
    """The config object of transformers' own class for the model type."""
    import transformers

    data = dict(structure.config)
    try:
        if data["model_type"] not in transformers.CONFIG_MAPPING:
            raise CheckpointError(
                f"the model type `{data['model_type']}` is unknown to transformers {transformers.__version__}",
                where=where,
            )
        return transformers.AutoConfig.for_model(**decoded(data))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"config.json cannot be used: {first_line(error)}", where=where) from error
    except Exception as error:  # strict dataclass validation of configs raises errors of huggingface_hub's own
        if type(error).__module__.startswith("huggingface_hub"):
            raise CheckpointError(f"config.json cannot be used: {first_line(error)}", where=where) from error
        raise


def _stock_class(structure: Structure, config: Any, where: str) -> Any:
    """The model class of transformers that a config names; the base model of its type where it names none."""
    import transformers

    name = structure.own_class
    cls: Any = getattr(transformers, name, None) if name else None
    if name and not is_model_class(cls):
        raise CheckpointError(f"transformers {transformers.__version__} has no model class {name}", where=where)
    if cls is None:
        mapping: Any = transformers.AutoModel._model_mapping
        cls = mapping.get(type(config), None)
        if isinstance(cls, (tuple, list)):  # several, the usual one first
            cls = cls[0]
    if cls is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no base model of the type `{structure.model_type}`",
            where=where,
            fix="name the class in `architectures` of config.json",
        )
    return cls


def arguments_of(model: Any) -> set[str]:
    """Names of the arguments of a model's forward; one that passes all arguments on has those of its base class too."""
    names: set[str] = set()
    for cls in type(model).__mro__:
        if (forward := vars(cls).get("forward")) is None:
            continue
        parameters = inspect.signature(forward).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        foreign = not cls.__module__.startswith("transformers.")  # stock classes name all arguments
        if not any(p.kind is p.VAR_POSITIONAL or (foreign and p.kind is p.VAR_KEYWORD) for p in parameters):
            break
    return names - {"self"}


def check_arguments(names: Collection[str], model: Any, where: str = "data") -> None:
    """Raise `DataError` where the forward of a model's class does not take an argument of such a name."""
    known = arguments_of(model)
    if unknown := sorted(set(names) - known):
        raise DataError(
            f"{type(model).__name__} reads no `{unknown[0]}`",
            where=where,
            fix=f"its arguments are {', '.join(sorted(known))}",
        )


def cache_argument(model: Any) -> str | None:
    """Name of the cache among the arguments and outputs of a model's forward; None for a model that takes none."""
    return min(arguments_of(model) & {"cache", "past_key_values"}, default=None)


def _without_pooler(stock: Any) -> Any:
    """The class without pooler, for files of sentence encoders that hold none: a pooler would have random weights."""

    class Unpooled(stock):  # type: ignore[misc]
        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__(config, **{**kwargs, "add_pooling_layer": False})

    Unpooled.__name__, Unpooled.__qualname__, Unpooled.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return Unpooled


def first_line(error: BaseException) -> str:
    """The first two lines of an error's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, transformers shows no progress bars, and no warnings: what they warn of is checked here.

    Handlers are silenced and not the loggers, since setting a logger's level makes every logger of the process forget its own.
    """
    from transformers.utils import logging as untyped

    bars: Any = untyped
    library = logging.getLogger("transformers")
    levels = [(handler, handler.level) for handler in library.handlers if handler.level < logging.ERROR]
    propagate, shown = library.propagate, bars.is_progress_bar_enabled()
    for handler, _ in levels:
        handler.setLevel(logging.ERROR)
    library.propagate = False
    if shown:  # not inside another one
        bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler, level in levels:
            handler.setLevel(level)
        library.propagate = propagate or library.propagate
        if shown and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:
            bars.enable_progress_bar()
