"""Removal of units: choose them, then prune and repair with a block runner. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures import resize
from compress.architectures.groups import PrunableGroup
from compress.architectures.model_map import Linear, model_map
from compress.blockwise.reconstruct import Reconstruction
from compress.blockwise.targets import Teacher
from compress.checkpoint.values import Checkpoint, Derived
from compress.passes.base import Context
from compress.passes.blockwise import open_runner, require_run, trains_predictions
from compress.passes.prune_structured import slicing, widths
from compress.passes.prune_structured.allocation import uneven_widths
from compress.passes.prune_structured.block import WidthOptions, magnitude, prune_block_width
from compress.passes.prune_structured.importance import channel_importance, expert_saliency
from compress.passes.prune_structured.taylor import taylor_scores
from compress.sensitivity.block_influence import block_influence
from compress.sensitivity.depth import DepthOptions, choose_blocks
from compress.solvers.obs import keep_by_score

if TYPE_CHECKING:
    from compress.passes.prune_structured.settings import PruneStructuredSettings


def drop_layers(
    checkpoint: Checkpoint,
    settings: PruneStructuredSettings,
    context: Context,
    can_go: Callable[[tuple[int, ...]], bool] | None,
) -> tuple[Checkpoint, list[int]]:
    """Remove blocks. Also returns for each remaining block the number of original blocks that its output stands for.

    Args:
        can_go: see `removable`.
    """
    depth = model_map(checkpoint.spec).depth
    if settings.layers is None:
        return checkpoint, list(range(1, depth + 1))
    if isinstance(settings.layers, tuple):
        drop: Sequence[int] = settings.layers
    else:
        count = widths.layers_to_drop(depth, settings.layers, settings.allow_noop)
        choice = context.workspace.cached("blocks", lambda: _worst_blocks(checkpoint, count, settings, context, can_go))
        context.details.update(choice["details"])
        drop = sorted(choice["blocks"])
        if without_loss := _without_loss(choice):
            require_run(checkpoint, without_loss, context)
    context.details["removed_blocks"] = list(drop)
    keep = [i for i in range(depth) if i not in drop]
    return slicing.drop_blocks(checkpoint, drop), [*keep[1:], depth]


def _without_loss(choice: Mapping[str, Any]) -> set[int]:
    """The chosen blocks whose removal changes nothing on the data."""
    rows = choice["details"].get("loss_without_block") or [
        {str(i): score for i, score in enumerate(choice["details"]["block_influence"])}
    ]
    return {i for i in choice["blocks"] if any(row.get(str(i)) == 0 for row in rows)}


def _worst_blocks(
    checkpoint: Checkpoint,
    count: int,
    settings: PruneStructuredSettings,
    context: Context,
    can_go: Callable[[tuple[int, ...]], bool] | None,
) -> dict[str, Any] | None:
    """Indices of the blocks to remove, and their rows for the report; None in other processes than the first."""
    if context.processes.rank:
        return None
    data = context.data("calibration")
    if settings.layer_importance == "kl":
        options = DepthOptions(context.dtype, context.device, context.max_ram, can_go=can_go)
        workspace = context.workspace.folder("depth").alone()
        choice = choose_blocks(checkpoint, data, count, options, workspace=workspace, progress=context.progress)
        return {"blocks": choice.order, "details": choice.details()}
    scores = block_influence(checkpoint, data, dtype=context.dtype, device=context.device, progress=context.progress)
    gone = sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count]
    return {"blocks": gone, "details": {"block_influence": scores}}


def drop_experts(checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context) -> Checkpoint:
    """Remove the experts of least saliency in each block."""
    if settings.experts is None:
        return checkpoint
    keep = widths.experts_to_keep(checkpoint.spec, settings.experts)
    names = {x.name for x in _layers(checkpoint) if x.block in keep and x.expert is not None}
    runner = open_runner(checkpoint, names, context, workspace=context.workspace.folder("experts"), with_targets=False)
    saliency, context.details["experts"] = expert_saliency(runner)
    context.details["expert_saliency"] = {str(i): scores for i, scores in saliency.items()}
    chosen = {}
    for index, scores in saliency.items():
        chosen[index] = keep_by_score(torch.tensor(scores), len(scores) - keep[index])
    context.details["kept_experts"] = {str(i): experts for i, experts in chosen.items()}
    return slicing.drop_experts(checkpoint, chosen)


def drop_hidden(
    checkpoint: Checkpoint, settings: PruneStructuredSettings, context: Context
) -> tuple[Checkpoint, torch.Tensor | None]:
    """Remove the least important hidden channels. Also returns the kept channels; None for all."""
    if settings.hidden is None:
        return checkpoint, None
    width = model_map(checkpoint.spec).hidden
    left = widths.hidden_to_keep(checkpoint.spec, settings.hidden, settings.multiples)
    if settings.importance == "magnitude":
        importance = torch.zeros(width, dtype=torch.float64)
        entries, _ = resize.hidden_entries(checkpoint.spec, range(width))
        for name, axes in entries.items():
            value = checkpoint.tensor(name).data.double().square()
            (axis,) = axes
            if value.ndim == 2:
                importance += value.sum(1 - axis)
    else:
        names = {x.name for x in _layers(checkpoint)}
        runner = open_runner(
            checkpoint, names, context, workspace=context.workspace.folder("hidden"), with_targets=False
        )
        importance = channel_importance(runner, width)
    channels = keep_by_score(importance, width - left)
    context.details["hidden_channels"] = len(channels)
    return slicing.narrow_hidden(checkpoint, channels), torch.tensor(channels)


def narrow(
    original: Checkpoint,
    current: Checkpoint,
    spans: Sequence[int],
    channels: torch.Tensor | None,
    settings: PruneStructuredSettings,
    context: Context,
) -> Checkpoint:
    """Remove neurons and heads, and repair the rest."""
    own = uneven_widths(current, widths.widths(current.spec, settings), settings, context)
    planned = widths.widths(current.spec, settings, own)
    narrower = any(planned.remove.values()) or bool(planned.merges)
    changed_before = any(part is not None for part in (channels, settings.active_experts, settings.experts))
    tuned = settings.compensation == "reconstruction"
    gaps = [] if settings.compensation == "none" else _before_gaps(spans)
    if not narrower and not tuned and not gaps:
        return current
    scores = _gradients(current, planned, settings, context) if narrower else {}
    by_weights = settings.importance == "magnitude" or (bool(scores) and not planned.merges)
    if settings.compensation == "none" and by_weights:
        return _by_weights(current, planned, scores)
    first = 0 if narrower or changed_before else next((j for j, end in enumerate(spans) if end != j + 1), len(spans))
    members = {f"{m.module}.weight" for units in planned.remove.values() for one, _ in units for m in one.members}
    members |= {f"{m.module}.weight" for merge in planned.merges.values() for m in merge.members}
    if tuned:
        names = {x.name for x in _layers(current) if (x.block or 0) >= first}
    else:
        names = members | {x.name for x in _layers(current) if x.block in gaps}
    if not names:
        return current
    teacher = None
    if (tuned or gaps) and current is not original:
        teacher = Teacher(original, spans, channels)
    runner = open_runner(
        current,
        names,
        context,
        workspace=context.workspace,
        with_targets=tuned or bool(gaps),
        teacher=teacher,
        leave=names - members,
    )
    reconstruction = None
    if tuned:
        predictions = channels is None and trains_predictions(current.spec, settings.reconstruction_target)
        reconstruction = Reconstruction(
            settings.reconstruction_epochs, settings.reconstruction_lr, predictions=predictions
        )
    compensate = settings.compensation != "none"
    options = WidthOptions(
        planned.remove, planned.merges, settings.importance, compensate, reconstruction, scores, gaps
    )
    result = runner.run(lambda block: prune_block_width(block, options), "removing units" if narrower else "repairing")
    kept = {row["block"]: row.pop("kept", {}) for row in result.details}
    context.details["blocks"] = result.details
    repaired = Derived(current, current.spec, result.reader())
    if not narrower:
        return repaired
    chosen = [(one, kept[index][one.name]) for index, units in planned.remove.items() for one, _ in units]
    return slicing.narrow(repaired, [*chosen, *planned.merged()], planned)


def _before_gaps(spans: Sequence[int]) -> list[int]:
    """The remaining blocks that stand for more than one of the original's."""
    starts = [0, *spans]
    return [block for block, end in enumerate(spans) if end - starts[block] > 1]


