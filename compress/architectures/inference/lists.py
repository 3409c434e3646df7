"""The lists of repeated blocks of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from compress.architectures.inference.skeleton import Skeleton

#: Share of the main list's parameters from which another list counts.
_SHARE = 0.02
#: Words in the names of configs of models that read no token ids.
_OTHER_INPUTS = re.compile(r"Vision|Image|Audio|Speech|Prot")
#: Arguments of models that read images or sound.
_MEDIA = {"pixel_values", "input_values", "input_features"}


def parameters(module: Any) -> int:
    """Number of parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def candidates(skeleton: Skeleton) -> list[tuple[str, Any]]:
    """(path, list) of the outermost lists whose items are modules with matrices of their own, in the model's order."""
    import torch

    result: list[tuple[str, Any]] = []
    for path, module in skeleton.modules.items():
        if not isinstance(module, torch.nn.ModuleList) or skeleton.names[id(module)] != path:
            continue
        if any(path.startswith(f"{outer}.") for outer, _ in result):
            continue
        if len(module) and all(any(True for _ in item.children()) for item in module) and _has_matrix(module):
            result.append((path, module))
    return result


def _has_matrix(module: Any) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _has_linear(module: Any) -> bool:
    return any(p.ndim == 2 for p in module.parameters())


def owner_of(skeleton: Skeleton, path: str) -> tuple[str, Any]:
    """(path, module) of the innermost transformers model that holds a module."""
    from transformers import PreTrainedModel

    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if isinstance(skeleton.modules[name], PreTrainedModel):
            return name, skeleton.modules[name]
    return "", skeleton.model


def main_first(skeleton: Skeleton) -> list[tuple[str, Any, str]]:
    """(path, list, kind) of the lists that count, the main one first; see `BlockList.kind`.

    Main is the encoder's list of an encoder-decoder; else the list in the part that reads token ids; else the largest one.
    """
    every = candidates(skeleton)
    if not every:
        return []
    sizes = {path: parameters(module) for path, module in every}
    both = bool(getattr(skeleton.config, "is_encoder_decoder", False))
    text = _text_path(skeleton)
    generates = bool(skeleton.model.can_generate())
    reads_ids = skeleton.model.main_input_name == "input_ids"
    inside = [(path, module) for path, module in every if text is not None and f"{path}.".startswith(text)]
    if both:
        inside = [entry for entry in every if entry[1] in _parts(skeleton, "get_encoder")] or inside
    if reads_ids:  # one config may describe the text, and others inside it images and sound
        inside = [entry for entry in inside if not _reads_no_ids(skeleton, entry[0])] or inside
    main = max(inside or every, key=lambda entry: sizes[entry[0]])[0]

    def kind(path: str) -> str:
        if path == main:
            return "main"
        beside = text is not None and not f"{path}.".startswith(text)
        is_tower = (generates and beside) or (reads_ids and _reads_no_ids(skeleton, path))
        return "tower" if is_tower and not _shares(skeleton, path, main) else "stack"

    counted = [(path, module, kind(path)) for path, module in every if sizes[path] >= _SHARE * sizes[main]]
    # convolutions before the blocks, as in encoders of sound, make the blocks' inputs and are no blocks
    counted = [entry for entry in counted if entry[2] != "stack" or _has_linear(entry[1])]
    order = {"main": 0, "stack": 1, "tower": 2}
    return _by_stage(skeleton, sorted(counted, key=lambda entry: order[entry[2]]))


def _by_stage(skeleton: Skeleton, lists: list[tuple[str, Any, str]]) -> list[tuple[str, Any, str]]:
    """The lists, with the list of blocks of every stage in place of a list of stages; the largest one is main."""
    result: list[tuple[str, Any, str]] = []
    for path, module, kind in lists:
        inner = [] if kind == "tower" else stages_of(module)
        if not inner:
            result.append((path, module, kind))
            continue
        inside = [(f"{path}.{name}", skeleton.modules[f"{path}.{name}"]) for name in inner]
        largest = max(inside, key=lambda entry: parameters(entry[1]))
        first = [] if kind != "main" else [(*largest, "main")]
        result = first + result if first else result
        result += [(*entry, "stack") for entry in inside if not first or entry is not largest]
    return result


