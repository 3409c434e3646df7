"""Work of `prune_structured`, from headers: choosing blocks, solving for units, repair. No torch here."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from compress.architectures import resize
from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import TRIAL_SAMPLES
from compress.passes.prune_structured import widths
from compress.passes.work import BACK_WITH_WEIGHTS, SampleSize, Tuning, model_work, prediction_work, runner_work
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.passes.prune_structured.settings import PruneStructuredSettings

#: Equations that `solvers.ridge` solves for a matrix, at most.
RIDGES = 7
#: Steps in which `solvers.obs` removes the units of a matrix at most.
_STEPS = 256


def structured_work(spec: Spec, settings: PruneStructuredSettings, size: SampleSize | None) -> Work | None:
    """Return the work; None for experts, hidden channels, a target, and an allocation, whose work the data tell."""
    unknown = (settings.experts, settings.active_experts, settings.hidden)
    if settings.searched or settings.allocation == "kl" or any(amount is not None for amount in unknown):
        return None
    if size is None or not model_map(spec).known:
        return None
    result, whole, smaller, count = Work(), spec, spec, 0
    if settings.layers is not None:
        depth = model_map(spec).depth
        count = widths.layers_to_drop(depth, settings.layers, settings.allow_noop)
        if not isinstance(settings.layers, tuple):
            result.add_all(_choice(spec, count, settings.layer_importance, size))
        smaller, _ = resize.without_blocks(spec, range(depth - count, depth))
    result.add_all(_narrowing(smaller, settings, size))
    if settings.layers is not None and settings.compensation != "none":
        result.add_all(model_work(whole, size))  # the original's hidden states, which blocks are repaired towards
        result.add_all(_gaps(smaller, count, size))
    return result


def _choice(spec: Spec, count: int, importance: str, size: SampleSize) -> Work:
    """Work of choosing blocks.

    What leaves a race when is known afterwards. By experience (183, 148 and 75 samples on SmolLM2 and two models of six blocks)
    all races are as long as if every block were tried on two samples, and one set of each race on all.
    """
    if importance == "block_influence":
        return model_work(spec, size)
    depth, result = model_map(spec).depth, Work()
    races = count + (count > 1)
    samples = 2 * depth + races * TRIAL_SAMPLES
    one = SampleSize(1, size.length)
    result.add_all(model_work(spec, one, 1 / 2), samples)
    result.add_all(prediction_work(spec, size.length), samples)
    result.add_all(model_work(spec, SampleSize(TRIAL_SAMPLES, size.length), 1.0 + count))
    return result


def _gaps(spec: Spec, count: int, size: SampleSize) -> Work:
    """Work of least squares in front of so many removed blocks, none of them neighbours."""
    result, mapped = Work(), model_map(spec)
    if not mapped.depth:
        return result
    block = mapped.blocks[0]
    last = next((x for x in reversed(block.linears) if x.expert is None), None)
    if last is not None:
        result.add_all(model_work(spec, size, count / mapped.depth))
        result.add("product", last.I, last.I, float(count * size.tokens))
        result.add("product", last.I, last.O, float(count * size.tokens))
        result.add("least_squares", last.O, last.I, float(RIDGES * count))
    return result


def _narrowing(spec: Spec, settings: PruneStructuredSettings, size: SampleSize) -> Work:
    """Work of removing neurons and heads, and of the repair of blocks."""
    planned = widths.widths(spec, settings)
    tuned = settings.compensation == "reconstruction"
    readers = {f"{one.name}.weight": (one, count) for units in planned.remove.values() for one, count in units if count}
    merged = {f"{merge.output.module}.weight" for merge in planned.merges.values()}
    result, kinds = Work(), len({one.kind for one, _ in readers.values()}) + 3 * bool(merged)
    if not readers and not merged and not tuned:
        if settings.layers is not None and settings.compensation != "none":
            result.add_all(runner_work(spec, set(), size, (), factor=None))
        return result
    if settings.importance == "taylor" and readers:
        result.add_all(model_work(spec, size, 1 + BACK_WITH_WEIGHTS))
        result.add_all(prediction_work(spec, size.tokens, BACK_WITH_WEIGHTS))
    if settings.compensation == "none" and settings.importance in ("magnitude", "taylor"):
        return result
    tuning = Tuning(settings.reconstruction_epochs, "floats") if tuned else None
    names = {*readers, *merged}
    if not names:  # only blocks behind the first removed one are repaired, and that is in the middle as a rule
        mapped = model_map(spec)
        repaired = runner_work(spec, set(), size, (), factor=None, tuning=tuning)
        passed = runner_work(spec, set(), size, (), factor=None)
        result.add_all(repaired, 1 / 2)
        result.add_all(passed, 1 / 2)
        return result if mapped.depth else Work()
    result.add_all(runner_work(spec, names, size, (), factor="inverse", tuning=tuning, passes=float(kinds)))
    linears = model_map(spec).linears
    for name, (units, count) in readers.items():
        x = linears[name]
        experts = max(1, x.experts)
        if settings.importance == "obs":
            at_once = max(1, count // _STEPS) if units.groups == 1 else 1
            result.add("obs", x.O // experts, x.I, ceil(count / at_once) * experts)
        if settings.compensation != "none":
            result.add("least_squares", x.O // experts, x.I, experts)
    for name in merged:
        result.add("factor", 0, linears[name].I)
        result.add("product", linears[name].I, linears[name].I, 2.0 * linears[name].O)
    return result
