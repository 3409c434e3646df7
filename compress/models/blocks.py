"""The record of a transformers model's family, and the list of blocks inside the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from compress import architectures
from compress.architectures.inferred import BlockList, Inferred, refilled
from compress.errors import PassError
from compress.spec.spec import Spec, Structure, Tensor


def record_of(model: Any) -> architectures.Architecture:
    """The record of a transformers model; one that is inferred names tensors as they are called in memory."""
    config = model.config.to_dict()
    if (record := architectures.find(config)) is not None:
        return record
    tensors = {name: Tensor(name, tuple(value.shape), "F32") for name, value in model.state_dict().items()}
    return architectures.record_for(Spec(Structure({**config, "architectures": [type(model).__name__]}), tensors))


def find_blocks(model: Any, record: architectures.Architecture) -> Any:
    """The main list of blocks of a transformers model. Raises `PassError` where the model has no list at the record's place."""
    if not isinstance(record, Inferred):
        require_lists(lists := find_lists(model, record), model, record)
        return next(iter(lists.values()))
    names = {name for name, _ in model.named_modules()}
    place = _place(record.lists[0].module, names) if record.lists else None
    require_lists({} if place is None else {place: model}, model, record)
    return model.get_submodule(place or "")


def require_lists(lists: Mapping[str, Any], model: Any, record: architectures.Architecture) -> None:
    """Raises `PassError` where no list of blocks was found in the model."""
    if lists:
        return
    name, paths = type(model).__name__, _paths(record)
    if not paths:
        raise PassError(
            f"no list of blocks is known of {name}", fix="use a method that needs none, such as `rtn` or `magnitude`"
        )
    raise PassError(
        f"the record of {record.model_type} names a list of blocks that {name} does not have: {next(iter(paths.values()))}",
        fix="correct the record: docs/extend/family.md",
    )


def _paths(record: architectures.Architecture) -> dict[str, str]:
    """`Architecture.list_of` ▶ the list in memory, in a class with a head; the main one first."""
    if isinstance(record, Inferred):
        return {one.path: one.module for one in record.of_kind("main", "stack")}
    if not record.blocks:
        return {}
    paths = {path: f"{record.prefix}.{path}" for path in (record.blocks, *record.stacks)}
    return paths | ({record.blocks: f"{record.prefix}.{record.module_blocks}"} if record.module_blocks else {})


def find_lists(model: Any, record: architectures.Architecture) -> dict[str, Any]:
    """The lists of blocks that text or sound runs through, in the order in which they run, by `Architecture.list_of`.

    A model may lack some of a record's lists. Towers, which make inputs of other kinds, are none of these.
    """
    names = [name for name, _ in model.named_modules()]
    if isinstance(record, Inferred):
        places = {
            refilled(one.path, place): place
            for one in record.of_kind("main", "stack")
            if (place := _place(one.module, names)) is not None and _counts(one, model.get_submodule(place))
        }
        places = dict(sorted(places.items(), key=lambda item: names.index(item[1])))  # an encoder is usually made first
        places = dict(sorted(places.items(), key=lambda item: not _in_encoder(model, item[1])))
    else:
        paths = _paths(record)
        places = {path: place for path, whole in paths.items() if (place := _place(whole, names)) is not None}
    return {path: model.get_submodule(place) for path, place in places.items()}


def _in_encoder(model: Any, place: str) -> bool:
    """Whether a list is in the encoder of an encoder-decoder."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    try:
        encoder = model.get_encoder()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    modules = model.get_submodule(place)
    return any(part is modules for part in getattr(encoder, "modules", tuple)())


def _counts(one: BlockList, modules: Any) -> bool:
    """Whether a list is one of blocks: a list of convolutions beside the main one, such as those in front of speech, is not.

    The blocks of a stage may be convolutions.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    if one.kind == "main" or any(part.isdigit() for part in one.module.split(".")):
        return True
    parts = list(modules.modules())
    return any(isinstance(part, (torch.nn.Linear, Conv1D)) or hasattr(part, "gate_up_proj") for part in parts)


def _place(path: str, names: Collection[str]) -> str | None:
    """A module by its path in a class with a head; a base model lacks the first parts of it."""
    parts = path.split(".")
    return next((p for i in range(len(parts)) if (p := ".".join(parts[i:])) in names), None)


def rotary_frequencies(model: Any) -> tuple[list[float], float] | None:
    """Angles per position of a model's rotary positions, and the factor of their cosines and sines; None without them."""
    part = next((m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")), None)
    return None if part is None else (part.inv_freq.tolist(), float(part.attention_scaling))
