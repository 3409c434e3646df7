"""Causal attention in which a query sees a part of the tokens: windows, first tokens, strides, blocks, logits of sinks.

The patterns are those of StreamingLLM (2309.17453), of the Sparse Transformer (1904.10509) and of Llama 4 (chunks); the logits
are GPT-OSS's. Time and memory grow with the tokens that are seen: no mask of all pairs is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compress.checkpoint.attention.merged import Piece, columns, joined, merged, singles, span, stretches

# ---- attention: copied into the modelling file of compact checkpoints ----

#: Queries of a masked slice on the CPU: fewer cost calls, more cost products that the mask throws away.
SLICE = 64


@dataclass(frozen=True)
class LocalPattern:
    """The tokens j <= i that a query at position i sees: those near it, and some of the earlier ones.

    ``window``: near it are the last ``window`` tokens, its own among them; None for all.
    ``block``: near it are those of its own stretch of ``block`` tokens; not with ``window``.
    ``sinks``: it sees the first ``sinks`` tokens of the text (StreamingLLM).
    ``stride``: it sees every ``stride``-th token before it, (i - j) % stride == 0 (the strided form of the Sparse Transformer).
    ``last``: it sees the last ``last`` tokens of each earlier stretch of ``period`` tokens (the fixed form): a cache drops
    the others. ``period`` is the block if there is one.
    """

    window: int | None = None
    block: int | None = None
    sinks: int = 0
    stride: int | None = None
    last: int = 0
    period: int | None = None

    def __post_init__(self) -> None:
        lengths = (self.window, self.block, self.stride, self.period)
        near = self.window or self.block
        for wrong, problem in (
            (any(x is not None and x < 1 for x in lengths), "window, block, stride and period are at least 1"),
            (min(self.sinks, self.last) < 0, "sinks and last are at least 0"),
            (self.window is not None and self.block is not None, "give a window or a block"),
            ((self.stride or self.last) and near is None, "a stride, or last tokens, need a window or a block"),
            (self.stride and self.last, "give a stride or last tokens"),
            (
                self.block and {self.stride, self.period} - {None, self.block},
                "a stride or period beside a block is as long",
            ),
            (self.last > (self.period or self.block or 0), "last is at most the period"),
        ):
            if wrong:
                raise ValueError(f"{self}: {problem}")

    @property
    def length(self) -> int:
        """Tokens of a stretch whose last ones are seen."""
        return self.period or self.block or 0


def visible(pattern: LocalPattern, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Booleans: whether the queries at these positions see the keys at those. The tensors of positions broadcast."""
    seen = torch.ones_like(queries - keys, dtype=torch.bool)
    if pattern.window is not None:
        seen = queries - keys < pattern.window
    elif pattern.block is not None:
        seen = queries.div(pattern.block, rounding_mode="floor") == keys.div(pattern.block, rounding_mode="floor")
    return ((keys < pattern.sinks) | seen | _afar(pattern, queries, keys)) & (keys <= queries)


