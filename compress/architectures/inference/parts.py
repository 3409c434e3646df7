"""The MLPs and the attention of a model's blocks, by names and widths.

A part is named only where every tensor beside it is accounted for: what else depends on its neurons or heads is not known.
Widths are compared in every block.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from compress.architectures.groups import Attention, Mlp
from compress.architectures.inferred import BlockList, Matrix, starred
from compress.spec.spec import Spec, Tensor

#: Last words of (modules whose outputs are the neurons, the module that reads them), and how often the outputs hold them.
_MLPS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("w1", "w3"), "w2", 1),
    (("wi_0", "wi_1"), "wo", 1),
    (("gate", "up"), "down", 1),
    (("fc1", "fc3"), "fc2", 1),
    (("linear_fc1",), "linear_fc2", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("up_proj",), "down_proj", 1),
    (("wi",), "wo", 1),
    (("fc1",), "fc2", 1),
    (("w1",), "w2", 1),
    (("lin1",), "lin2", 1),
    (("c_fc",), "c_proj", 1),
    (("c_fc_0", "c_fc_1"), "c_proj", 1),
    (("ffn.0",), "ffn.2", 1),
    (("fc_in",), "fc_out", 1),
    (("dense_h_to_4h",), "dense_4h_to_h", 1),
    (("linear1",), "linear2", 1),
    (("linear_1",), "linear_2", 1),
    (("layer_1",), "layer_2", 1),
    (("intermediate.dense",), "output.dense", 1),
    (("ffn",), "ffn_output", 1),
    (("intermediate_dense",), "output_dense", 1),
    (("up",), "down", 1),
    (("w_in.w_0", "w_in.w_1"), "w_out", 1),
    (("intermediate",), "output", 1),
)
#: Last words of the projections to queries, keys, values, and from heads.
_ATTENTIONS: tuple[tuple[str, str, str, str], ...] = tuple(
    (q, k, v, o)
    for q, k, v, outputs in (
        ("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj", "dense", "c_proj")),
        ("query", "key", "value", ("output.dense", "dense", "out", "output")),
        ("self.query", "self.key", "self.value", ("output.dense",)),
        ("attention.query", "attention.key", "attention.value", ("output.dense",)),
        ("q", "k", "v", ("o", "out", "proj")),
        ("wq", "wk", "wv", ("wo",)),
        ("q_lin", "k_lin", "v_lin", ("out_lin",)),
        ("to_q", "to_k", "to_v", ("to_out.0", "to_out")),
        ("linear_q", "linear_k", "linear_v", ("linear_out",)),
        ("query_proj", "key_proj", "value_proj", ("out_proj", "o_proj")),
    )
    for o in outputs
)
_CROSS = re.compile(r"cross|encoder_attn|encdec|encoder_decoder", re.IGNORECASE)


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model's config: heads, heads of keys and values, width of a head; None where unknown."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None


class Blocks:
    """The tensors of every block by their names below it.

    Attributes:
        blocks: one mapping per block, over all lists.
    """

    def __init__(self, spec: Spec, lists: Sequence[BlockList], matrices: Mapping[str, Matrix]) -> None:
        self._matrices = matrices
        inside: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
        for tensor in spec.tensors.values():
            entry = next((e for e in lists if e.kind != "tower" and tensor.name.startswith(f"{e.path}.")), None)
            if entry is not None:
                number, _, part = tensor.name[len(entry.path) + 1 :].partition(".")
                inside[entry.path, number][part] = tensor
        self.blocks = list(inside.values())

    def sides(self, tensor: Tensor) -> tuple[int, int] | None:
        """(inputs, outputs) of a linear layer's weight; None for another tensor."""
        matrix = self._matrices.get(starred(tensor.name))
        if matrix is None or not matrix.layer or len(tensor.shape) != 2:
            return None
        outputs, inputs = tensor.shape
        return (outputs, inputs) if matrix.transposed else (inputs, outputs)

    def layers(self, block: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
        """Linear layer of a block ▶ (inputs, outputs)."""
        sides = {part.removesuffix(".weight"): self.sides(tensor) for part, tensor in block.items()}
        return {part: side for part, side in sides.items() if side is not None}


def mlps_of(blocks: Blocks, experts: Sequence[str]) -> tuple[Mlp, ...]:
    """The MLPs of the blocks; those of which the widths differ from what is expected are left out.

    No config field is named for their widths: many fields may have the same value. ``experts``: modules with numbered experts.
    """
    widths: dict[Mlp, None] = {}
    refused: set[Mlp] = set()
    for block in blocks.blocks:
        layers = blocks.layers(block)
        taken: set[str] = set()
        for mlp in _candidates(layers, experts):
            names = {*mlp.up, mlp.down}
            if names & taken:
                continue
            taken |= names
            general = _general(mlp, experts)
            width = layers[mlp.down][0]
            if all(layers[up][1] == width * mlp.sections for up in mlp.up) and not _beside(block, mlp, width, layers):
                widths[general] = None
            else:
                refused.add(general)
    kept = (mlp for mlp in widths if mlp not in refused)
    return tuple(replace(mlp, multiple=8 if "*" in mlp.down else 1) for mlp in kept)


def _candidates(layers: Mapping[str, tuple[int, int]], experts: Sequence[str]) -> Iterator[Mlp]:
    """MLPs of one block by name, with the numbers of experts."""
    parents = {part.rpartition(".")[0] for part in layers} | {""}
    parents |= {parent.rpartition(".")[0] for parent in parents}
    for ups, down, sections in _MLPS:
        for parent in sorted(parents):
            start = f"{parent}." if parent else ""
            names = [start + up for up in ups]
            if start + down in layers and all(name in layers for name in names):
                yield Mlp(tuple(names), start + down, None, sections)


def _general(mlp: Mlp, experts: Sequence[str]) -> Mlp:
    """The MLP with ``*`` for the number of its expert."""

    def general(part: str) -> str:
        base = next((f"{base}." for base in experts if part.startswith(f"{base}.")), None)
        return part if base is None else f"{base}*.{part.removeprefix(base).partition('.')[2]}"

    return replace(mlp, up=tuple(map(general, mlp.up)), down=general(mlp.down))


def _beside(block: Mapping[str, Tensor], mlp: Mlp, width: int, layers: Mapping[str, tuple[int, int]]) -> bool:
    """Whether another tensor near an MLP has an axis of its width, such as a norm of the neurons."""
    own = {*mlp.up, mlp.down}
    parent = mlp.down.rpartition(".")[0]
    near = f"{parent}." if parent and all(up.startswith(f"{parent}.") for up in mlp.up) else ""
    for part, tensor in block.items():
        module = part.rpartition(".")[0]
        if module in own or not part.startswith(near):
            continue
        elsewhere = {side for m in layers if m not in own for side in layers[m]}
        told = bool(near) or width not in elsewhere
        if told and width in tensor.shape and "expert" not in part[len(near) :]:
            return True
    return False


def attentions_of(blocks: Blocks, sizes: Sizes, free: bool) -> tuple[Attention | None, Attention | None]:
    """Self-attention and cross-attention of the blocks; None where some block has none or another one.

    Args:
        free: whether the config has a field for the width of a head.
    """
    present: dict[Attention, int] = defaultdict(int)
    for block in blocks.blocks:
        layers = blocks.layers(block)
        for attention in _by_name(layers):
            if not _fits(attention, layers, sizes):
                return None, None
            logits = _logits(block, attention, sizes)
            norms = _norms(block, attention, layers, sizes)
            if norms is False or logits is False:
                return None, None
            present[replace(attention, free=free, logits=logits, norms=norms)] += 1
    own = [a for a in present if not _CROSS.search(a.query)]
    cross = [a for a in present if _CROSS.search(a.query)]
    if len(own) != 1 or present[own[0]] != len(blocks.blocks) or len(cross) > 1:
        return None, None
    return own[0], cross[0] if cross else None


def _by_name(layers: Mapping[str, tuple[int, int]]) -> Iterator[Attention]:
    """The attentions of one block by name; each with its own module of queries."""
    seen: set[str] = set()
    for q, k, v, o in _ATTENTIONS:
        for part in layers:
            start = part.removesuffix(q)
            if (part != q and not part.endswith(f".{q}")) or part in seen:
                continue
            if all(start + name in layers for name in (k, v, o)):
                seen.add(part)
                yield Attention(part, start + k, start + v, start + o)


def _fits(attention: Attention, layers: Mapping[str, tuple[int, int]], sizes: Sizes) -> bool:
    """Whether the widths are those of the config's heads."""
    if sizes.heads is None or sizes.head_dim is None:
        return False
    wide, narrow = sizes.heads * sizes.head_dim, (sizes.kv_heads or sizes.heads) * sizes.head_dim
    widths = layers[attention.query][1], layers[attention.key][1], layers[attention.value][1]
    return widths == (wide, narrow, narrow) and layers[attention.output][0] == wide


def _near(attention: Attention) -> str:
    """The path, with the dot, that all parts of an attention begin with."""
    parts = [m.split(".") for m in (attention.query, attention.key, attention.value, attention.output)]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return "".join(f"{word}." for word in parts[0][:shared])


def _logits(block: Mapping[str, Tensor], attention: Attention, sizes: Sizes) -> str | Literal[False] | None:
    """The parameter of the attention with one entry per head; None without one, False where something is not known."""
    own = {attention.query, attention.key, attention.value, attention.output}
    near, logits = _near(attention), None
    for part, tensor in block.items():
        if not near or not part.startswith(near) or part.rpartition(".")[0] in own or len(tensor.shape) == 0:
            continue
        if tensor.shape == (sizes.heads,) and part.rpartition(".")[2] in ("sinks", "sink"):
            logits = part
        elif not re.search(r"norm|ln|layer_?norm", part, re.IGNORECASE):
            return False
    return logits


def _norms(
    block: Mapping[str, Tensor], attention: Attention, layers: Mapping[str, tuple[int, int]], sizes: Sizes
) -> tuple[str, str] | Literal[False] | None:
    """Norms of all queries and of all keys together; None without them, False where another norm spans heads."""
    near, wide, narrow = _near(attention), layers[attention.query][1], layers[attention.key][1]
    names = {part: t.shape for part, t in block.items() if near and part.startswith(near) and len(t.shape) == 1}
    norms = {part: shape for part, shape in names.items() if part.rpartition(".")[0] not in {*layers}}
    spanning = {part: shape[0] for part, shape in norms.items() if shape[0] in (wide, narrow) and "norm" in part}
    q = [part for part in spanning if re.search(r"(?:^|\.)q\w*norm\.weight$", part)]
    k = [part for part in spanning if re.search(r"(?:^|\.)k\w*norm\.weight$", part)]
    if wide not in spanning.values():  # norms of single heads, though there may be one head of keys alone
        return None if not spanning or {*spanning.values()} == {sizes.head_dim} else False
    if len(spanning) == 2 and len(q) == 1 and len(k) == 1:
        return q[0], k[0]
    return False
