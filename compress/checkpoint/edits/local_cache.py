"""Cache of the edit ``local``: each key and value head of a layer keeps the tokens that it still sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# ---- editing: copied into the modelling file of compact checkpoints ----


#: The class of the layers, once made: importing this file must not import transformers.
_LAYER: list[type] = []


class HeadWindows:
    """The tokens that the local heads of one attention see.

    A token's *place* is its number within its text, from 0; padding has the place -1. A token that a place does not see is
    seen by no later place, so a cache can drop it.

    Attributes:
        window: tokens that a local head sees, the token itself among them; in ``fixed`` and ``chunks`` the length of a block.
        sinks: first tokens that stay visible.
        pattern: ``window``, ``strided``, ``fixed`` or ``chunks``.
        stride: of ``strided``: every stride-th token stays visible. keep: of ``fixed``: so many last tokens of each block do.
        full: numbers of the key and value heads that see everything.
        positions: a place beyond them sees sinks at the distance that the last place within them has.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.window, self.sinks, self.pattern = int(values["window"]), int(values["sinks"]), str(values["pattern"])
        self.stride, self.keep = int(values.get("stride", 0)), int(values.get("keep", 0))
        self.full, self.positions = [int(head) for head in values["full"]], int(values["positions"])

    def sees(self, query: Any, key: torch.Tensor) -> torch.Tensor:
        """Whether the place ``query`` sees the place ``key``, which is no later one and not that of padding."""
        seen: torch.Tensor
        if self.pattern in ("fixed", "chunks"):
            seen = query // self.window == key // self.window
        else:
            seen = query - key < self.window
        seen = seen | (key < self.sinks)
        if self.pattern == "strided":
            seen = seen | (key % self.stride == self.stride - 1)
        if self.pattern == "fixed":
            seen = seen | (key % self.window >= self.window - self.keep)
        return seen

    def near(self, count: int) -> int:
        """First place of the window, or of the block, of the last of ``count`` tokens."""
        if self.pattern in ("fixed", "chunks"):
            return (count - 1) // self.window * self.window
        return max(0, count - self.window)

    def kept(self, count: int, device: Any = None) -> torch.Tensor:
        """Places that the last of ``count`` tokens sees, in order, [M]."""
        import torch

        near = min(max(self.near(count), self.sinks), count)
        far = torch.arange(0, device=device)
        if self.pattern == "strided":
            far = torch.arange(self.stride - 1, max(near, self.stride - 1), self.stride, device=device)
        if self.pattern == "fixed":
            blocks = torch.arange(self.window, max(near + 1, self.window), self.window, device=device)
            far = (blocks[:, None] - torch.arange(self.keep, 0, -1, device=device)).flatten()
        first = torch.arange(min(self.sinks, count), device=device)
        return torch.cat([first, far[far >= self.sinks], torch.arange(near, count, device=device)])

    def count(self, tokens: int) -> int:
        """Number of places that the last of so many tokens sees: the length of `kept`."""
        near = min(max(self.near(tokens), self.sinks), tokens)
        far = 0
        if self.pattern == "strided":
            far = len(range(self.stride - 1, near, self.stride)) - len(range(self.stride - 1, self.sinks, self.stride))
        if self.pattern == "fixed":
            ends = range(self.window, near + 1, self.window)
            far = sum(max(0, end - max(self.sinks, end - self.keep)) for end in ends)
        return min(self.sinks, tokens) + max(0, far) + tokens - near

    def dropped(self, count: int) -> tuple[int, int]:
        """Columns, from the end, of `kept` of ``count`` tokens that the next token does not see: a run from … to …."""
        first, after = max(self.sinks, self.near(count)), self.near(count + 1)
        if self.pattern == "strided" and first % self.stride == self.stride - 1:
            after = first
        if self.pattern == "fixed":
            after -= self.keep
        return count - first, count - max(first, after)

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(full heads, local heads) of keys or values [B, H, T, d]."""
        local = [head for head in range(states.shape[1]) if head not in self.full]
        return states[:, self.full], states[:, local]


class HeadStates:
    """Keys and values of the heads of one attention, for the queries of one call.

    Attributes:
        full: keys and values of the heads that see everything, each [B, F, N, d]. local: those of the others, [B, L, M, d].
        queries: places of the queries, [B or 1, Q].
        places: places of the tokens of local heads, [B or 1, M]; None where every query sees all of them.
        seen: tokens of the text so far, those of the queries among them.
        whole: whether local heads have all of them, none is padding, and there is no mask; or what a window leaves of them.
    """

    def __init__(
        self, full: Any, local: Any, queries: torch.Tensor, places: torch.Tensor | None, seen: int, whole: bool
    ) -> None:
        self.full, self.local, self.queries, self.places = full, local, queries, places
        self.seen, self.whole = seen, whole


class HeadCache:
    """Mixin for a layer of a cache. Full heads keep all tokens, local heads those that the last token sees.

    `update` returns `HeadStates` in place of tensors. Attention modules hand them on to the attention function.

    Attributes:
        keys, values: of the full heads. local_keys, local_values: of the local heads.
        places: of the tokens of the local heads, [B, M]; None without padding, where `HeadWindows.kept` has them.
        counts: tokens of each text without padding, [B]; None without padding. seen: tokens with padding.
    """

    is_croppable = False
    supports_early_init = False
    _rows = ("keys", "values", "local_keys", "local_values", "places", "counts")

    def __init__(self, windows: HeadWindows) -> None:
        super().__init__()
        self.windows: HeadWindows = windows
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys: Any = None
        self.values: Any = None
        self.local_keys: Any = None
        self.local_values: Any = None
        self.places: Any = None
        self.counts: Any = None
        self.real: Any = None
        self.seen, self.is_initialized = 0, False

    def expect(self, real: torch.Tensor | None) -> None:
        """Take note of which tokens of the next `update` are text, bool [B, Q]; None: all."""
        self.real = real

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begin with no tokens."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        (keys, local_keys), (values, local_values) = map(self.windows.split, (key_states, value_states))
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        self.local_keys, self.local_values = local_keys[:, :, :0], local_values[:, :, :0]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values [B, H, Q, d], and drop those that no token sees any more; (`HeadStates`, `HeadStates`)."""
        import torch

        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        (keys, local_keys), (values, local_values) = map(self.windows.split, (key_states, value_states))
        self.keys = torch.cat([self.keys, keys], 2)
        self.values = torch.cat([self.values, values], 2)
        if self.real is not None and self.counts is None:
            self._begin_padding(key_states.shape[0])
        add = self._add if self.counts is None else self._add_padded
        queries, places, local = add(local_keys, local_values)
        self.seen += key_states.shape[2]
        whole = self.counts is None and (self.windows.pattern == "window" or self.seen == key_states.shape[2])
        states = HeadStates((self.keys, self.values), local, queries, places, self.seen, whole)
        return states, states

    def _add(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """Places of queries and keys, and the local keys and values that the queries see, where nothing is padding."""
        import torch

        new, count = keys.shape[2], self.seen + keys.shape[2]
        queries = torch.arange(self.seen, count, device=keys.device)
        if new == 1 and self.seen:
            start, stop = (self.local_keys.shape[2] - column for column in self.windows.dropped(self.seen))

            def moved(old: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
                return torch.cat([old[:, :, :start], old[:, :, stop:], more], 2)

            self.local_keys, self.local_values = moved(self.local_keys, keys), moved(self.local_values, values)
            return queries[None], None, (self.local_keys, self.local_values)
        places = torch.cat([self.windows.kept(self.seen, keys.device), queries]) if self.seen else queries
        keys, values = torch.cat([self.local_keys, keys], 2), torch.cat([self.local_values, values], 2)
        stay = self.windows.sees(count - 1, places).nonzero()[:, 0]
        self.local_keys, self.local_values = keys.index_select(2, stay), values.index_select(2, stay)
        return queries[None], places[None], (keys, values)

    def _begin_padding(self, rows: int) -> None:
        """From here on each text has places of its own."""
        import torch

        kept = self.windows.kept(self.seen, self.device)
        self.places = kept.expand(rows, -1)
        self.counts = torch.full((rows,), self.seen, device=self.device)

    def _add_padded(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """As `_add`, where the tokens that each text keeps differ. What a text has fewer is padding."""
        import torch

        shape = (keys.shape[0], keys.shape[2])
        real = torch.ones(shape, dtype=torch.bool, device=keys.device) if self.real is None else self.real
        queries = torch.where(real, self.counts[:, None] + real.cumsum(1) - 1, -1)
        self.counts = self.counts + real.sum(1)
        places = torch.cat([self.places, queries], 1)
        keys, values = torch.cat([self.local_keys, keys], 2), torch.cat([self.local_values, values], 2)
        stay = self.windows.sees(self.counts[:, None] - 1, places) & (places >= 0)
        order = torch.sort((~stay).int(), dim=1, stable=True).indices[:, : int(stay.sum(1).max())]
        self.places = torch.where(stay.gather(1, order), places.gather(1, order), -1)
        columns = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.local_keys, self.local_values = keys.gather(2, columns), values.gather(2, columns)
        return queries, places, (keys, values)

    def get_seq_length(self) -> int:
        """Number of tokens seen, padding too."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens, first token) of a mask for the next call: all tokens."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no largest length."""
        return -1

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change every tensor that has a row for each text."""
        for name in self._rows:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, change(tensor))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the texts in another order."""
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the texts."""
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError: what local heads dropped cannot come back."""
        if tokens_to_remove:
            raise ValueError(
                "heads with windows have dropped tokens, so their cache cannot be cut: use no assisted decoding"
            )

    def offload(self) -> None:
        """Raise ValueError: an offloaded cache has layers of another kind."""
        raise ValueError("the cache of heads with windows cannot be offloaded: use a DynamicCache without `offloading`")


def window_layer(windows: HeadWindows) -> Any:
    """`HeadCache` as an empty layer of a `transformers.DynamicCache`."""
    from transformers.cache_utils import DynamicLayer

    if not _LAYER:
        _LAYER.append(type("HeadWindowLayer", (HeadCache, DynamicLayer), {}))
    return _LAYER[0](windows)


def layer_of(cache: Any, index: int, windows: HeadWindows) -> Any:
    """The layer of a cache for an attention with local heads, put in the place of an empty one.

    Raises:
        ValueError: the cache is not a `transformers.DynamicCache`, or another model has filled it.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    empty: Any = DynamicLayer
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if type(cache) is DynamicCache else type(cache).__name__
        raise ValueError(f"{kind} cannot hold heads with windows of their own: use a DynamicCache")
    while len(cache.layers) <= index:
        cache.layers.append(empty())
    layer: Any = cache.layers[index]
    if isinstance(layer, HeadCache):
        return layer
    if type(layer) is not empty or layer.get_seq_length():
        raise ValueError(
            f"layer {index} of the cache is not one of heads with windows: begin with an empty DynamicCache"
        )
    cache.layers[index] = window_layer(windows)
    return cache.layers[index]
