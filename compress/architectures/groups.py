"""Groups of weights that structured pruning removes together, declared per family, and where they lie in the tensors.

A group is a unit such as an MLP neuron, an attention head, or the query heads that share a key and value head. Imports neither
torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Side = Literal["out", "in"]
#: Layout of the projections to queries, keys and values. ``separate``: three modules. ``stacked``: one module; its outputs are
#: all queries, then all keys, then all values. ``interleaved``: one module; each head in turn has a query, a key and a value.
FusedLayout = Literal["separate", "stacked", "interleaved"]


@dataclass(frozen=True)
class Mlp:
    """The MLP of a block. Paths are below the block; ``*`` stands for the number of an expert.

    Attributes:
        up: modules whose outputs are the neurons. down: the module that reads the neurons.
        size_key: config field with the number of neurons. Without one no neuron can be removed.
        times: config field with the number of such widths that there are neurons, as of shared experts; None for one.
        sections: how often the outputs of ``up`` hold the neurons, one run after another (2 where gate and up are fused).
        multiple: the number of neurons and the hidden width stay multiples of this.
    """

    up: tuple[str, ...]
    down: str
    size_key: str | None = "intermediate_size"
    sections: int = 1
    multiple: int = 1
    times: str | None = None


@dataclass(frozen=True)
class Attention:
    """The attention of a block. Paths are below the block.

    Attributes:
        query, key, value: modules; the same one where they are fused as ``layout`` says. output: the module that reads heads.
        free: whether heads x head width may differ from the hidden size (the config has ``head_dim_key``).
        even: whether the config still requires that the number of heads divides the hidden size.
        rotary: whether only rotary positions (entry i turned with entry i + half) change queries and keys before their product.
        table: module of a list's first block whose weight [distances, heads] is added to the scores of every block of the list.
            All blocks then lose the same heads.
        ordered: whether the computation of a head depends on its number (ALiBi).
        logits: a parameter with one entry per query head, such as a sink of the softmax; None without one.
        norms: weights of norms that span the queries, and the keys, of all heads; None without them. No head can be removed.
    """

    query: str
    key: str
    value: str
    output: str
    layout: FusedLayout = "separate"
    free: bool = False
    even: bool = False
    rotary: bool = False
    table: str | None = None
    ordered: bool = False
    logits: str | None = None
    norms: tuple[str, str] | None = None


@dataclass(frozen=True)
class Hidden:
    """The hidden width between blocks, in families with RMSNorm.

    Attributes:
        norms: modules of a block that normalise the hidden states. final: the norm after the blocks, below the prefix.
        epsilon_key: config field; epsilon: its default. offset: added to the weights of norms (1 in Gemma).
        scaled: whether embeddings are multiplied by the square root of the width.
    """

    norms: tuple[str, ...]
    final: str = "norm"
    epsilon_key: str = "rms_norm_eps"
    epsilon: float = 1e-6
    offset: float = 0.0
    scaled: bool = False


@dataclass(frozen=True)
class Relative:
    """A stock family that computes the same and whose config allows more.

    Attributes:
        model_type: its model type. classes: (beginning of the class names here, beginning there). config: fields to set.
        unless: config fields that have no counterpart there when they are true.
    """

    model_type: str
    classes: tuple[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Where units lie along the outputs or inputs of a module.

    Unit u has the entries ``start + (s · units + u) · width + w`` for every section s and every w below the width.
    """

    module: str
    side: Side
    width: int = 1
    start: int = 0
    sections: int = 1

    def entries(self, units: int, keep: Sequence[int]) -> list[int]:
        """Entries of the units ``keep`` out of ``units``, in order."""
        return [
            self.start + (s * units + u) * self.width + w
            for s in range(self.sections)
            for u in keep
            for w in range(self.width)
        ]

    def lost(self, units: int, keep: Sequence[int]) -> set[int]:
        """Entries of the other units."""
        return set(self.span(units)) - set(self.entries(units, keep))

    def span(self, units: int) -> range:
        """Entries of all units together."""
        return range(self.start, self.start + self.sections * units * self.width)


@dataclass(frozen=True)
class PrunableGroup:
    """Units of one kind in one block.

    Attributes:
        kind: ``mlp`` (neurons), ``heads`` (query heads) or ``groups`` (query heads with the key and value head they share).
        name: the module that reads the units. count: number of units.
        members: all places where the units lie. The last place is the inputs of the module ``name``.
        groups: number of equal runs of units, each of which must lose the same number of units; 1 for no such rule.
        size_key, multiple: for neurons, as in `Mlp`. times: number of neurons for each that the config field counts.
        alongside: further places, whose ``module`` is the full name of a parameter with one axis.
    """

    kind: Literal["mlp", "heads", "groups"]
    name: str
    count: int
    members: tuple[Slice, ...]
    groups: int = 1
    size_key: str | None = None
    multiple: int = 1
    times: int = 1
    alongside: tuple[Slice, ...] = ()

    @property
    def width(self) -> int:
        """Number of inputs of the reading module per unit."""
        return self.members[-1].width


