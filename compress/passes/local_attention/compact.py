"""Windows that no stock class expresses, as edits ``local``: of KV heads, with first tokens that stay, or by a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.architectures.conversions.windows import current_windows
from compress.architectures.model_map import model_map
from compress.checkpoint.edits.local import attentions, localised
from compress.checkpoint.edits.local_cache import HeadWindows
from compress.errors import PassError
from compress.passes.base import Context
from compress.passes.details import WindowDetails
from compress.passes.local_attention.choose import Windows, trained_length
from compress.passes.local_attention.divergence import window_losses
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


@dataclass(frozen=True)
class HeadChoice:
    """The window of each KV head.

    Attributes:
        windows: by block and KV head, the tokens of its window; None for everything.
        losses: by unit (KV heads of all blocks, or blocks), the predicted loss of its smallest window in nats per token; empty
            where it was not measured.
        by: ``heads`` or ``layers``, the units.
    """

    windows: tuple[tuple[int | None, ...], ...]
    losses: tuple[float, ...]
    by: str

    def blocks(self) -> Windows:
        """The windows by block: that of its local heads, None for a block without any."""
        return Windows(tuple(next((w for w in heads if w is not None), None) for heads in self.windows))

    def rows(self) -> list[WindowDetails]:
        """A row per block or per KV head for the report."""
        rows: list[WindowDetails] = []
        for block, heads in enumerate(self.windows):
            if self.by == "layers":
                rows.append({"block": block, "window": heads[0]})
            else:
                rows += [{"block": block, "head": head, "window": window} for head, window in enumerate(heads)]
        total = sum(self.losses)
        for row, loss in zip(rows, self.losses, strict=False):
            row["loss"], row["share"] = loss, loss / total if total > 0 else 0.0
        return rows


def values_of(settings: LocalAttentionSettings, spec: Spec, window: int) -> dict[str, Any]:
    """Values of an edit ``local`` with that window, all heads local.

    Raises:
        PassError: the config does not say how long the texts of the training were.
    """
    positions = settings.positions or model_map(spec).trained_positions
    if positions is None:
        raise PassError(
            "the config does not say how many positions the model is trained for",
            key="positions",
            fix="set `positions`",
        )
    more = {"strided": {"stride": settings.stride or window}, "fixed": {"keep": min(settings.keep, window)}}
    heads = model_map(spec).kv_heads
    values = {"window": window, "sinks": int(settings.sinks), "heads": heads, "full": (), "positions": positions}
    return {**values, "pattern": settings.pattern, **more.get(settings.pattern, {})}


def held_by(settings: LocalAttentionSettings, spec: Spec, length: int) -> list[int]:
    """Tokens that a KV head caches at a length: of all of them, then with each window."""
    return [length, *(HeadWindows(values_of(settings, spec, window)).count(length) for window in settings.window)]


def _units(spec: Spec, settings: LocalAttentionSettings) -> list[list[tuple[int, int]]]:
    """The (block, KV head) pairs of each unit that may get a window, in order."""
    heads = range(model_map(spec).kv_heads)
    blocks = sorted(attentions(spec).values())
    if settings.by == "heads":
        return [[(block, head)] for block in blocks for head in heads]
    return [[(block, head) for head in heads] for block in blocks]


def _budget(spec: Spec, settings: LocalAttentionSettings, units: int) -> int:
    """Tokens that all units may cache at the length where costs are counted.

    Raises:
        PassError: there are not so many units, or no choice meets ``max_cache``.
    """
    length = trained_length(spec, settings) or 2 * max(settings.window)
    everything, *windows = held_by(settings, spec, length)
    if settings.max_cache is None:
        full = settings.full_count(_all(spec, settings))
        if full > units:
            raise PassError(f"only {units} {_name(settings)} see everything, and {full} are to stay so", key="full")
        if full == units:
            raise PassError(
                f"every one of the {_name(settings)} would stay full", key="full", fix="set a smaller `full`"
            )
        return full * everything + (units - full) * max(windows)
    budget = int(settings.max_cache * units * everything)
    if budget < units * min(windows):
        share = min(windows) / everything
        raise PassError(
            f"with windows everywhere the cache is {share:.1%} of the original's at {length} tokens",
            key="max_cache",
            fix=f"set a smaller `window`, or `max_cache: {share:.0%}` or more",
        )
    return budget


def _name(settings: LocalAttentionSettings) -> str:
    return "KV heads" if settings.by == "heads" else "blocks"


def _all(spec: Spec, settings: LocalAttentionSettings) -> int:
    """Number of units, those with stock windows among them."""
    mapped = model_map(spec)
    return mapped.depth * (mapped.kv_heads if settings.by == "heads" else 1)


def spread(spec: Spec, settings: LocalAttentionSettings) -> HeadChoice:
    """Every n-th unit full, from the first that may be, or the blocks that ``full`` lists; the others get the largest window.

    Raises:
        PassError: the settings do not fit the model.
    """
    units = _units(spec, settings)
    if isinstance(settings.full, tuple):
        known = {block for unit in units for block, _ in unit}
        if wrong := [block for block in settings.full if block not in known]:
            raise PassError(f"there is no block {wrong[0]} that sees everything", key="full")
        full = {number for number, unit in enumerate(units) if unit[0][0] in settings.full}
        if len(full) == len(units):
            raise PassError("every block would stay full", key="full", fix="set a smaller `full`")
    else:
        everything, *windows = held_by(settings, spec, trained_length(spec, settings) or 2 * max(settings.window))
        rest = _budget(spec, settings, len(units)) - len(units) * max(windows)
        count = max(0, rest) // (everything - max(windows)) if everything > max(windows) else 0
        full = {i * len(units) // count for i in range(count)}
    options = [0 if number in full else len(settings.window) for number in range(len(units))]
    return _chosen(spec, settings, units, options, ())


def _chosen(
    spec: Spec,
    settings: LocalAttentionSettings,
    units: Sequence[Sequence[tuple[int, int]]],
    options: Sequence[int],
    losses: tuple[float, ...],
) -> HeadChoice:
    """The choice by the option of each unit: 0 for everything, else the number of a window from 1."""
    mapped = model_map(spec)
    windows: list[list[int | None]] = [[None] * mapped.kv_heads for _ in range(mapped.depth)]
    for unit, option in zip(units, options, strict=True):
        for block, head in unit:
            windows[block][head] = settings.window[option - 1] if option else None
    return HeadChoice(tuple(map(tuple, windows)), losses, settings.by)


def choose_heads(checkpoint: Checkpoint, settings: LocalAttentionSettings, context: Context) -> HeadChoice:
    """The window of each unit: by measured divergence, or spread evenly. A resumed run measures nothing again.

    Raises:
        PassError: losses cannot be measured in this model. DataError: no sample is longer than the window.
    """
    spec = checkpoint.spec
    if settings.choose == "every" or isinstance(settings.full, tuple) or settings.full == 0:
        return spread(spec, settings)
    from compress.solvers.windows import choose

    units, options = _units(spec, settings), len(settings.window)
    budget = _budget(spec, settings, len(units))
    losses = window_losses(checkpoint, settings, context)
    heads = model_map(spec).kv_heads if settings.by == "heads" else 1
    numbers = [block * heads + (head if settings.by == "heads" else 0) for (block, head), *_ in units]
    rows = [number * options + option for number in numbers for option in range(options)]
    costs = held_by(settings, spec, trained_length(spec, settings) or 2 * max(settings.window))
    chosen = choose([costs] * len(units), losses.of(rows, options), budget)
    assert chosen is not None  # `_budget` holds the cheapest options
    return _chosen(spec, settings, units, chosen, tuple(losses.joint.diagonal()[::options].tolist()))


def planned_edits(spec: Spec, settings: LocalAttentionSettings, choice: HeadChoice) -> Spec:
    """The spec with those windows."""
    edits = {}
    for module, block in attentions(spec).items():
        heads = choice.windows[block]
        local = {window for window in heads if window is not None}
        if local:
            full = tuple(head for head, window in enumerate(heads) if window is None)
            edits[module] = {**values_of(settings, spec, min(local)), "full": full}
    return localised(spec, edits)


def check_edits(spec: Spec, settings: LocalAttentionSettings) -> None:
    """Raise `PassError` for settings and models that such windows do not fit."""
    if settings.target is not None:
        raise PassError("no stock class can express these windows", key="target", fix="leave `target` out")
    if any(edit.kind == "local" for edit in spec.structure.edits):
        raise PassError("the model has heads with windows of their own already", key="window", fix="leave the pass out")
    if spec.structure.auto_model is not None:
        raise PassError("a model with code of its own cannot be edited", key="by", fix="use `by: layers`")
    if not attentions(spec):
        window = current_windows(spec)[0]
        if window is None:
            raise PassError(
                "heads have logits of sinks, and none of these can have its own window",
                key="by",
                fix="use `by: layers`",
            )
        raise PassError(f"all blocks have a window of {window} already", key="window", fix="leave the pass out")
    positions, most = settings.positions or model_map(spec).trained_positions, max(settings.window)
    if positions is not None and most + int(settings.sinks) > positions:
        raise PassError(
            f"a window of {most} with {settings.sinks} first tokens is no shorter than the {positions} positions",
            key="sinks" if settings.positions is None else "positions",
        )
    length = trained_length(spec, settings) or positions
    if length is not None and max(held_by(settings, spec, length)[1:]) >= length:
        raise PassError(
            f"heads with these windows still see all of {length} tokens, so nothing would change",
            key="pattern" if settings.pattern in ("strided", "fixed") else "sinks",
            fix={"strided": "set a larger `stride`", "fixed": "set a smaller `keep`"}.get(
                settings.pattern, "set fewer"
            ),
        )
