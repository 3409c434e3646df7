"""Channels that one place of a block writes and others read, so that scales and rotations can pass from the one to the others.

Between queries, keys and values and the norm in front of them lies nothing: a factor of a channel in the norm's weight and its
inverse in their columns leave the model as it is. So it is with the heads of values and the layer that reads them, and with
the neurons of a gated MLP. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.architectures.groups import Attention, Mlp, Side
from compress.architectures.matrices import ModelBlock
from compress.architectures.model_map import ModelMap, model_map
from compress.architectures.norms import Norms
from compress.errors import PassError
from compress.spec.spec import Spec

ChannelKind = Literal["attention norm", "mlp norm", "final norm", "values", "neurons"]


@dataclass(frozen=True)
class ChannelPlace:
    """Where channels lie along the outputs or inputs of a module.

    Attributes:
        module: full name. side: ``out`` or ``in``; ``out`` of a norm.
        entries: numbers of outputs or inputs. channels: the channel of each of them; several may have the same.
    """

    module: str
    side: Side
    entries: Sequence[int]
    channels: Sequence[int]


@dataclass(frozen=True)
class Channels:
    """Channels of one kind in one block; None: outside the blocks.

    Attributes:
        count: number of channels. width: of the heads that they form; ``count`` without heads.
        source: the place that writes them. readers: all places that read them.
        offset: added to the weights of the norm that writes them.
    """

    kind: ChannelKind
    block: int | None
    count: int
    width: int
    source: ChannelPlace
    readers: tuple[ChannelPlace, ...]
    offset: float = 0.0

    @property
    def places(self) -> tuple[ChannelPlace, ...]:
        """All places."""
        return self.source, *self.readers


@dataclass(frozen=True)
class ResidualStream:
    """Everything that writes the hidden states between blocks, or reads them.

    Attributes:
        norms: every norm with its readers, which are all that read the hidden states.
        embedding: the table that writes them first. writers: modules of blocks whose outputs are added to them.
        width: of the hidden states.
    """

    norms: tuple[Channels, ...]
    embedding: str
    writers: tuple[str, ...]
    width: int


def values(spec: Spec) -> tuple[Channels, ...]:
    """The channels of the values of each key and value head, read by the query heads that share it.

    Raises:
        PassError: no record says where they are, or something else lies between.
    """
    mapped = _mapped(spec)
    attention = mapped.record.attention
    if attention is None:
        return ()
    return tuple(_values(mapped, attention, block.path, block.index) for block in _whole_blocks(mapped))


def neurons(spec: Spec) -> tuple[Channels, ...]:
    """The neurons of each gated MLP, from the layer that the gate multiplies. Raises `PassError`."""
    mapped = _mapped(spec)
    return tuple(
        channels
        for block in _whole_blocks(mapped)
        for mlp in mapped.record.mlps
        for channels in _neurons(mapped, mlp, block)
    )


def norms(spec: Spec) -> tuple[Channels, ...]:
    """The channels of the norms of blocks. Raises `PassError`, also for families whose norms are read by others too."""
    mapped = _mapped(spec)
    declared = _norms(mapped)
    return tuple(channels for block in _whole_blocks(mapped) for channels in _block_norms(mapped, declared, block))


def residual_stream(spec: Spec) -> ResidualStream:
    """All that a rotation of the hidden states between blocks changes.

    Raises:
        PassError: a norm of the family does not commute with rotations, or the model ends in no head that predicts tokens.
    """
    mapped = _mapped(spec)
    declared, family = _norms(mapped), mapped.record.model_type
    if declared.centred:
        raise PassError(f"the norms of {family} subtract the mean, which no rotation of the hidden states keeps")
    if declared.behind:
        raise PassError(f"{family} normalises what blocks add to the hidden states, channel by channel")
    if mapped.head_weight is None or mapped.embedding is None or mapped.record.projections:
        raise PassError(f"{mapped.spec.structure.class_name or family} has no head that predicts tokens")
    final = mapped.record.find_name(spec, f"{declared.final}.weight")
    if final is None:
        raise PassError(f"no norm `{declared.final}` is in front of the head")
    width = mapped.hidden
    last = _norm(final.rpartition(".")[0], [mapped.head_weight.module], width, declared, "final norm", None)
    attention = mapped.record.attention
    assert attention is not None  # `_whole_blocks` knows every matrix
    writers = [
        f"{block.path}{part}"
        for block in _whole_blocks(mapped)
        for part in (attention.output, *(down for mlp in mapped.record.mlps for _, down in _experts(mlp, block)))
    ]
    return ResidualStream((*norms(spec), last), mapped.embedding, tuple(dict.fromkeys(writers)), width)


# ---- places ----


def _values(mapped: ModelMap, attention: Attention, path: str, index: int) -> Channels:
    heads, groups, width = mapped.heads, mapped.kv_heads, mapped.head_dim
    count = groups * width
    if attention.layout == "interleaved":
        rows = [(3 * head + 2) * width + w for head in range(heads) for w in range(width)]
    else:
        start = (heads + groups) * width if attention.layout == "stacked" else 0
        rows = list(range(start, start + count))
    shared = heads // groups
    read = [head // shared * width + w for head in range(heads) for w in range(width)]
    source = ChannelPlace(path + attention.value, "out", rows, range(count))
    reader = ChannelPlace(path + attention.output, "in", range(heads * width), read)
    return Channels("values", index, count, width, source, (reader,))


def _neurons(mapped: ModelMap, mlp: Mlp, block: ModelBlock) -> Iterator[Channels]:
    for ups, down in _experts(mlp, block):
        if len(ups) * mlp.sections != 2:
            continue  # no gate: the activation function lies between
        count = mapped.linears[f"{block.path}{down}.weight"].I
        start = count if mlp.sections == 2 else 0
        source = ChannelPlace(block.path + ups[-1], "out", range(start, start + count), range(count))
        reader = ChannelPlace(block.path + down, "in", range(count), range(count))
        yield Channels("neurons", block.index, count, count, source, (reader,))


def _block_norms(mapped: ModelMap, declared: Norms, block: ModelBlock) -> Iterator[Channels]:
    attention, record = mapped.record.attention, mapped.record
    assert attention is not None  # `_whole_blocks` knows every matrix
    heads = dict.fromkeys((attention.query, attention.key, attention.value))
    firsts = dict.fromkeys(up for mlp in record.mlps for ups, _ in _experts(mlp, block) for up in ups)
    routers = [part for part in record.routers if f"{part}.weight" in block.tensors]
    for norm, readers, kind in (
        (declared.attention, list(heads), "attention norm"),
        (declared.mlp, [*firsts, *routers], "mlp norm"),
    ):
        modules = [block.path + part for part in readers]
        yield _norm(block.path + norm, modules, mapped.hidden, declared, kind, block.index)  # type: ignore[arg-type]


def _norm(
    module: str, readers: Sequence[str], width: int, declared: Norms, kind: ChannelKind, block: int | None
) -> Channels:
    everything = range(width)
    source = ChannelPlace(module, "out", everything, everything)
    places = tuple(ChannelPlace(reader, "in", everything, everything) for reader in readers)
    return Channels(kind, block, width, width, source, places, declared.offset)


def _experts(mlp: Mlp, block: ModelBlock) -> Iterator[tuple[tuple[str, ...], str]]:
    """First layers and last layer of an MLP, of each of its experts, below the block; nothing where the block has none."""
    numbers = [""]
    if "*" in mlp.down:
        start = mlp.down.partition("*")[0]
        parts = (name.removeprefix(start) for name in block.tensors if name.startswith(start))
        numbers = list(dict.fromkeys(part.partition(".")[0] for part in parts))
    for number in numbers:
        ups, down = tuple(up.replace("*", number) for up in mlp.up), mlp.down.replace("*", number)
        if all(f"{module}.weight" in block.tensors for module in (*ups, down)):
            yield ups, down


# ---- requirements ----


def _mapped(spec: Spec) -> ModelMap:
    """The map of a model with a written record and one list of blocks. Raises `PassError`."""
    mapped = model_map(spec)
    if mapped.record.source != "written" or mapped.record.stacks:
        raise PassError(f"no record says what reads the norms and values of {mapped.config.get('model_type')}")
    return mapped


def _norms(mapped: ModelMap) -> Norms:
    declared = mapped.record.norms
    if declared is None or mapped.record.attention is None or not declared.fits(mapped.config):
        raise PassError(f"the norms of {mapped.record.model_type} are not read by linear layers of a block alone")
    return declared


def _whole_blocks(mapped: ModelMap) -> Iterator[ModelBlock]:
    """The blocks. Raises `PassError` where a block has a matrix that the record does not name."""
    record, attention = mapped.record, mapped.record.attention
    for block in mapped.blocks:
        known = set(record.routers)
        if attention is not None:
            known |= {attention.query, attention.key, attention.value, attention.output}
        for mlp in record.mlps:
            for ups, down in _experts(mlp, block):
                known |= {*ups, down}
        if unknown := next((linear for linear in block.linears if linear.part not in known), None):
            raise PassError(f"no record says what {unknown.name} reads and writes")
        yield block
