"""Attention of the edit ``local``: heads that see everything beside heads that see a window."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from compress.checkpoint.edits.local_cache import HeadStates, HeadWindows, layer_of

if TYPE_CHECKING:
    import torch


# ---- editing: copied into the modelling file of compact checkpoints ----

#: Name of the attention function in transformers' table.
HEADS = "compress_heads"
#: Queries that are computed at once where a mask is needed, so that no mask is n x n.
_ROWS = 256
#: Names of the cache among the arguments of attention modules.
_CACHES = ("cache", "past_key_values", "layer_past")


class LocalHeads:
    """Mixin for an attention module some of whose heads see a window.

    Attributes:
        windows: what the local heads see, `HeadWindows`.
        rotary: (the module with the model's rotary frequencies,), or () without such positions.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock module; local heads see what ``windows`` says, and the cache drops what they no longer see."""
        module: Any = self
        if args:
            names = inspect.signature(super().forward).parameters  # type: ignore[misc]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        layer = None if cache is None else layer_of(cache, module.layer_idx, module.windows)
        before = 0 if layer is None else layer.get_seq_length()
        tokens = HeadTokens(kwargs.get("attention_mask"), before, kwargs["hidden_states"])
        if layer is not None:
            layer.expect(None if tokens.padding is None else tokens.padding[:, before:])
        return super().forward(**kwargs, head_tokens=tokens)  # type: ignore[misc]


class HeadTokens:
    """The tokens of one call of attention, as its mask has them.

    Attributes:
        padding: which tokens are text, bool [B, N], cached ones first; None for all.
        visible: which query sees which token, bool [B, Q, N], where more than padding says so; else None.
        places: of the tokens of a call without a cache, [B or 1, Q].
    """

    def __init__(self, mask: Any, before: int, hidden: torch.Tensor) -> None:
        """Read a mask that transformers makes for attention: None, [B, N], or [B, 1, Q, N] of booleans or of terms.

        Args:
            before: tokens in the cache. hidden: [B, Q, h].

        Raises:
            ValueError: the mask is none of these, or more than causal although there is a cache.
        """
        import torch

        rows, new = hidden.shape[:2]
        self.padding: Any = None
        self.visible: Any = None
        self.places: Any = torch.arange(before, before + new, device=hidden.device)[None]
        if mask is None:
            return
        if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4) or (mask.ndim == 4 and mask.shape[1] > 1):
            raise ValueError("heads with windows of their own need a mask [texts, tokens]: use no flex_attention")
        if mask.ndim == 2:
            padding = mask.bool()
        else:
            visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
            visible = visible[:, :, : before + new].expand(rows, -1, -1)
            padding = visible.any(1)
            columns = torch.arange(before + new, device=hidden.device)
            causal = (columns <= self.places[0, :, None]) & padding[:, None]
            if not torch.equal(causal & padding[:, None, before:].mT, visible & padding[:, None, before:].mT):
                if before:
                    raise ValueError("heads with windows of their own take no mask but padding with a cache")
                self.visible, self.places = visible, visible.sum(2) - 1
        if not padding.all():
            self.padding = padding
            if self.visible is None and not before:
                self.places = torch.where(padding, padding.cumsum(1) - 1, -1)