def _afar(pattern: LocalPattern, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Booleans: keys that are seen for the stride or as the last of an earlier stretch."""
    if pattern.stride:
        return (queries - keys) % pattern.stride == 0
    if pattern.last:
        return keys % pattern.length >= pattern.length - pattern.last
    return torch.zeros_like(queries - keys, dtype=torch.bool)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: LocalPattern,
    *,
    scale: float | None = None,
    logits: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    masked: bool | None = None,
) -> torch.Tensor:
    """Attention of the last q of k tokens. Differentiable once; the tensors may be of any floating dtype and device.

    Args:
        query: [B, H, q, D]. key: [B, G, k, D], G divides H, k >= q. value: [B, G, k, Dv].
        scale: of the scores; None for D ** -0.5.
        logits: [H], added to the softmax's denominator of each head: sinks without a value. Any dtype.
        padding: [B, k], True or 1 where there is a token; positions count from a row's first token. None: tokens everywhere.
        positions: [k] or [B, k], rising, of keys that are not all of the text: a cache that has dropped some. None: 0 … k - 1.
            A pattern of window and sinks needs none if the cache holds the sinks and the last ``window`` - 1 tokens or more.
        mask: [B or 1, 1, q, k], booleans (True: seen) or numbers that are added to scores; in place of the pattern.
        masked: slices with small masks in place of whole blocks without any; None: where it is faster, on the CPU.

    Returns:
        [B, H, q, Dv], in the memory of [B, q, H, Dv]. Queries that are padding get finite numbers without a meaning.
    """
    (heads, tokens), (groups, known) = query.shape[1:3], key.shape[1:3]
    if heads % groups or tokens > known:
        raise ValueError(f"{heads} heads of {tokens} queries do not fit {groups} heads of {known} keys")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not query.dtype == key.dtype == value.dtype:  # rotary positions leave autocast's dtype
        query, key = query.to(value.dtype), key.to(value.dtype)
    if mask is not None:
        pieces = _given(mask, query)
    elif padding is not None or positions is not None:
        pieces = _irregular(pattern, tokens, known, padding, positions, query)
    elif tokens == 1:
        pieces = _step(pattern, known)
    else:
        masked = query.device.type == "cpu" if masked is None else masked
        pieces = _regular(pattern, known - tokens, known, masked, query)
    if len(pieces) == 1 and logits is None and (simple := _sdpa(query, key, value, pieces[0], scale)) is not None:
        return simple
    tops = None if logits is None else torch.unflatten(logits, 0, (groups, heads // groups))
    grouped = torch.unflatten(query, 1, (groups, heads // groups)).transpose(2, 3)
    return merged(grouped, key, value, pieces, scale, tops).transpose(2, 3).flatten(1, 2)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, piece: Piece, scale: float
) -> torch.Tensor | None:
    """Output of a single piece by torch's own function; None where the piece has a mask of numbers."""
    if isinstance(piece.mask, torch.Tensor) or piece.mask == "reversed":
        return None
    keys, values = (joined(piece, x) for x in (key, value))
    if keys.ndim != 4:
        return None
    attend = torch.nn.functional.scaled_dot_product_attention
    groups = key.shape[1]
    if query.shape[2] == 1:  # the heads of a group are as good as queries of one head, and no key is repeated
        packed: torch.Tensor = attend(query.reshape(len(query), groups, -1, query.shape[-1]), keys, values, scale=scale)
        return packed.flatten(1, 2)[:, :, None]
    shared = query.shape[1] != groups
    return attend(query, keys, values, is_causal=piece.mask == "causal", scale=scale, enable_gqa=shared)


def _step(pattern: LocalPattern, known: int) -> list[Piece]:
    """The piece of one query, the last of ``known`` tokens: exactly the keys that it sees."""
    position = known - 1
    near = max(0, known - pattern.window) if pattern.window else position - position % (pattern.block or known)
    firsts = min(pattern.sinks, near)
    keys = [span(0, firsts)] if firsts else []
    if pattern.stride:
        keys.append(span(_next(firsts, position, pattern.stride), near, pattern.stride))
    else:
        keys += [
            span(_next(firsts, -last, pattern.length), near, pattern.length) for last in range(1, pattern.last + 1)
        ]
    return [Piece(span(0, 1), (*keys, span(near, known)))]


def _next(least: int, position: int, step: int) -> int:
    """The first number from ``least`` on that differs from ``position`` by a multiple of ``step``."""
    return least + (position - least) % step


def _regular(pattern: LocalPattern, past: int, known: int, masked: bool, like: torch.Tensor) -> list[Piece]:
    """Pieces of the queries at positions ``past`` … ``known`` - 1 where every row has all tokens."""
    whole = LocalPattern() if pattern.window is not None and pattern.window >= known else pattern
    if whole.window is not None and masked:
        pieces = _slices(whole, past, known, like)
        whole = whole if whole.stride or whole.last else LocalPattern(window=whole.window)  # the slices hold the sinks
    elif whole.window is not None:
        pieces = _bands(whole.window, past, known)
    else:
        pieces = _own(whole.block or known, past, known)
    if whole.stride:
        pieces += _strided(whole, whole.stride, past, known)
    elif whole.last:
        pieces += _lasts(whole, past, known, like)
    return pieces + (_firsts(whole, past, known, like) if whole.sinks else [])


def _own(block: int, past: int, known: int) -> list[Piece]:
    """A query sees its own stretch."""
    start, pieces = past, list[Piece]()
    if begun := past % block:
        start = min(past - begun + block, known)
        here = span(0, start - past)
        pieces += [Piece(here, (span(past, start),), "causal"), Piece(here, (span(past - begun, past),), adds=True)]
    if count := (known - start) // block:
        pieces.append(Piece(stretches(start - past, count, block), (stretches(start, count, block),), "causal"))
        start += count * block
    if start < known:
        pieces.append(Piece(span(start - past, known - past), (span(start, known),), "causal"))
    if len(pieces) == 1 and past == 0 and block >= known:
        pieces = [Piece(span(0, known), (span(0, known),), "causal")]
    return pieces


def _slices(pattern: LocalPattern, past: int, known: int, like: torch.Tensor) -> list[Piece]:
    """A window, and sinks if nothing else is seen: some queries at a time with the keys in reach, and a mask of that size."""
    window, firsts = pattern.window or known, 0 if pattern.stride or pattern.last else pattern.sinks
    near = LocalPattern(window=window, sinks=firsts)
    start, pieces = past, list[Piece]()
    if past == 0:
        start = min(window, known)
        pieces.append(Piece(span(0, start), (span(0, start),), "causal"))
    count = firsts + window - 1 + SLICE
    column = torch.arange(count, device=like.device)
    usual = _numbers(visible(near, torch.arange(count - SLICE, count, device=like.device)[:, None], column), like)
    for first in range(start, known, SLICE):
        end, low = min(first + SLICE, known), first - window + 1
        here = span(first - past, end - past)
        if low > firsts:
            mask = usual[: end - first, : count - SLICE + end - first]
            keys = (span(0, firsts), span(low, end)) if firsts else (span(low, end),)
        else:
            rows = torch.arange(first, end, device=like.device)[:, None]
            mask, keys = _numbers(visible(near, rows, torch.arange(end, device=like.device)), like), (span(0, end),)
        pieces.append(Piece(here, keys, mask))
    return pieces


def _bands(window: int, past: int, known: int) -> list[Piece]:
    """A window without masks: a query's own stretch up to it, and of the stretch before what is still in the window."""
    start, pieces = past, list[Piece]()
    if start < window:
        start = min(known, window)
        here = span(0, start - past)
        pieces.append(Piece(here, (span(past, start),), "causal"))
        if past:
            pieces.append(Piece(here, (span(0, past),), adds=True))
    if count := (known - start) // window:
        pieces.append(Piece(stretches(start - past, count, window), (stretches(start, count, window),), "causal"))
        if window > 1:
            here, before = stretches(start - past, count, window, 0, 1), stretches(start - window, count, window, 1)
            pieces.append(Piece(here, (before,), "reversed", adds=True))
        start += count * window
    if rest := known - start:
        here, edge = span(start - past, known - past), start - window + rest
        pieces.append(Piece(here, (span(start, known),), "causal"))
        pieces.append(Piece(here, (span(edge, start),), adds=True))
        if rest > 1:
            before = span(start - window + 1, edge)
            pieces.append(Piece(span(start - past, known - past - 1), (before,), "reversed", adds=True))
    return pieces


def _strided(pattern: LocalPattern, stride: int, past: int, known: int) -> list[Piece]:
    """Every ``stride``-th token that is not near: attention of columns of the text, written in rows of ``stride`` tokens."""
    nearest = -(-pattern.window // stride) if pattern.window else 1  # rows up to there are near
    start, pieces = past, list[Piece]()
    if past == 0:
        rows = known // stride
        start = rows * stride
        if rows > nearest:
            here = columns(nearest * stride, rows - nearest, stride, stride)
            pieces.append(Piece(here, (columns(0, rows - nearest, stride, stride),), "causal", adds=True))
    while start < known:
        offset = start % stride
        end, rows = min(known, start - offset + stride), start // stride - nearest + 1
        if rows > 0:
            keys = columns(offset, rows, stride, end - start)
            pieces.append(Piece(singles(start - past, end - past), (keys,), adds=True))
        start = end
    return pieces


def _lasts(pattern: LocalPattern, past: int, known: int, like: torch.Tensor) -> list[Piece]:
    """The last tokens of earlier stretches that are not near; a piece has the queries of a slice, or of a block."""
    pieces, length = list[Piece](), pattern.length
    size = pattern.block * max(1, SLICE // pattern.block) if pattern.block else SLICE
    for start in range(past - past % size, known, size):
        first, end = max(past, start), min(start + size, known)
        rows = torch.arange(first, end, device=like.device)[:, None]
        near = rows - rows % pattern.block if pattern.block else rows - (pattern.window or 0) + 1
        stop = end - (pattern.window or 0) if pattern.window else (end - 1) // length * length
        steps = [(length - last, stop, length) for last in range(pattern.last, 0, -1) if length - last < stop]
        if not steps:
            continue
        far = torch.cat([torch.arange(*step, device=like.device) for step in steps])
        mask = _numbers(far < near, like) if pattern.window or size > length else None
        pieces.append(Piece(span(first - past, end - past), tuple(span(*step) for step in steps), mask, adds=True))
    return pieces


def _firsts(pattern: LocalPattern, past: int, known: int, like: torch.Tensor) -> list[Piece]:
    """The first tokens, for queries that do not see them otherwise."""
    start = max(past, pattern.window or pattern.block or known)
    if start >= known:
        return []
    plain = replace(pattern, sinks=0)
    count = min(pattern.sinks, known)
    firsts = torch.arange(count, device=like.device)
    free = (
        pattern.sinks - 1 + start if pattern.window and not pattern.stride else known
    )  # from there on none is in the window
    pieces = list[Piece]()
    if free < known:
        pieces.append(Piece(span(free - past, known - past), (span(0, count),), adds=True))
    if (end := min(free, known)) > start:
        rows = torch.arange(start, end, device=like.device)[:, None]
        mask = _numbers((firsts <= rows) & ~visible(plain, rows, firsts), like)
        pieces.append(Piece(span(start - past, end - past), (span(0, count),), mask, adds=True))
    return pieces


def _irregular(
    pattern: LocalPattern,
    tokens: int,
    known: int,
    padding: torch.Tensor | None,
    positions: torch.Tensor | None,
    like: torch.Tensor,
) -> list[Piece]:
    """Pieces of rows with padding, or of keys at given positions: slices of queries, each with a mask of its own."""
    index = torch.arange(known, device=like.device)
    begins = torch.zeros((1, 1), dtype=torch.long, device=like.device)
    if padding is not None:
        padding = padding.to(like.device, torch.bool)
        begins = padding.to(torch.int8).argmax(-1, keepdim=True)
    where = index - begins if positions is None else positions.reshape(-1, known)
    reach = pattern.window if pattern.window and not pattern.stride and not pattern.last else known
    firsts = int(begins.max()) + pattern.sinks if pattern.sinks else 0
    pieces, past = list[Piece](), known - tokens
    for first in range(past, known, SLICE):
        end = min(first + SLICE, known)
        low = max(0, first - reach + 1)
        ranges = [(0, firsts), (low, end)] if pattern.sinks and firsts < low else [(0 if pattern.sinks else low, end)]
        columns = torch.cat([torch.arange(*ends, device=like.device) for ends in ranges])
        seen = visible(pattern, where[:, first:end, None], where[:, None, columns])
        if padding is not None:
            seen = seen & padding[:, None, columns]
            seen = seen | ~seen.any(-1, keepdim=True)  # padding sees anything, so that its softmax has a sum
        mask = _numbers(seen, like)
        keys = tuple(span(*ends) for ends in ranges)
        pieces.append(Piece(span(first - past, end - past), keys, mask.expand(like.shape[0], -1, -1)))
    return pieces


def _given(mask: torch.Tensor, like: torch.Tensor) -> list[Piece]:
    """Pieces of a mask of all pairs, some queries at a time."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask of all pairs is [B or 1, 1, q, k], not {list(mask.shape)}")
    mask = mask.to(like.device)
    numbers = (
        _numbers(mask, like) if mask.dtype == torch.bool else mask.to(torch.promote_types(like.dtype, torch.float32))
    )
    tokens, known = numbers.shape[2:]
    numbers = numbers[:, 0].clamp(min=torch.finfo(torch.float32).min).expand(like.shape[0], -1, -1)
    starts = range(0, tokens, SLICE)
    return [Piece(span(a, min(a + SLICE, tokens)), (span(0, known),), numbers[:, a : a + SLICE]) for a in starts]


def _numbers(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Numbers that are added to scores: 0 where a key is seen. Finite elsewhere, so that a row that sees none stays finite."""
    wide = torch.promote_types(like.dtype, torch.float32)
    hidden = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape, dtype=wide, device=like.device).masked_fill_(~seen, hidden)
