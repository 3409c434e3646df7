"""What structured pruning may remove from a block, declared per family, and where each unit lies in the tensors.

Neurons of an MLP, attention heads, groups of heads that share keys and values, experts, and the hidden width. Imports neither
torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Side = Literal["out", "in"]
#: How the projection to queries, keys and values is laid out: three modules; one whose outputs are all queries, then all
#: keys, then all values; or one with a query, a key and a value for each head in turn.
FusedLayout = Literal["separate", "stacked", "interleaved"]


@dataclass(frozen=True)
class Mlp:
    """Neurons between two projections of a block. Paths are below the block; ``*`` stands for the number of an expert.

    Attributes:
        up: modules whose outputs are the neurons. down: the module that reads them.
        size_key: config field with their number. None where no field has it: then none can go.
        sections: runs of neurons that the outputs of ``up`` hold, one after another (2 where gate and up are fused).
        multiple: the number of neurons, and the hidden width, stay multiples of this.
    """

    up: tuple[str, ...]
    down: str
    size_key: str | None = "intermediate_size"
    sections: int = 1
    multiple: int = 1


@dataclass(frozen=True)
class Attention:
    """Heads of a block. Paths are below the block.

    Attributes:
        query, key, value: modules; the same one where they are fused, as ``layout`` says. output: reads all heads.
        free: whether the config may have heads x head width other than the hidden size (by ``head_dim_key``).
        even: whether the config still wants the hidden size to be a multiple of the number of heads.
        rotary: whether nothing but rotary positions (entry i with i + half) lies between queries and keys and their product.
        table: module of the first block whose weight [distances, heads] is added to the scores of all blocks of its list: the
            same heads go from all of them.
        ordered: whether what a head computes depends on its number (ALiBi).
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


@dataclass(frozen=True)
class Hidden:
    """The width between blocks, in families with RMSNorm.

    Attributes:
        norms: modules of a block that normalise it. final: the norm after the blocks, below the prefix.
        epsilon_key: config field; epsilon: where the config does not say it. offset: added to norms' weights (1 in Gemma).
        scaled: whether embeddings are multiplied by the root of the width.
    """

    norms: tuple[str, ...]
    final: str = "norm"
    epsilon_key: str = "rms_norm_eps"
    epsilon: float = 1e-6
    offset: float = 0.0
    scaled: bool = False


@dataclass(frozen=True)
class Relative:
    """A stock family that computes the same and has a freer config.

    Attributes:
        model_type: of it. classes: (how class names begin here, and there). config: fields to set.
        unless: config fields that, when true, have no counterpart there.
    """

    model_type: str
    classes: tuple[str, str]
    config: Mapping[str, Any] = field(default_factory=dict)
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slice:
    """Where units lie along the outputs or inputs of a module: for unit u, entries ``start + (s·units + u)·width + w`` of
    every section s."""

    module: str
    side: Side
    width: int = 1
    start: int = 0
    sections: int = 1

    def entries(self, units: int, keep: Sequence[int]) -> list[int]:
        """Entries of the units ``keep`` among ``units``, in order."""
        return [
            self.start + (s * units + u) * self.width + w
            for s in range(self.sections)
            for u in keep
            for w in range(self.width)
        ]

    def span(self, units: int) -> range:
        """Entries of all units."""
        return range(self.start, self.start + self.sections * units * self.width)


@dataclass(frozen=True)
class PrunableGroup:
    """Units of one kind in one block.

    Attributes:
        kind: ``mlp``, ``heads`` (query heads) or ``groups`` (heads with the keys and values they share).
        name: of the module that reads them. count: how many there are.
        members: all places where they lie; the last is the inputs of the module ``name``.
        groups: into how many equal runs the units are divided that must lose the same number each; 1 for no such rule.
        size_key, multiple: of neurons, as in `Mlp`.
    """

    kind: Literal["mlp", "heads", "groups"]
    name: str
    count: int
    members: tuple[Slice, ...]
    groups: int = 1
    size_key: str | None = None
    multiple: int = 1

    @property
    def width(self) -> int:
        """Inputs of the reading module per unit."""
        return self.members[-1].width


def neurons(mlp: Mlp, path: str, count: int) -> PrunableGroup:
    """The neurons of an MLP of one block; ``path`` is what the names of the block's modules begin with."""
    up = tuple(Slice(path + m, "out", sections=mlp.sections) for m in mlp.up)
    down = path + mlp.down
    return PrunableGroup("mlp", down, count, (*up, Slice(down, "in")), size_key=mlp.size_key, multiple=mlp.multiple)


def heads(attention: Attention, path: str, queries: int, groups: int, head_dim: int) -> PrunableGroup:
    """Query heads, to be removed within their groups."""
    output = Slice(path + attention.output, "in", head_dim)
    query = Slice(path + attention.query, "out", head_dim)
    assert attention.layout != "interleaved" or queries == groups
    return PrunableGroup("heads", output.module, queries, (query, output), groups)


def head_groups(attention: Attention, path: str, queries: int, groups: int, head_dim: int) -> PrunableGroup:
    """Groups of query heads with their key and value head; single heads where each has its own."""
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
    return PrunableGroup("groups", output.module, groups, (*members, output))


def same_heads(attention: Attention, blocks: Sequence[PrunableGroup], first: str) -> PrunableGroup:
    """Heads that go from all blocks of a list together, with what the table of the first block says of them."""
    table = Slice(first + str(attention.table), "in")
    return replace(blocks[-1], members=(table, *(member for units in blocks for member in units.members)))


@dataclass(frozen=True)
class KVHeadMerge:
    """Key and value heads of a block that become fewer: every run of ``heads // left`` neighbours becomes one.

    Attributes:
        rotary: entries of a key that positions turn in pairs; 0 where keys cannot be turned to be alike.
        query, key, value, output: where the heads lie, and what belongs to each.
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
        """All places."""
        return self.query, self.key, self.value, self.output

    def kept(self) -> tuple[PrunableGroup, list[int]]:
        """What is left of keys and values once merged heads are equal: the first of each run."""
        units = PrunableGroup("groups", self.output.module, self.heads, (self.key, self.value))
        return units, list(range(0, self.heads, self.heads // self.left))