def _gradients(
    checkpoint: Checkpoint, planned: widths.Widths, settings: PruneStructuredSettings, context: Context
) -> dict[str, list[float]]:
    """With `importance: taylor`: importance of each unit by the name of the module that reads it."""
    units = [one for block in planned.remove.values() for one, _ in block]
    if settings.importance != "taylor" or not units:
        return {}

    def compute() -> dict[str, list[float]] | None:
        if context.processes.rank:
            return None
        return taylor_scores(
            checkpoint,
            units,
            context.data("calibration"),
            dtype=context.dtype,
            device=context.device,
            seed=context.seed,
            progress=context.progress,
        )

    scores: dict[str, list[float]] = context.workspace.cached("taylor", compute)
    return scores


def _by_weights(checkpoint: Checkpoint, planned: widths.Widths, scores: Mapping[str, Sequence[float]]) -> Checkpoint:
    """Slice tensor by tensor: by the scores, or without any by magnitude."""
    linears = model_map(checkpoint.spec).linears
    chosen: list[tuple[PrunableGroup, list[int]]] = []
    for units in planned.remove.values():
        for one, remove in units:
            if scores:
                score = torch.tensor(scores[one.name])
            else:
                values = {f"{m.module}.weight": checkpoint.tensor(f"{m.module}.weight").data for m in one.members}
                score = magnitude(one, {n: value.T if linears[n].transposed else value for n, value in values.items()})
            chosen.append((one, keep_by_score(score, remove, runs=one.groups)))
    merged = slicing.merge(checkpoint, planned.merges.values())
    return slicing.narrow(merged, [*chosen, *planned.merged()], planned)


def _layers(checkpoint: Checkpoint) -> list[Linear]:
    """The weights of linear layers of blocks; without those that attend to an encoder, where the model has none."""
    mapped = model_map(checkpoint.spec)
    cross = mapped.record.cross if not mapped.record.stacks else None
    unused = set() if cross is None else {cross.query, cross.key, cross.value, cross.output}
    inside = (linear for linear in mapped.layers if len(linear.tensor.shape) == 2 and linear.block is not None)
    return [linear for linear in inside if linear.part not in unused]
