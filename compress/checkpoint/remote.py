"""Classes that a checkpoint brings as Python code, for users who trust it: `auto_map` ▶ model class and config object.

Code is taken from the checkpoint's folder, or from the local cache where `auto_map` names another repository; never fetched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.checkpoint.spec import Structure
from compress.errors import CheckpointError


def remote_class(structure: Structure, folder: Path) -> tuple[Any, Any]:
    """(model class, config object); None for either where `auto_map` does not name it, so that the stock one serves.

    Raises:
        CheckpointError: the code is missing, does not run, or gives no such class.
    """
    data = dict(structure.config)
    auto_map = data["auto_map"]
    where = str(folder / "config.json")
    if not isinstance(auto_map, dict) or not all(isinstance(v, str) for v in auto_map.values()):
        raise CheckpointError("has an `auto_map` that is no map of auto classes to names", where=where)
    config = found = None
    if "AutoConfig" in auto_map:
        config_class = _fetch(auto_map["AutoConfig"], folder)
        try:
            config = config_class.from_dict(data)
        except Exception as error:  # whatever foreign code does
            raise CheckpointError(f"cannot be used by {auto_map['AutoConfig']}: {error!r}", where=where) from error
    if structure.auto_model is not None:
        from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

        name = structure.auto_model[1]
        found = _fetch(name, folder)
        if not is_model_class(found):
            raise CheckpointError(f"names {name} (`auto_map`), which is no class of models", where=where)
        found = add_generation_mixin_to_remote_model(found)  # type: ignore[no-untyped-call]
    return found, config


def _fetch(reference: str, folder: Path) -> Any:
    """The class that a value of `auto_map` names."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    repository, _, _ = reference.rpartition("--")
    try:
        return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
    except Exception as error:  # whatever foreign code does when it is imported
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if repository:
            raise CheckpointError(
                f"asks for code of another repository (`auto_map`: {reference}), which cannot be taken from the cache: {text}",
                where=str(folder / "config.json"),
                fix=f"download {repository} first, or set ignore_auto_map: true where transformers has the model type",
            ) from error
        raise CheckpointError(
            f"names {reference} (`auto_map`), which cannot be taken from the folder: {text}",
            where=str(folder / "config.json"),
            fix="copy its code into the folder, or set ignore_auto_map: true where transformers has the model type",
        ) from error


def is_model_class(found: Any) -> bool:
    """Whether something is a class of models, and not an auto class, a tokenizer or a function of the same package."""
    import transformers

    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
