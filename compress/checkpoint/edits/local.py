"""``local``: in the attention ``module`` all key and value heads but those in ``full`` see a window of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.base import with_edits
from compress.checkpoint.edits.editing import ModelEdit, mixed
from compress.checkpoint.edits.local_cache import HeadWindows
from compress.checkpoint.edits.local_heads import HEADS, LocalHeads, register_heads
from compress.errors import CheckpointError, PassError
from compress.spec.edits import CachedPart, EditKind
from compress.spec.spec import Edit, Spec

if TYPE_CHECKING:
    import torch

#: Pattern ▶ the further key of ``values`` that it has.
PATTERNS: Mapping[str, str | None] = {"window": None, "strided": "stride", "fixed": "keep", "chunks": None}


class Local(EditKind):
    """Windows of attention for some heads. No tensor changes."""

    kind = "local"
    keys = ("window", "sinks", "heads", "full", "pattern", "positions")
    storage = "windowed"
    label = "attentions with windows for some heads"
    has_twin = False
    alone = (
        "has windows by head, first tokens that stay, or a pattern",
        "give windows to whole blocks: `by: layers`, `pattern: window`, one `window`, and `sinks: learned` or 0",
    )

    def sound(self, values: Mapping[str, Any]) -> bool:
        """Whether the values have the keys and types of a pattern; ``full`` ascends."""
        further = PATTERNS.get(str(values.get("pattern")), "pattern")
        numbers = [
            values.get(key) for key in ("window", "heads", "positions", *(() if further is None else (further,)))
        ]
        full, sinks, window = values.get("full"), values.get("sinks"), values.get("window")
        return (
            values.keys() == {*self.keys, *(() if further is None else (further,))}
            and all(type(number) is int and number > 0 for number in numbers)
            and (type(sinks) is int and sinks >= 0)
            and isinstance(full, (list, tuple))
            and all(type(head) is int and head >= 0 for head in full)
            and list(full) == sorted(set(full))
            and len(full) < values["heads"] > max(full, default=0)
            and not (further == "keep" and values["keep"] > window)
        )

    def check(self, edit: Edit, spec: Spec, where: str) -> None:
        """Check that the module is an attention that can have such windows, and that it has those heads."""
        try:
            heads = heads_of(spec, edit.module)
        except PassError as error:
            raise CheckpointError(f"has a damaged edit: local of {edit.module}: {error.what}", where=where) from None
        if heads != edit.values["heads"]:
            raise CheckpointError(
                f"config and edits disagree: {edit.module} has {heads} key and value heads, not {edit.values['heads']}",
                where=where,
            )

    def narrowed(self, edit: Edit, window: int) -> Edit:
        """The edit with a window of no more than so many tokens, and fewer sinks."""
        cut = {key: min(edit.values[key], window) for key in ("window", "stride", "keep") if key in edit.values}
        return replace(edit, values={**edit.values, **cut, "sinks": min(edit.values["sinks"], window // 4)})

    def cached(self, edit: Edit, parts: list[CachedPart]) -> list[CachedPart]:
        """Full heads cache all tokens, the others those that the last token sees."""
        heads, full = edit.values["heads"], len(edit.values["full"])
        windows = HeadWindows(edit.values)
        kept = windows.window + windows.sinks if windows.pattern == "window" else windows.count
        result: list[CachedPart] = [(values * full // heads, tokens) for values, tokens in parts if full]
        return [*result, *((values * (heads - full) // heads, kept) for values, _ in parts)]


def attentions(spec: Spec) -> dict[str, int]:
    """Attention module of each block, by its path in files ▶ number of its block; of those that can have such windows.

    Raises:
        PassError: the family's attention cannot have windows for some heads.
    """
    mapped = model_map(spec)
    record = mapped.record
    if not record.causal or record.stacks:
        raise PassError(f"{record.model_type} does not decode token by token: windows are for causal models")
    if record.attention is None:
        raise PassError(f"{record.model_type} caches no keys and values by head, so no head can have its own window")
    if not record.open_attention:
        raise PassError(
            f"{record.model_type} does not call its attention through transformers' table, so no head can have its own window",
            fix="give windows to whole blocks, with `sinks: learned` or 0",
        )
    module = record.attention.output.rpartition(".")[0]
    kinds, window = mapped.per_layer.get("layer_types"), record.window(mapped.config)
    paths = {}
    for block in mapped.blocks:
        slides = window is not None if kinds is None else kinds[block.index] != "full_attention"
        if not slides and f"{module}.sinks" not in block.tensors:
            paths[f"{block.path}{module}"] = block.index
    return paths


def heads_of(spec: Spec, module: str) -> int:
    """Number of key and value heads of an attention module, by its path in files.

    Raises:
        PassError: it is no attention that can have windows for some heads.
    """
    if module not in attentions(spec):
        raise PassError(f"{module} is not an attention of a block that sees everything")
    return model_map(spec).kv_heads


def localised(spec: Spec, values: Mapping[str, Mapping[str, Any]]) -> Spec:
    """Spec with windows for some heads. ``values``: attention module, by its path in files ▶ values of its edit."""
    return with_edits(spec, [Edit("local", module, dict(more)) for module, more in values.items()], spec.tensors)


# ---- editing: copied into the modelling file of compact checkpoints ----


class LocalModel(ModelEdit):
    """Gives windows to heads of an attention module."""

    kind = "local"

    def apply(self, model: Any, path: str, values: dict[str, Any]) -> None:
        """Change how the module attends and caches."""
        import copy

        from compress.checkpoint.attention.interface import LOCAL, register

        register()
        register_heads()
        dropout = getattr(model.config, "attention_dropout", getattr(model.config, "attn_pdrop", 0.0))
        if model.config._attn_implementation == "sdpa" and not dropout:  # then no layer needs a mask of all pairs
            model.config._attn_implementation = LOCAL
        module = model.get_submodule(path)
        module.__class__ = mixed(LocalHeads, type(module))
        module.windows = HeadWindows(values)
        rotary = [other for other in model.modules() if hasattr(other, "rope_type")]
        module.rotary = tuple(rotary[:1])  # in a tuple, so that it is no submodule
        module.config = copy.copy(module.config)  # its own, so that other layers attend as they did
        module.config._attn_implementation = HEADS

    def expand(self, state: dict[str, torch.Tensor], path: str, values: dict[str, Any]) -> None:
        """Raise ValueError: there is no dense twin."""
        raise ValueError(f"heads of {path} have windows of their own, which no stock class can express")
