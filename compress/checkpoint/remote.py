"""Remote code of a checkpoint that the user trusts: `auto_map` ▶ model class and config object.

Code comes from the checkpoint's folder, or from the local cache if `auto_map` names another repository. It is never downloaded.
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
    """Config without `auto_map`. If that had the model's class, `architectures` names the class of transformers instead."""
    structure = Structure(config)
    result = {key: value for key, value in config.items() if key != "auto_map"}
    if structure.auto_model is None or structure.own_class not in (None, structure.auto_model[1].rpartition(".")[2]):
        return result
    stock = _stock_names().get(structure.auto_model[0], {}).get(structure.model_type)
    return {**result, "architectures": [stock]} if stock else result


@cache
def _stock_names() -> dict[str, dict[str, str]]:
    """Auto class ▶ model type ▶ class of transformers. Parsed from its source, because importing it would import torch."""
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return {}
    try:
        tree = ast.parse((Path(package.origin).parent / "models/auto/modeling_auto.py").read_text(encoding="utf-8"))
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
    """(model class, config object) of the remote code; None for one that `auto_map` does not name.

    Raises:
        CheckpointError: the code is missing, fails, or does not define such a class.
    """
    data = dict(structure.config)
    auto_map = data["auto_map"]
    where = f"{folder}/config.json"
    if not isinstance(auto_map, dict) or not all(isinstance(v, str) for v in auto_map.values()):
        raise CheckpointError("has an `auto_map` that does not map auto classes to names", where=where)
    config = model_class = None
    if "AutoConfig" in auto_map:
        config_class = _fetch(auto_map["AutoConfig"], folder)
        try:
            config = config_class.from_dict(data)
        except Exception as error:  # remote code may raise anything
            raise CheckpointError(f"is refused by {auto_map['AutoConfig']}: {error!r}", where=where) from error
    if structure.auto_model is not None:
        from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

        name = structure.auto_model[1]
        model_class = _fetch(name, folder)
        if not is_model_class(model_class):
            raise CheckpointError(f"names {name} (`auto_map`), which is not a model class", where=where)
        model_class = add_generation_mixin_to_remote_model(model_class)  # type: ignore[no-untyped-call]
    return model_class, config


def _fetch(reference: str, folder: Path) -> Any:
    """Class that a value of `auto_map` names."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    repository, _, _ = reference.rpartition("--")
    try:
        return get_class_from_dynamic_module(reference, str(folder), local_files_only=True)
    except Exception as error:  # remote code may raise anything when it is imported
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if repository:
            raise CheckpointError(
                f"needs code of another repository (`auto_map`: {reference}), which cannot be loaded from the cache: {text}",
                where=f"{folder}/config.json",
                fix=f"download {repository} first, or set ignore_auto_map: true if transformers has the model type",
            ) from error
        raise CheckpointError(
            f"names {reference} (`auto_map`), which cannot be loaded from the folder: {text}",
            where=f"{folder}/config.json",
            fix="copy its code into the folder, or set ignore_auto_map: true if transformers has the model type",
        ) from error


def is_model_class(candidate: Any) -> bool:
    """Whether an object is a model class, not an auto class, a tokenizer or a function."""
    import transformers

    return isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel)
