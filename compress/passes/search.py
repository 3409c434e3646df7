"""The shape for a size: which blocks, heads and neurons go so that a target is met at the least loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import lcm
from typing import TYPE_CHECKING, Any

from compress import architectures
from compress.architectures import narrowing
from compress.checkpoint.layout import lay_out
from compress.checkpoint.spec import Spec
from compress.errors import PassError
from compress.passes.base import Context
from compress.passes.structured_settings import TARGETS
from compress.passes.sweeping import once

if TYPE_CHECKING:
    from compress.checkpoint.open import Checkpoint
    from compress.passes.prune_structured import PruneStructured
    from compress.passes.structured_settings import PruneStructuredSettings

#: Most shapes that are tried; of more, those at equal steps of depth.
MOST = 12
#: No shape loses more of the neurons, or of the heads, than this, or more than half of the blocks.
_MOST_NEURONS, _MOST_HEADS = 0.75, 0.5
#: Calibration samples for trying a shape, at most; and for telling what it costs.
_TRY, _HELD_OUT = 32, 16
_ONE_FILE = 1 << 62


@dataclass(frozen=True)
class Shape:
    """Blocks, heads and neurons (of the narrowest MLP) that go; the settings that say so; what they plan."""

    layers: int
    heads: int
    neurons: int
    settings: PruneStructuredSettings
    spec: Spec

    def less(self, other: Shape) -> bool:
        """Whether it takes no more of anything, and less of something."""
        mine, theirs = ((s.layers, s.heads, s.neurons) for s in (self, other))
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))


def meets(spec: Spec, before: Spec, settings: PruneStructuredSettings) -> bool:
    """Whether a planned checkpoint is as small as asked."""
    small = settings.keep_parameters is None or spec.parameters <= settings.keep_parameters * before.parameters
    return small and (settings.max_bytes is None or lay_out(spec, _ONE_FILE).bytes <= settings.max_bytes)


def shapes(instance: PruneStructured, spec: Spec, settings: PruneStructuredSettings) -> list[Shape]:
    """Shapes that meet the target; none that only takes more than another. Reads headers alone.

    For each number of blocks and heads the fewest neurons that meet it.

    Raises:
        PassError: no shape does.
    """
    key = "keep_parameters" if settings.keep_parameters is not None else "max_bytes"
    if meets(spec, spec, settings):
        raise PassError("the model is that small already", key=key, fix="ask for less, or leave the pass out")
    found: list[Shape] = []
    smallest: Spec | None = None
    width, step = _neurons(spec, settings)
    for layers, heads in _depths_and_heads(spec):
        fixed = {"layers": layers or None, "heads": heads or None}
        # binary search over steps of `multiple_of` neurons: more gone is smaller
        options = range(0, int(_MOST_NEURONS * width) + 1, step)
        low, high = 0, len(options)
        best: Shape | None = None
        while low < high:
            middle = (low + high) // 2
            planned = _planned(instance, spec, settings, fixed, options[middle], width)
            if planned is None:  # this number of heads, or of neurons, no config can say
                break
            smallest = planned[1] if smallest is None or planned[1].parameters < smallest.parameters else smallest
            if meets(planned[1], spec, settings):
                best, high = Shape(layers, heads, options[middle], *planned), middle
            else:
                low = middle + 1
        if best is not None:
            found.append(best)
    if not found:
        least = f"{smallest.parameters / spec.parameters:.1%} of the parameters" if smallest else "none"
        raise PassError(
            f"no shape is that small; the smallest that is tried keeps {least}",
            key=key,
            fix="ask for less, or name the amounts yourself",
        )
    kept = [shape for shape in found if not any(other.less(shape) for other in found)]
    return kept[:: max(1, -(-len(kept) // MOST))]


def _depths_and_heads(spec: Spec) -> Iterator[tuple[int, int]]:
    record = architectures.of(spec.structure.config)
    config = spec.structure.config
    queries, groups = int(record.value(config, record.heads_key)), narrowing.kv_heads(record, config)
    depth = record.depth(config)
    step = queries // groups  # whole groups: they make the cache smaller too
    movable = record.attention is not None and record.attention.free
    for layers in range(depth // 2 + 1):
        for heads in range(0, int(_MOST_HEADS * queries) + 1, step) if movable else (0,):
            yield layers, heads


def _neurons(spec: Spec, settings: PruneStructuredSettings) -> tuple[int, int]:
    """Neurons of the narrowest MLP, and steps in which they may go."""
    record = architectures.of(spec.structure.config)
    units = list(chain.from_iterable(narrowing.mlp_units(record, spec).values()))
    return min((one.count for one in units), default=0), lcm(settings.multiple_of, *(one.multiple for one in units))


def _planned(
    instance: PruneStructured,
    spec: Spec,
    settings: PruneStructuredSettings,
    fixed: dict[str, Any],
    neurons: int,
    width: int,
) -> tuple[PruneStructuredSettings, Spec] | None:
    mlp = neurons / width if neurons else None
    amounts = {**fixed, "mlp": mlp}
    if not any(amounts.values()):
        return settings, spec
    chosen = settings.model_copy(update={**amounts, **dict.fromkeys(TARGETS)})
    try:
        return chosen, instance.plan(spec, chosen)
    except PassError:
        return None


def search(
    instance: PruneStructured, checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context
) -> PruneStructuredSettings:
    """The shape of least divergence from the original, each tried with least squares and without tuning.

    Tried on some of the calibration samples and judged on others. ``context.details["shapes"]`` gets a row for each.
    """
    found = once(context, "shape", lambda: _tried(instance, checkpoint, settings, context))
    context.details["shapes"] = found["shapes"]
    best = found["best"]
    layers = None if best["layers"] is None else tuple(best["layers"])
    return settings.model_copy(update={**best, "layers": layers, **dict.fromkeys(TARGETS)})


def _tried(
    instance: PruneStructured, checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context
) -> dict[str, Any] | None:
    """Amounts of the best shape, and a row for each; in the first process."""
    if context.rank:
        return None
    from compress.calibration.depth import divergence, greedy_depth

    found = shapes(instance, checkpoint.spec, settings)
    data = context.data("calibration")
    held = min(_HELD_OUT, max(1, len(data.ids) // 4))
    trying, judging = data.first(min(_TRY, len(data.ids) - held)), data.last(held)
    order: list[int] = []
    if deepest := max(shape.layers for shape in found):
        how: dict[str, Any] = {"dtype": context.dtype, "device": context.device, "progress": context.progress}
        order, _ = greedy_depth(checkpoint, trying, deepest, **how)
    rows = []
    options = []
    with context.progress.task("trying shapes", len(found)) as task:
        for number, shape in enumerate(found):
            named = tuple(sorted(order[: shape.layers])) or None
            option = shape.settings.model_copy(update={"layers": named})
            quick = option.model_copy(update={"repair": "least_squares"})
            part = replace(
                context, data=lambda _: trying, work=context.work / f"shape{number}", details={}, world=1, rank=0
            )
            smaller = instance.apply(checkpoint, quick, part)
            loss = divergence(checkpoint, smaller, judging, dtype=context.dtype, device=context.device)
            options.append((loss, number, option))
            row = {"layers": list(named or ()), "heads": shape.heads, "mlp": shape.neurons}
            size = {"parameters": shape.spec.parameters, "bytes": lay_out(shape.spec, _ONE_FILE).bytes}
            rows.append(row | size | {"divergence": loss})
            task.advance(note=f"{loss:.4f}")
    _, number, best = min(options, key=lambda o: o[:2])
    amounts = {"layers": best.layers, "heads": best.heads, "mlp": best.mlp}
    return {"best": amounts, "shapes": [row | {"chosen": i == number} for i, row in enumerate(rows)]}