def heads_attention(
    module: Any,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    head_tokens: HeadTokens,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a module with `LocalHeads`, as transformers calls it; [B, Q, heads, d].

    Args:
        query: [B, heads, Q, d]. key, value: [B, KV heads, Q, d], or `HeadStates` of a cache.
        head_tokens: what ``attention_mask`` says. scaling: of the scores; None for 1 / √d.
        dropout: share of the weights that are dropped. softcap: scores are capped smoothly at this size.
    """
    import torch

    windows, tokens = module.windows, head_tokens
    states = key
    if isinstance(key, torch.Tensor):  # else `HeadStates`, perhaps of another checkpoint's copy of this file
        (keys, local_keys), (values, local_values) = map(windows.split, (key, value))
        plain = tokens.padding is None and tokens.visible is None
        states = HeadStates(
            (keys, values), (local_keys, local_values), tokens.places, tokens.places, key.shape[2], plain
        )
    heads = states.full[0].shape[1] + states.local[0].shape[1]
    grouped: torch.Tensor = query.reshape(query.shape[0], heads, -1, *query.shape[2:])
    attend = HeadAttention(query.shape[-1] ** -0.5 if scaling is None else scaling, dropout, softcap, tokens.visible)
    local = [head for head in range(heads) if head not in windows.full]
    outputs = []
    if windows.full:
        outputs.append(attend.full(grouped[:, windows.full], states, tokens.padding))
    if local:
        outputs.append(attend.local(grouped[:, local], states, windows, _frequencies(module)))
    order = torch.tensor([*windows.full, *local], device=query.device).argsort()
    result = torch.cat(outputs, 1).index_select(1, order)
    return result.flatten(1, 2).transpose(1, 2).contiguous(), None


class HeadAttention:
    """Softmax attention over the places that queries see.

    Attributes:
        scaling, dropout, softcap: as in `heads_attention`. visible: as in `HeadTokens`.
    """

    def __init__(self, scaling: float, dropout: float, softcap: float | None, visible: Any) -> None:
        self.scaling, self.dropout, self.softcap, self.visible = scaling, dropout, softcap, visible

    def full(self, query: torch.Tensor, states: HeadStates, padding: Any) -> torch.Tensor:
        """Outputs of the heads that see everything, [B, H, G, Q, d], for queries of that shape."""
        import torch

        keys, values = states.full
        new, count = query.shape[3], keys.shape[2]
        if padding is None and self.visible is None and (new == 1 or new == count):
            return self._at_once(query, keys, values, new > 1)
        places = torch.arange(count, device=keys.device)[None]
        queries = places[:, count - new :]
        if padding is not None:
            places = torch.where(padding, places, -1)
        return self._sliced(query, keys, values, queries, places, None, None)

    def local(self, query: torch.Tensor, states: HeadStates, windows: HeadWindows, frequencies: Any) -> torch.Tensor:
        """Outputs of the local heads, [B, H, G, Q, d], for queries of that shape."""
        turned = None
        if frequencies is not None and windows.sinks and states.seen > windows.positions:
            back = (windows.positions - 1 - states.queries).clamp(max=0)
            turned = turn(query, back[:, None, None], frequencies)
        if states.places is None and turned is None:
            return self._at_once(query, states.local[0], states.local[1], False)
        plain = turned is None and self.visible is None and self.softcap is None and not self.dropout
        if states.whole and plain:
            return self._patterned(query, states, windows)
        places = states.places
        if places is None:
            places = windows.kept(states.seen, query.device)[None]
        return self._sliced(query, states.local[0], states.local[1], states.queries, places, windows, turned)

    def _patterned(self, query: torch.Tensor, states: HeadStates, windows: HeadWindows) -> torch.Tensor:
        """As `_sliced`, without a mask wherever the pattern allows it."""
        from compress.checkpoint.attention.patterns import LocalPattern, attention

        blocks = windows.pattern in ("fixed", "chunks")
        pattern = LocalPattern(
            window=None if blocks else windows.window,
            block=windows.window if blocks else None,
            sinks=windows.sinks,
            last=windows.keep if windows.pattern == "fixed" else int(windows.pattern == "strided"),
            period=windows.stride if windows.pattern == "strided" else None,
        )
        output = attention(query.flatten(1, 2), states.local[0], states.local[1], pattern, scale=self.scaling)
        return output.reshape(query.shape)

    def _at_once(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool) -> torch.Tensor:
        """All queries see all tokens, or all tokens up to their own."""
        import torch

        if self.softcap is not None:
            new = query.shape[3]
            mask = torch.ones(new, keys.shape[2], dtype=torch.bool, device=keys.device)
            return self._scored(query, keys, values, mask.tril() if causal else mask)
        attention = torch.nn.functional.scaled_dot_product_attention
        if not causal:  # one query: those of a group are as good as several of one head
            single: torch.Tensor = attention(query[:, :, :, 0], keys, values, None, self.dropout, scale=self.scaling)
            return single[:, :, :, None]
        flat = query.flatten(1, 2)
        shared = {"enable_gqa": True} if query.shape[2] > 1 else {}
        output: torch.Tensor = attention(flat, keys, values, None, self.dropout, True, scale=self.scaling, **shared)
        return output.reshape(query.shape)

    def _sliced(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor,
        places: torch.Tensor,
        windows: HeadWindows | None,
        turned: torch.Tensor | None,
    ) -> torch.Tensor:
        """Some queries at a time, each with the tokens in reach.

        Args:
            queries, places: of queries and tokens, [B or 1, …]. windows: what is seen; None for everything before.
            turned: queries for the sinks, where they differ.
        """
        import torch

        outputs = []
        for start in range(0, query.shape[3], _ROWS):
            rows = slice(start, start + _ROWS)
            part = queries[:, rows]
            columns = torch.arange(places.shape[1], device=places.device)
            if self.visible is None:
                columns = reach(part, places, windows).nonzero()[:, 0]
            near = places[:, columns]
            mask = (near[:, None] <= part[:, :, None]) & (near[:, None] >= 0)
            if windows is not None:
                mask = mask & windows.sees(part[:, :, None], near[:, None])
            if self.visible is not None:
                # places begin anew in each text of a row, so the order of tokens is that of the mask
                mask = self.visible[:, rows] if windows is None else mask & self.visible[:, rows]
            mask = (mask | ~mask.any(2, keepdim=True))[:, None, None]  # padding sees anything, so that nothing is NaN
            some = (keys.index_select(2, columns), values.index_select(2, columns))
            sinks = None
            if turned is not None and windows is not None:
                sinks = (turned[:, :, :, rows], (near < windows.sinks)[:, None, None, None])
            outputs.append(self._scored(query[:, :, :, rows], *some, mask, sinks))
        return torch.cat(outputs, 3)

    def _scored(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, sinks: Any = None
    ) -> torch.Tensor:
        """Queries [B, H, G, Q, d] over tokens [B, H, N, d] under a mask [B or 1, 1, 1, Q, N].

        Args:
            sinks: queries for the sinks, and which tokens are sinks, bool [B or 1, 1, 1, 1, N].
        """
        import torch

        if self.softcap is None and sinks is None:
            flat = query.flatten(2, 3)
            mask = mask[:, :, 0].repeat(1, 1, query.shape[2], 1) if mask.ndim == 5 else mask
            attention = torch.nn.functional.scaled_dot_product_attention
            output: torch.Tensor = attention(flat, keys, values, mask, self.dropout, scale=self.scaling)
            return output.reshape(query.shape)
        keys, values = keys[:, :, None], values[:, :, None]
        scores = query @ keys.mT * self.scaling
        if sinks is not None:
            turned, which = sinks
            scores = torch.where(which, turned @ keys.mT * self.scaling, scores)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        result: torch.Tensor = torch.nn.functional.dropout(weights, self.dropout) @ values
        return result


def reach(queries: torch.Tensor, places: torch.Tensor, windows: HeadWindows | None) -> torch.Tensor:
    """Which tokens, bool [N], any of the queries with the places [B or 1, Q] sees. What the first does not see, none does."""
    first = queries.masked_fill(queries < 0, queries.max()).amin(1, keepdim=True)
    near = (places >= 0) & (places <= queries.amax(1, keepdim=True))
    if windows is not None:
        near = near & ((places > first) | windows.sees(first, places))
    return near.any(0)


def turn(states: torch.Tensor, places: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Queries or keys […, T, d] turned on by so many places […, T], as rotary positions do (entry i with entry i + half)."""
    import torch

    angles = places[..., None].float() * frequencies.to(states.device, torch.float32)
    half = angles.shape[-1]
    a, b, rest = states[..., :half].float(), states[..., half : 2 * half].float(), states[..., 2 * half :]
    sine, cosine = angles.sin(), angles.cos()
    turned = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1).to(states.dtype)
    return torch.cat([turned, rest], -1)


def _frequencies(module: Any) -> torch.Tensor | None:
    """Rotary frequencies of an attention module, [rotary entries / 2]; None without any, or where they follow the length."""
    for rotary in module.rotary:
        kind, name = rotary.rope_type, "inv_freq"
        if isinstance(kind, dict):  # by the layer's type
            layer = getattr(module, "layer_type", None) or module.attention_type  # Gemma 3's name, OLMo 3's name
            kind, name = kind[layer], f"{layer}_inv_freq"
        if kind not in ("dynamic", "longrope"):
            frequencies: torch.Tensor = getattr(rotary, name)
            return frequencies
    return None


def register_heads() -> None:
    """Enter `heads_attention` into transformers' table."""
    from transformers import AttentionInterface

    AttentionInterface.register(HEADS, heads_attention)