def stages_of(module: Any) -> list[str]:
    """Paths, below a list, of the lists of blocks of its items where these are stages; empty where they are blocks.

    Stages are lists themselves, which no model calls; or the blocks in some are wider than the same ones in others.
    """
    inner = [f"{number}.{name}".removesuffix(".") for number, item in module.named_children() for name in _chains(item)]
    blocks = {path: module.get_submodule(path) for path in inner}
    if {path.partition(".")[0] for path in inner} == set(inner):  # stages that are lists
        return inner if len(inner) == len(module) else []
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for path, block in blocks.items():
        for name, parameter in block[0].named_parameters():
            shapes.setdefault(f"{path.partition('.')[2]}.{name}", set()).add(tuple(parameter.shape))
    differing = sum(len(shape) > 1 for shape in shapes.values())
    return inner if 2 * differing > len(shapes) else []


def _chains(item: Any) -> list[str]:
    """Paths of the lists of blocks in a stage; an empty path for a stage that is a list itself."""
    import torch

    result: list[str] = []
    for path, module in item.named_modules():
        if not isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) or "expert" in path:
            continue
        if any(path.startswith(f"{outer}.") or not outer for outer in result):
            continue
        if len(module) and all(any(True for _ in part.children()) for part in module) and _has_matrix(module):
            result.append(path)
    return result


def _shares(skeleton: Skeleton, path: str, main: str) -> bool:
    """Whether a list has parameters of the main one, so that it is as much of the model's body."""
    pairs = (pair for pair in skeleton.ties.items() if any(name.startswith(f"{main}.") for name in pair))
    return any(name.startswith(f"{path}.") for pair in pairs for name in pair)


def _reads_no_ids(skeleton: Skeleton, path: str) -> bool:
    """Whether a list is in a model of its own, inside the whole one, with a config of images, sound or proteins."""
    config = type(getattr(owner_of(skeleton, path)[1], "config", skeleton.config))
    if config is type(skeleton.config):
        return False
    parts = path.split(".")
    owners = (skeleton.modules[".".join(parts[:end])] for end in range(1, len(parts)))
    reads = {getattr(type(owner), "main_input_name", "input_ids") for owner in owners if hasattr(owner, "config")}
    return _OTHER_INPUTS.search(config.__name__) is not None or bool(reads & _MEDIA)


def _parts(skeleton: Skeleton, getter: str) -> list[Any]:
    """The lists inside the part that a getter of the class returns."""
    import torch

    try:
        part = getattr(skeleton.model, getter)()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return []
    return [m for m in part.modules() if isinstance(m, torch.nn.ModuleList)] if hasattr(part, "modules") else []


def _text_path(skeleton: Skeleton) -> str | None:
    """Path, with the dot, of the part that reads token ids: the owner of the input embeddings; None where there is none."""
    embedding = input_embeddings(skeleton)
    if embedding is None:
        return None
    text = getattr(skeleton.config, "get_text_config", lambda: skeleton.config)()
    if text is skeleton.config:
        return ""  # one config describes the whole
    paths = [n for n, m in skeleton.modules.items() if getattr(m, "config", None) is text and n]
    return f"{min(paths, key=len)}." if paths else ""


def input_embeddings(skeleton: Skeleton) -> Any:
    """The module that token ids or other inputs go to first; None where the class names none."""
    try:
        return skeleton.model.get_input_embeddings()
    except (NotImplementedError, AttributeError, TypeError):
        return None


def section_of(config: Any, part: Any) -> str:
    """Path of a nested config within a config, with dots; empty for the config itself, or where it is not found."""
    if part is config:
        return ""
    for key, value in vars(config).items():
        if value is part:
            return str(key).lstrip("_")
        if hasattr(value, "to_dict") and (inner := section_of(value, part)):
            return f"{key.lstrip('_')}.{inner}"
    return ""


def depth_key(config: Any, path: str, count: int) -> str | None:
    """The field of a config that says how long a list is; None where no single field fits, and for a list of a stage."""
    if any(part.isdigit() for part in path.split(".")):
        return None  # configs have lists of the depths of stages
    fields = config.to_dict()
    # a class may read a field otherwise than files write it
    numbers = {k: v for k, v in _own_fields(config, fields) if type(v) is int and v == fields[k] == count}
    aliases = dict(getattr(config, "attribute_map", {}) or {})
    side = next((word for word in ("decoder", "encoder") if word in path), None)
    for name in ("num_hidden_layers", "num_layers", "depth", "n_layers", "n_layer"):
        key = str(aliases.get(name, name))
        other = side and next((k for k in numbers if side in k and "layer" in k), None)
        if other and side:
            return other
        if key in numbers:
            return key
    fitting = [key for key in numbers if re.search(r"layer|depth|block|group", key)]
    return fitting[0] if len(fitting) == 1 else None


def _own_fields(config: Any, fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in fields:
        try:
            yield key, getattr(config, key)
        except Exception:  # a field may have a value by block alone
            continue
