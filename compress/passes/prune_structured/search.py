"""Search for a shape: the blocks, heads and neurons to remove so that a target is met at the least divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import lcm
from typing import TYPE_CHECKING, Any, Protocol

from compress.architectures import resize
from compress.architectures.model_map import model_map
from compress.checkpoint.layout import lay_out
from compress.errors import PassError
from compress.passes.base import Context
from compress.passes.prune_structured import widths
from compress.passes.prune_structured.removable import removable
from compress.passes.prune_structured.settings import TARGETS
from compress.passes.prune_structured.speed import Stopwatch, work
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.passes.prune_structured.settings import PruneStructuredSettings

#: Most shapes that are tried; of more candidates, those at equal steps of depth.
MOST = 12
#: Largest share of neurons, and of heads, that a shape removes. It removes at most half of the blocks.
_MOST_NEURONS, _MOST_HEADS = 0.75, 0.5
#: Most calibration samples on which a shape is solved, and on which its divergence is measured.
_TRY, _HELD_OUT = 32, 16
#: Most numbers of blocks, of heads and of neurons among the shapes that are timed.
_MEASURED = (8, 3, 17)
_ONE_FILE = 1 << 62


class Planner(Protocol):
    """The part of the pass that the search uses: plan a shape, and apply it."""

    def plan(self, spec: Spec, settings: PruneStructuredSettings) -> Spec:
        """Spec of the smaller checkpoint."""
        ...

    def apply(self, checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context) -> Checkpoint:
        """The smaller checkpoint."""
        ...


@dataclass(frozen=True)
class Shape:
    """Numbers of blocks, heads and neurons (of the narrowest MLP) to remove, with the settings that remove them and their plan.

    ``prefill`` is the measured ratio to the original's time for a prompt, for a target of speed.
    """

    layers: int
    heads: int
    neurons: int
    settings: PruneStructuredSettings
    spec: Spec
    prefill: float | None = None

    @property
    def amounts(self) -> tuple[int, int, int]:
        """Numbers of blocks, heads and neurons to remove."""
        return self.layers, self.heads, self.neurons

    def less(self, other: Shape) -> bool:
        """Whether it removes no more of any kind, and less of one."""
        pairs = zip(self.amounts, other.amounts, strict=True)
        return self.amounts != other.amounts and all(a <= b for a, b in pairs)


def meets(spec: Spec, before: Spec, settings: PruneStructuredSettings) -> bool:
    """Whether a planned checkpoint meets the size targets. Headers do not show its speed."""
    small = settings.keep_parameters is None or spec.parameters <= settings.keep_parameters * before.parameters
    return small and (settings.max_bytes is None or lay_out(spec, _ONE_FILE).bytes <= settings.max_bytes)


def estimate(planner: Planner, spec: Spec, settings: PruneStructuredSettings) -> Spec:
    """Spec of a shape that meets the target, assuming that time for a prompt is proportional to the weights of blocks.

    Raises:
        PassError: no shape is as small as asked.
    """
    if settings.max_latency_ratio is None:
        return shapes(planner, spec, settings)[0].spec
    bound = settings.max_latency_ratio * work(spec)
    fitting, smallest = _least(
        planner,
        spec,
        settings,
        list(_depths_and_heads(spec)),
        _options(spec, settings),
        lambda shape: meets(shape.spec, spec, settings) and work(shape.spec) <= bound,
    )
    if not fitting and (smallest is None or not meets(smallest, spec, settings)):
        raise _too_large(smallest, spec, settings)
    # an estimate refuses nothing: the measurement decides
    return max((shape.spec for shape in fitting), key=lambda s: s.parameters, default=smallest or spec)


def shapes(planner: Planner, spec: Spec, settings: PruneStructuredSettings) -> list[Shape]:
    """Shapes that meet the size target, from headers alone, without those that only remove more than another one.

    Each has the fewest removed neurons for its numbers of blocks and heads.

    Raises:
        PassError: no shape meets the target.
    """
    if meets(spec, spec, settings):
        raise PassError(
            "the model is that small already", key=_key(settings), fix="ask for less, or leave the pass out"
        )
    pairs, options = list(_depths_and_heads(spec)), _options(spec, settings)
    fitting, smallest = _least(planner, spec, settings, pairs, options, lambda shape: meets(shape.spec, spec, settings))
    if not fitting:
        raise _too_large(smallest, spec, settings)
    return fitting[:: max(1, -(-len(fitting) // MOST))]


def fast_shapes(
    planner: Planner, checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context
) -> list[Shape]:
    """Shapes that are measured to be as fast as asked: those with the most parameters.

    Raises:
        PassError: none of the measured shapes is.
    """
    spec, target = checkpoint.spec, settings.max_latency_ratio
    assert target is not None
    watch, ratios = Stopwatch(checkpoint, context), {}
    pairs, options = _measured_pairs(spec), _evenly_spaced(_options(spec, settings), _MEASURED[2])
    with context.progress.task("measuring shapes", 2 + len(pairs) * len(options).bit_length()) as task:

        def fits(shape: Shape) -> bool:
            if shape.spec is spec or not meets(shape.spec, spec, settings):
                return False
            ratios[shape.amounts] = watch.ratio(shape.spec)
            task.advance(note=f"{ratios[shape.amounts]:.2f}")
            return ratios[shape.amounts] <= target

        # the smallest shape first: if it is too slow, all others are
        fit, smallest = _least(planner, spec, settings, pairs[-1:], options[-1:], fits)
        fitting = _least(planner, spec, settings, pairs, options, fits)[0] if fit or smallest is None else []
    if not ratios:
        raise _too_large(smallest, spec, settings)
    if not fitting:
        raise PassError(
            f"no shape reads a prompt that fast; the fastest takes {min(ratios.values()):.2f} of the original's time",
            key="max_latency_ratio",
            fix="ask for less, or name the amounts yourself",
        )
    largest = sorted(fitting, key=lambda shape: -shape.spec.parameters)[:MOST]
    return [replace(shape, prefill=ratios[shape.amounts]) for shape in largest]


def _key(settings: PruneStructuredSettings) -> str:
    return next(key for key in TARGETS if getattr(settings, key) is not None)


def _too_large(smallest: Spec | None, spec: Spec, settings: PruneStructuredSettings) -> PassError:
    least = f"{smallest.parameters / spec.parameters:.1%} of the parameters" if smallest else "none"
    return PassError(
        f"no shape is that small; the smallest that is tried keeps {least}",
        key=_key(settings),
        fix="ask for less, or name the amounts yourself",
    )


def _least(
    planner: Planner,
    spec: Spec,
    settings: PruneStructuredSettings,
    pairs: Sequence[tuple[int, int]],
    options: Sequence[int],
    fits: Callable[[Shape], bool],
) -> tuple[list[Shape], Spec | None]:
    """Fewest neurons to remove, from the ascending ``options``, so that a shape fits, for each pair (blocks, heads).

    Returns:
        These shapes, without those that only remove more than another one; and the smallest spec that was planned.
    """
    least: list[Shape] = []
    smallest: Spec | None = None
    width = _width(spec)
    for layers, heads in pairs:
        if any(s.layers <= layers and s.heads <= heads and not s.neurons for s in least):
            continue  # every shape here removes more than that one
        fixed = {"layers": layers or None, "heads": heads or None}
        low, high = 0, len(options)  # binary search: fewer neurons are smaller and faster
        best: Shape | None = None
        while low < high:
            middle = (low + high) // 2
            planned = _planned(planner, spec, settings, fixed, options[middle], width)
            if planned is None:  # no config has this number of heads or neurons
                break
            smallest = planned[1] if smallest is None or planned[1].parameters < smallest.parameters else smallest
            shape = Shape(layers, heads, options[middle], *planned)
            if fits(shape):
                best, high = shape, middle
            else:
                low = middle + 1
        if best is not None:
            least.append(best)
    return [shape for shape in least if not any(other.less(shape) for other in least)], smallest


def _depths_and_heads(spec: Spec) -> Iterator[tuple[int, int]]:
    mapped = model_map(spec)
    attention = mapped.record.attention
    step = mapped.heads // mapped.kv_heads  # whole groups, which make the cache smaller too
    movable = attention is not None and attention.free
    for layers in range(mapped.depth // 2 + 1):
        for heads in range(0, int(_MOST_HEADS * mapped.heads) + 1, step) if movable else (0,):
            yield layers, heads


def _measured_pairs(spec: Spec) -> list[tuple[int, int]]:
    """A part of these pairs, since each is measured several times."""
    pairs = list(_depths_and_heads(spec))
    depths, heads = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    return [(d, h) for d in _evenly_spaced(depths, _MEASURED[0]) for h in _evenly_spaced(heads, _MEASURED[1])]


def _evenly_spaced(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the values at equal steps, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _width(spec: Spec) -> int:
    """Neurons of the narrowest MLP."""
    units = chain.from_iterable(resize.mlp_units(spec).values())
    return min((one.count for one in units), default=0)


def _options(spec: Spec, settings: PruneStructuredSettings) -> range:
    """Numbers of neurons of the narrowest MLP that may be removed."""
    width, units = _width(spec), chain.from_iterable(resize.mlp_units(spec).values())
    step = widths.step(width, lcm(*(one.multiple for one in units)), settings.multiples)
    return range(0, int(_MOST_NEURONS * width) + 1, step)


def _planned(
    planner: Planner,
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
        return chosen, planner.plan(spec, chosen)
    except PassError:
        return None


def search(
    planner: Planner, checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context
) -> PruneStructuredSettings:
    """Settings of the shape with the least divergence from the original.

    Each shape is tried with least squares, without reconstruction, on some of the calibration samples and compared on others.
    ``context.details["shapes"]`` gets a row for each.
    """
    result = context.workspace.cached("shape", lambda: _tried(planner, checkpoint, settings, context))
    context.details["shapes"] = result["shapes"]
    best = result["best"]
    layers = None if best["layers"] is None else tuple(best["layers"])
    return settings.model_copy(update={**best, "layers": layers, **dict.fromkeys(TARGETS)})


def _tried(
    planner: Planner, checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context
) -> dict[str, Any] | None:
    """Amounts of the best shape, and a row for each; None in other processes than the first."""
    if context.processes.rank:
        return None
    from compress.sensitivity.depth import DepthOptions, choose_blocks, divergence

    if settings.max_latency_ratio is None:
        candidates = shapes(planner, checkpoint.spec, settings)
    else:
        candidates = fast_shapes(planner, checkpoint, settings, context)
    data = context.data("calibration")
    held = min(_HELD_OUT, max(1, len(data.ids) // 4))
    trying, judging = data.first(min(_TRY, len(data.ids) - held)), data.last(held)
    order: list[int] = []
    if deepest := max(shape.layers for shape in candidates):
        options = DepthOptions(
            context.dtype,
            context.device,
            context.max_ram,
            groups=False,
            can_go=removable(planner.plan, checkpoint.spec),
        )
        workspace = context.workspace.folder("depth").alone()
        choice = choose_blocks(checkpoint, trying, deepest, options, workspace=workspace, progress=context.progress)
        order = choice.order
    rows = []
    tried = []
    with context.progress.task("trying shapes", len(candidates)) as task:
        for number, shape in enumerate(candidates):
            named = tuple(sorted(order[: shape.layers])) or None
            option = shape.settings.model_copy(update={"layers": named})
            quick = option.model_copy(update={"compensation": "least_squares"})
            smaller = planner.apply(checkpoint, quick, context.part(f"shape{number}", data=lambda _: trying))
            loss = divergence(
                checkpoint,
                smaller,
                judging,
                dtype=context.dtype,
                device=context.device,
                work=context.workspace.path,
            )
            tried.append((loss, number, option))
            row = {"layers": list(named or ()), "heads": shape.heads, "mlp": shape.neurons}
            size = {"parameters": shape.spec.parameters, "bytes": lay_out(shape.spec, _ONE_FILE).bytes}
            fast = {} if shape.prefill is None else {"prefill": shape.prefill}
            rows.append(row | size | fast | {"divergence": loss})
            task.advance(note=f"{loss:.4f}")
    _, number, best = min(tried, key=lambda o: o[:2])
    amounts = {"layers": best.layers, "heads": best.heads, "mlp": best.mlp}
    return {"best": amounts, "shapes": [row | {"chosen": i == number} for i, row in enumerate(rows)]}
