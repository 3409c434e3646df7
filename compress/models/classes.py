"""The transformers class and the config of a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from compress.checkpoint.remote import is_model_class, remote_class
from compress.checkpoint.structure import to_json
from compress.checkpoint.values import Checkpoint
from compress.errors import CheckpointError, CompressError, is_lack
from compress.spec.spec import Structure

P = ParamSpec("P")
R = TypeVar("R")


def refusing(make: Callable[P, R]) -> Callable[P, R]:
    """What transformers raises while it makes a model is of the checkpoint: configs hold anything, and classes check little.

    Wraps a function whose first argument is a `Checkpoint`. What is the machine's, such as a lack of memory, is let through.
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
            said = f"config.json cannot be used: {type(error).__name__}: {first_line(error)}"
            raise CheckpointError(said, where=str(checkpoint.folder)) from error

    return guarded


@refusing
def stock_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The transformers class of a checkpoint with its changes of structure, and its config object.

    Raises:
        CheckpointError: for unknown model types.
    """

    structure = checkpoint.spec.structure
    where = str(checkpoint.folder)
    found = config = None
    if structure.config.get("auto_map") and checkpoint.trust_remote_code:
        assert checkpoint.folder is not None
        found, config = remote_class(structure, checkpoint.folder)
    config = _config(structure, where) if config is None else config
    found = _stock_class(structure, config, where) if found is None else found
    pooled = "add_pooling_layer" in inspect.signature(found).parameters
    if pooled and not any(".pooler." in f".{name}" for name in checkpoint.spec.tensors):
        found = _without_pooler(found)
    if structure.edits:
        from compress.checkpoint.edits import edited_class

        found = edited_class(found, to_json(structure.edits))
    return found, config


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
        return transformers.AutoConfig.for_model(**data)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"config.json cannot be used: {first_line(error)}", where=where) from error
    except Exception as error:  # strict dataclass validation of configs raises errors of huggingface_hub's own
        if type(error).__module__.startswith("huggingface_hub"):
            raise CheckpointError(f"config.json cannot be used: {first_line(error)}", where=where) from error
        raise


def _stock_class(structure: Structure, config: Any, where: str) -> Any:
    """The model class of transformers that a config names; of one that names none, the base model of its type."""
    import transformers

    name = structure.own_class
    found: Any = getattr(transformers, name, None) if name else None
    if name and not is_model_class(found):
        raise CheckpointError(f"transformers {transformers.__version__} has no model class {name}", where=where)
    if found is None:
        mapping: Any = transformers.AutoModel._model_mapping
        found = mapping.get(type(config), None)
        if isinstance(found, (tuple, list)):  # several, the usual one first
            found = found[0]
    if found is None:
        raise CheckpointError(
            f"transformers {transformers.__version__} has no base model of the type `{structure.model_type}`",
            where=where,
            fix="name the class in `architectures` of config.json",
        )
    return found


def arguments_of(model: Any) -> set[str]:
    """What a model's forward takes by name; a forward that hands on all it is given takes what that of its base class takes."""
    found: set[str] = set()
    for cls in type(model).__mro__:
        if (forward := vars(cls).get("forward")) is None:
            continue
        parameters = inspect.signature(forward).parameters.values()
        found |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        foreign = not cls.__module__.startswith("transformers.")  # stock ones name all they take
        if not any(p.kind is p.VAR_POSITIONAL or (foreign and p.kind is p.VAR_KEYWORD) for p in parameters):
            break
    return found - {"self"}


def _without_pooler(stock: Any) -> Any:
    """The base class of an encoder whose files hold no pooler, which sentence encoders leave out; nothing is left at random."""

    class Unpooled(stock):  # type: ignore[misc]
        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__(config, **{**kwargs, "add_pooling_layer": False})

    Unpooled.__name__, Unpooled.__qualname__, Unpooled.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return Unpooled


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, for one line of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of what is checked here anyway."""
    from transformers.utils import logging as untyped

    logging: Any = untyped

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None:
            logging.enable_progress_bar()
