"""Structured pruning: whole units go, and the result is a smaller stock model. Here: blocks (depth)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from compress import architectures
from compress.checkpoint.spec import Spec, Structure
from compress.errors import PassError
from compress.passes.base import Context, Pass, PassSettings
from compress.settings import parse_amount

if TYPE_CHECKING:
    from compress.checkpoint.open import Checkpoint


def _layers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if not value or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            raise ValueError("expected a list of block numbers from 0 up")
        if len(set(value)) != len(value):
            raise ValueError("a block is named twice")
        return tuple(sorted(value))
    return parse_amount(value)


Layers = Annotated[
    tuple[int, ...] | float | int,
    BeforeValidator(_layers),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": ["number", "string"]},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            ],
            "examples": [2, "25%", [3, 4]],
        }
    ),
]


class PruneStructuredSettings(PassSettings):
    """Settings of `prune_structured`."""

    layers: Layers = Field(
        description="Blocks to remove: a count, a share, or a list of block numbers from 0. "
        "By count, those go that change their input least on the calibration data (ShortGPT's block influence)."
    )


class PruneStructured(Pass[PruneStructuredSettings]):
    """Blocks are removed, the config and its per-layer lists cut, and the indices renumbered."""

    name: ClassVar[str] = "prune_structured"
    summary: ClassVar[str] = "Remove whole blocks; the result is a smaller stock model."
    settings = PruneStructuredSettings
    mode = "stream"
    needs = frozenset({"calibration"})
    preserves = frozenset({"masks", "aliases"})
    source: ClassVar[str] = "ShortGPT, arXiv 2403.03853"

    def needed(self, settings: PruneStructuredSettings) -> frozenset[str]:
        """Calibration data only where blocks are chosen by score."""
        return frozenset() if isinstance(settings.layers, tuple) else self.needs

    def plan(self, spec: Spec, settings: PruneStructuredSettings) -> Spec:
        """Exact where blocks are named or all alike; the choice by score only changes which of them go."""
        if settings.only or settings.skip:
            raise PassError(
                "`only` and `skip` do not apply to blocks",
                key="only" if settings.only else "skip",
                fix="name blocks in `layers`",
            )
        record = architectures.of(spec.structure.config)
        depth = record.depth(spec.structure.config)
        if self.needed(settings) and record.input != "input_ids":
            raise PassError(
                f"blocks are scored on text, and this model reads `{record.input}`",
                key="layers",
                fix="name the blocks, as in layers: [3, 4]",
            )
        drop = (
            settings.layers
            if isinstance(settings.layers, tuple)
            else tuple(range(depth - self._count(depth, settings), depth))
        )
        planned = self._without(spec, drop)
        alike = (
            len({tuple((n, replace(spec.tensors[f], name=n)) for n, f in block) for block in _blocks(spec, depth)}) == 1
        )
        return replace(planned, exact=spec.exact and (alike or isinstance(settings.layers, tuple)))

    def apply(self, checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context) -> Checkpoint:
        """Scores blocks where it must, then reads the remaining ones under their new numbers."""
        from compress.checkpoint.open import Derived

        record = architectures.of(checkpoint.spec.structure.config)
        depth = record.depth(checkpoint.spec.structure.config)
        if isinstance(settings.layers, tuple):
            drop = settings.layers
        else:
            from compress.calibration.influence import block_influence

            scores = block_influence(
                checkpoint,
                context.data("calibration"),
                dtype=context.dtype,
                device=context.device,
                progress=context.progress,
            )
            ranked = sorted(range(depth), key=lambda i: (scores[i], i))
            drop = tuple(sorted(ranked[: self._count(depth, settings)]))
            context.details["block_influence"] = scores
        context.details["removed_blocks"] = list(drop)
        source = {new: old for old, new in self._renamed(checkpoint.spec, drop)}
        return Derived(checkpoint, self._without(checkpoint.spec, drop), lambda name: checkpoint.tensor(source[name]))

    @staticmethod
    def _count(depth: int, settings: PruneStructuredSettings) -> int:
        assert not isinstance(settings.layers, tuple)
        count = settings.layers if isinstance(settings.layers, int) else round(settings.layers * depth)
        if count == 0 and not settings.allow_noop:
            raise PassError(
                f"{settings.layers:.0%} of {depth} blocks is none", key="layers", fix="ask for more, or give a count"
            )
        if count >= depth:
            raise PassError(f"cannot remove {count} of {depth} blocks", key="layers", fix=f"at most {depth - 1} can go")
        return count

    @staticmethod
    def _renamed(spec: Spec, drop: tuple[int, ...]) -> list[tuple[str, str]]:
        """(old name, new name) of every tensor that stays."""
        record = architectures.of(spec.structure.config)
        depth = record.depth(spec.structure.config)
        number = {old: new for new, old in enumerate(i for i in range(depth) if i not in drop)}
        pairs = []
        for name in spec.tensors:
            index = record.block_index(name)
            if index is None:
                pairs.append((name, name))
            elif index in number:
                pairs.append((name, record.renumber(name, number[index])))
        return pairs

    def _without(self, spec: Spec, drop: tuple[int, ...]) -> Spec:
        record = architectures.of(spec.structure.config)
        depth = record.depth(spec.structure.config)
        if wrong := [i for i in drop if i >= depth]:
            raise PassError(f"there is no block {wrong[0]}: the model has {depth}, numbered from 0", key="layers")
        if len(drop) == depth:
            raise PassError(f"cannot remove all {depth} blocks", key="layers")
        keep = [i for i in range(depth) if i not in drop]
        tensors = {new: replace(spec.tensors[old], name=new) for old, new in self._renamed(spec, drop)}
        return replace(
            spec,
            structure=Structure(record.cut_depth(spec.structure.config, keep), spec.structure.edits),
            tensors=tensors,
        )


def _blocks(spec: Spec, depth: int) -> list[list[tuple[str, str]]]:
    """Per block, (name with the number taken out, full name) of its tensors."""
    record = architectures.of(spec.structure.config)
    blocks: list[list[tuple[str, str]]] = [[] for _ in range(depth)]
    for name in spec.tensors:
        index = record.block_index(name)
        if index is not None and index < depth:
            blocks[index].append((record.renumber(name, 0), name))
    return [sorted(block) for block in blocks]
