"""Slow twin of the attention over a part of the tokens: every pair one by one, in float64."""

from __future__ import annotations

import torch

from compress.checkpoint.attention.patterns import LocalPattern


def sees(pattern: LocalPattern, i: int, j: int) -> bool:
    """Whether the token at position i sees the one at j, by the definitions of the papers."""
    if j > i:
        return False
    if j < pattern.sinks:
        return True
    if pattern.stride is not None and (i - j) % pattern.stride == 0:
        return True
    period = pattern.period or pattern.block
    if pattern.last and j % period in range(period - pattern.last, period):
        return True
    if pattern.block is not None:
        return i // pattern.block == j // pattern.block
    return pattern.window is None or j > i - pattern.window


def dense_attention(query, key, value, pattern, *, scale=None, logits=None, padding=None, positions=None):
    """[B, H, q, Dv] in float64."""
    query, key, value = query.double(), key.double(), value.double()
    (batch, heads, tokens, size), known = query.shape, key.shape[2]
    key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    seen = torch.zeros(batch, tokens, known, dtype=torch.bool)
    for b in range(batch):
        begin = 0 if padding is None else int(padding[b].int().argmax())
        for t in range(tokens):
            for j in range(known):
                at = [known - tokens + t - begin, j - begin]
                if positions is not None:
                    at = [int(positions[known - tokens + t]), int(positions[j])]
                seen[b, t, j] = (padding is None or bool(padding[b, j])) and sees(pattern, *at)
    scores = (query @ key.mT) * (size**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if logits is not None:
        tops = logits.double()[None, :, None, None].expand(batch, -1, tokens, 1)
        return torch.cat([scores, tops], -1).softmax(-1)[..., :-1] @ value
    return scores.softmax(-1).nan_to_num(0) @ value
