"""Classes that a checkpoint brings as Python code, for users who trust it: `auto_map` ▶ model class and config object.

Code is taken from the checkpoint's folder, or from the local cache where `auto_map` names another repository; never fetched.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from compress.spec.spec import Structure


def without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without `auto_map`; where that gave the model's class, `architectures` names the one that transformers has."""
    structure = Structure(config)
    result = {key: value for key, value in config.items() if key != "auto_map"}
    if structure.auto_model is None or structure.own_class not in (None, structure.auto_model[1].rpartition(".")[2]):
        return result
    stock = _stock_names().get(structure.auto_model[0], {}).get(structure.model_type)
    return {**result, "architectures": [stock]} if stock else result


@cache
def _stock_names() -> dict[str, dict[str, str]]:
    """Auto class ▶ model type ▶ class of transformers, the usual one first; read from its source, which imports no torch."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return {}
    try:
        tree = ast.parse((Path(found.origin).parent / "models/auto/modeling_auto.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    tables: dict[str, dict[str, str]] = {}
    result: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and node.value.args:
            try:
                rows = dict(ast.literal_eval(node.value.args[0]))
            except (ValueError, TypeError):
                continue
            table = {key: value[0] if isinstance(value, tuple) else value for key, value in rows.items()}
            tables |= {
                target.id.removesuffix("_NAMES"): table for target in node.targets if isinstance(target, ast.Name)
            }
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.Assign) and isinstance(line.value, ast.Name) and line.value.id in tables:
                    result[node.name] = tables[line.value.id]
    return result


def remote_class(structure: Structure, folder: Path) -> tuple[Any, Any]:
    """(model class, config object); None for either where `auto_map` does not name it, so that the stock one serves.

    Raises:
        CheckpointError: the code is missing, does not run, or gives no such class.
    """
    data = dict(structure.config)
    auto_map = data["auto_map"]
    where = f"{folder}/config.json"
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
                where=f"{folder}/config.json",
                fix=f"download {repository} first, or set ignore_auto_map: true where transformers has the model type",
            ) from error
        raise CheckpointError(
            f"names {reference} (`auto_map`), which cannot be taken from the folder: {text}",
            where=f"{folder}/config.json",
            fix="copy its code into the folder, or set ignore_auto_map: true where transformers has the model type",
        ) from error


def is_model_class(found: Any) -> bool:
    """Whether something is a class of models, and not an auto class, a tokenizer or a function of the same package."""
    import transformers

    return isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
