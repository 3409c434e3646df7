"""The choice: which blocks are full, and the logits that stand for what a window drops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compress.architectures.conversions.windows import current_windows, unlike_positions
from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.details import WindowDetails
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.spec.spec import Spec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Windows:
    """The window of each block.

    Attributes:
        windows: by block, the tokens that it sees, the token itself among them; None for everything.
        sinks: block ▶ float32 logits [heads] in the denominator of its softmax. Blocks that are left out have none.
        values: block ▶ the value of its sinks, float32 [KV heads, width]; zero where it is left out.
        losses: by block, the predicted loss of its window in nats per token; empty where it was not measured.
    """

    windows: tuple[int | None, ...]
    sinks: Mapping[int, torch.Tensor] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    values: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @property
    def full(self) -> tuple[int, ...]:
        """Numbers of the blocks that see everything."""
        return tuple(i for i, window in enumerate(self.windows) if window is None)

    def rows(self) -> list[WindowDetails]:
        """A row per block for the report."""
        rows: list[WindowDetails] = [{"block": i, "window": window} for i, window in enumerate(self.windows)]
        total = sum(self.losses)
        for row, loss in zip(rows, self.losses, strict=False):
            row["loss"] = loss
            row["share"] = loss / total if total > 0 else 0.0
        return rows


def held(window: int | None, tokens: int) -> int:
    """Tokens of which a block caches keys and values, at a length: a stock window keeps one less than it sees."""
    return tokens if window is None else min(tokens, window - 1)


def trained_length(spec: Spec, settings: LocalAttentionSettings) -> int | None:
    """Tokens at which costs are counted: those of the settings, else the positions that the model is trained for."""
    return settings.at or model_map(spec).trained_positions


def full_blocks(spec: Spec, settings: LocalAttentionSettings) -> int:
    """Number of blocks that stay full.

    Raises:
        PassError: there are not so many, or no number meets ``max_cache``.
    """
    before = current_windows(spec)
    candidates = before.count(None)
    if settings.max_cache is None:
        count = settings.full_count(len(before))
        if count > candidates:
            few = (
                f"only {candidates} of {len(before)} blocks see everything"
                if candidates
                else "every block has a window"
            )
            raise PassError(f"{few}, and {count} are to stay so", key="full", fix=f"set `full: {candidates}`")
        return count
    length = trained_length(spec, settings)
    if length is None:
        raise PassError("the config does not say how many positions the model is trained for", key="at", fix="set `at`")
    window = max(settings.window)
    original = sum(held(w, length) for w in before)
    least = len(before) * held(window, length)
    count = int((settings.max_cache * original - least) // (length - held(window, length)))
    if count < 0:
        raise PassError(
            f"with windows of {window} everywhere the cache is {least / original:.1%} of the original's at {length} tokens",
            key="max_cache",
            fix=f"set a smaller `window`, or `max_cache: {least / original:.0%}` or more",
        )
    return min(count, candidates)


def evenly(spec: Spec, settings: LocalAttentionSettings) -> Windows:
    """Every n-th block full, from the first that may be; or the blocks that ``full`` lists.

    Raises:
        PassError: such blocks cannot stay full, or the others cannot have a window.
    """
    before, window = current_windows(spec), settings.window[0]
    candidates = [i for i, w in enumerate(before) if w is None]
    if isinstance(settings.full, tuple):
        full = settings.full
        if wrong := [i for i in full if i >= len(before)]:
            raise PassError(f"there is no block {wrong[0]}: the model has {len(before)}, numbered from 0", key="full")
        if wrong := [i for i in full if before[i] is not None]:
            raise PassError(f"block {wrong[0]} has a window of {before[wrong[0]]} already", key="full")
    else:
        count = full_blocks(spec, settings)
        full = tuple(candidates[i * len(candidates) // count] for i in range(count))
    if unlike_positions(spec) and len(full) < len(candidates):
        raise PassError(
            "full blocks have other rotary positions than sliding ones, so none can get a window",
            key="full",
            fix=f"set `full: {candidates}`, which makes the windows of the others smaller",
        )
    return Windows(tuple(None if i in full else window for i in range(len(before))))
