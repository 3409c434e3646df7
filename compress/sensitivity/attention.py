"""Queries, keys and values as a model's attention functions get them, and what heads would output under a window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compress.checkpoint.edits.local_cache import HeadWindows

#: Queries whose scores are in memory at a time.
_QUERIES = 256


@dataclass(frozen=True)
class Sight:
    """Tokens that a query sees: the last ``window``, itself among them, and the ``first`` of the text; or by a ``pattern``.

    With ``logits`` each head has a logit in its denominator, which stands for what the window drops.
    """

    window: int
    first: int = 0
    pattern: HeadWindows | None = None
    logits: bool = False

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether the queries at some places see the keys at others, itself always; those after it count too."""
        if self.pattern is not None:
            return self.pattern.sees(queries, keys) | (queries == keys)
        return (queries - keys < self.window) | (keys < self.first) | (queries == keys)


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function.

    Attributes:
        query, key, value: after rotary positions, [samples, heads, tokens, width]; keys and values have a head per KV group.
        output: of the heads, [samples, tokens, heads, width], part of the graph.
        scale: of the scores. softcap: bound on the scores; None for none.
        mask: bool, or added to the scores, [samples, 1 or heads, tokens, tokens]; None for a causal one.
        window: the window that the block has already. sinks: logits that its heads have already, [heads].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    scale: float
    softcap: float | None
    mask: torch.Tensor | None
    window: int | None
    sinks: torch.Tensor | None


@contextmanager
def observed_attention(observe: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Within, ``observe`` sees every call of an attention function of transformers, whichever it is."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    interface: Any = ALL_ATTENTION_FUNCTIONS
    original = interface.get_interface

    def get_interface(*args: Any, **kwargs: Any) -> Any:
        function = original(*args, **kwargs)

        def attention(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **call: Any
        ) -> Any:
            result = function(module, query, key, value, attention_mask, *args, **call)
            scale = call.get("scaling") or query.shape[-1] ** -0.5
            sinks = call.get("s_aux")
            observe(
                AttentionCall(
                    query.detach(),
                    key.detach(),
                    value.detach(),
                    result[0],
                    float(scale),
                    call.get("softcap"),
                    attention_mask,
                    call.get("sliding_window"),
                    None if sinks is None else sinks.detach().float(),
                )
            )
            return result

        return attention

    interface.get_interface = get_interface
    try:
        yield
    finally:
        del interface.get_interface


@dataclass(frozen=True)
class WindowedHeads:
    """Outputs of heads under a window, for some queries.

    Attributes:
        output: without logits of sinks, float32 [samples, heads, queries, width].
        mass: log-sum of the scores that are seen; lost: of those that are not, minus infinity where all are seen; both
            float32 [samples, heads, queries].
    """

    output: torch.Tensor
    mass: torch.Tensor
    lost: torch.Tensor


def under_windows(call: AttentionCall, sights: Sequence[Sight]) -> Iterator[tuple[slice, list[WindowedHeads]]]:
    """Compute the heads again under each of the windows, a few hundred queries at a time.

    Yields:
        The queries, and for each sight what the heads output. Each query sees itself at least.
    """
    q, k, v = call.query.float(), call.key.float(), call.value.float()
    heads, tokens = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    at = torch.arange(tokens, device=q.device)
    for start in range(0, tokens, _QUERIES):
        rows = slice(start, min(start + _QUERIES, tokens))
        scores = q[:, :, rows] @ k[:, :, : rows.stop].mT * call.scale
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        ago = at[rows, None] - at[None, : rows.stop]
        scores = scores.masked_fill(ago < 0, -torch.inf)
        if call.window is not None:
            scores = scores.masked_fill(ago >= call.window, -torch.inf)
        if call.mask is not None:
            mask = call.mask[..., rows, : rows.stop]
            hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
            scores = scores if mask.dtype == torch.bool else scores + mask.float()
            scores = scores.masked_fill(hidden, -torch.inf)  # what is hidden is not lost
        results = []
        for sight in sights:
            seen = sight.sees(at[rows, None], at[None, : rows.stop])
            first = 0 if sight.pattern else max(0, start - sight.window + 1)
            keys = at[: rows.stop] if first <= sight.first else torch.cat([at[: sight.first], at[first : rows.stop]])
            part = scores[..., keys].masked_fill(~seen[:, keys], -torch.inf)
            mass = part.logsumexp(-1)
            output = (part - mass[..., None]).exp() @ v[:, :, keys]
            lost = scores.masked_fill(seen, -torch.inf).logsumexp(-1)
            results.append(WindowedHeads(output.nan_to_num(), mass, lost))
        yield rows, results