def neurons(mlp: Mlp, path: str, count: int, times: int = 1) -> PrunableGroup:
    """The neurons of an MLP of one block; ``path``: the block's path with the dot. ``times``: as in `PrunableGroup`."""
    up = tuple(Slice(path + m, "out", sections=mlp.sections) for m in mlp.up)
    down = path + mlp.down
    places = (*up, Slice(down, "in"))
    return PrunableGroup("mlp", down, count, places, size_key=mlp.size_key, multiple=mlp.multiple, times=times)


def heads(attention: Attention, path: str, queries: int, groups: int, head_dim: int) -> PrunableGroup:
    """The query heads of one block, to be removed in equal numbers from each group that shares a key and value head."""
    output = Slice(path + attention.output, "in", head_dim)
    query = Slice(path + attention.query, "out", head_dim)
    assert attention.layout != "interleaved" or queries == groups
    return PrunableGroup(
        "heads",
        output.module,
        queries,
        (query, output),
        groups,
        alongside=_alongside(attention, path, 1, head_dim, None),
    )


def head_groups(attention: Attention, path: str, queries: int, groups: int, head_dim: int) -> PrunableGroup:
    """Query heads with the key and value head they share; single heads where each has its own key and value."""
    wide = queries // groups * head_dim
    output = Slice(path + attention.output, "in", wide)
    query, key, value = (path + m for m in (attention.query, attention.key, attention.value))
    members: tuple[Slice, ...]
    if attention.layout == "interleaved":
        members = (Slice(query, "out", 3 * head_dim),)
    else:
        after = (groups * wide, groups * (wide + head_dim)) if attention.layout == "stacked" else (0, 0)
        members = (
            Slice(query, "out", wide),
            Slice(key, "out", head_dim, after[0]),
            Slice(value, "out", head_dim, after[1]),
        )
    alongside = _alongside(attention, path, queries // groups, wide, head_dim)
    return PrunableGroup("groups", output.module, groups, (*members, output), alongside=alongside)


def _alongside(
    attention: Attention, path: str, heads: int, query_width: int, key_width: int | None
) -> tuple[Slice, ...]:
    """Parameters of one axis with entries for each unit: logits of its query heads, and weights of norms."""
    places = [] if attention.logits is None else [Slice(path + attention.logits, "out", heads)]
    if attention.norms is not None:
        widths = (query_width, key_width)
        places += [Slice(path + n, "out", w) for n, w in zip(attention.norms, widths, strict=True) if w is not None]
    return tuple(places)


def split_fused(outputs: Any, layout: FusedLayout, queries: int, groups: int, head_dim: int) -> tuple[Any, Any, Any]:
    """Queries, keys and values out of the outputs [..., O] of a fused projection, a torch tensor."""
    if layout == "interleaved":
        by_head = outputs.view(*outputs.shape[:-1], queries, 3, head_dim)
        query, key, value = (by_head[..., part, :].flatten(-2) for part in range(3))
    else:
        query, key, value = outputs.split([queries * head_dim, groups * head_dim, groups * head_dim], -1)
    return query, key, value


def same_heads(attention: Attention, blocks: Sequence[PrunableGroup], first: str) -> PrunableGroup:
    """Heads that all blocks of a list lose together, and their columns in the first block's table of distances."""
    table = Slice(first + str(attention.table), "in")
    return replace(blocks[-1], members=(table, *(member for units in blocks for member in units.members)))


@dataclass(frozen=True)
class KVHeadMerge:
    """Key and value heads of a block that are merged: every run of ``heads // left`` neighbours becomes one head.

    Attributes:
        heads, left: number of key and value heads before and after.
        rotary: entries of a key that rotary positions turn in pairs; 0 where keys cannot be aligned by a rotation.
        query, key, value, output: where the heads lie, and the queries and outputs that belong to each.
    """

    heads: int
    left: int
    rotary: int
    query: Slice
    key: Slice
    value: Slice
    output: Slice

    @property
    def members(self) -> tuple[Slice, ...]:
        """All places where the heads lie."""
        return self.query, self.key, self.value, self.output

    def kept(self) -> tuple[PrunableGroup, list[int]]:
        """The key and value heads to keep once the heads of each run are equal: the first of each run."""
        units = PrunableGroup("groups", self.output.module, self.heads, (self.key, self.value))
        return units, list(range(0, self.heads, self.heads // self.left))
