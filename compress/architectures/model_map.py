"""The map of a model: its blocks, weight matrices, roles, experts and shared tensors, read off the headers of a checkpoint.

``model_map(spec)`` is the one place to ask. It needs no torch, and a spec has one map, made when first asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, cast

from compress import architectures
from compress.architectures.record import Architecture
from compress.errors import PassError
from compress.spec.edits import EDIT_KINDS
from compress.spec.spec import Spec, Tensor

#: The role of a weight matrix. In blocks: ``attention``, ``mlp``, ``router`` (chooses experts), ``distances`` (added to
#: attention scores). Outside: ``embedding``, ``head``. Added by edits: ``factor`` (one of two in place of a matrix),
#: ``residual`` (of low rank, beside a shared matrix), ``projection`` (between a thin embedding table and the hidden states).
Role = Literal[
    "attention", "mlp", "router", "distances", "embedding", "head", "factor", "residual", "projection", "other"
]
#: Specs whose maps are kept.
_KEPT = 16


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight matrix, or another tensor of two axes or more.

    Attributes:
        tensor: its entry in the spec. role: its role in the model.
        block: number of its block; None outside the blocks. part: its module, without the block's path.
        transposed: whether it is stored [I, O].
        expert: number of its expert; None outside of experts.
    """

    tensor: Tensor
    role: Role
    block: int | None
    part: str
    transposed: bool = False
    expert: int | None = None

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.tensor.name

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor."""
        return self.tensor.module

    @property
    def shared_with(self) -> str | None:
        """The tensor whose data it uses; None for data of its own."""
        return self.tensor.alias_of

    @property
    def input_axis(self) -> int:
        """Axis of the tensor that the inputs run along: -1, or 0 where it is transposed."""
        return 0 if self.transposed else -1

    @property
    def I(self) -> int:  # noqa: E743 - the letter of every formula
        """Number of inputs."""
        return self.tensor.shape[self.input_axis]

    @property
    def O(self) -> int:  # noqa: E743
        """Number of outputs."""
        return self.tensor.count // max(1, self.I)

    @property
    def is_layer(self) -> bool:
        """Whether it is the weight of a linear layer of a block. Routers and tables of distances are none."""
        return self.block is not None and self.name.endswith(".weight") and self.role not in ("router", "distances")


@dataclass(frozen=True, slots=True)
class ModelBlock:
    """One repeated layer.

    Attributes:
        index: its number within its list of blocks. path: beginning of its tensors' names, with the dot.
        tensors: name without the path ▶ tensor; those that it shares with other blocks too.
        linears: its matrices, in the order of the file.
    """

    index: int
    path: str
    tensors: Mapping[str, Tensor]
    linears: tuple[Linear, ...]

    def stored(self) -> list[Tensor]:
        """The tensors that have bytes of their own."""
        return [tensor for tensor in self.tensors.values() if tensor.alias_of is None]


class ModelMap:
    """Answers every question about a model's blocks and matrices. Make it by `model_map`.

    Attributes:
        spec: the headers it was read off.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._added = {
            f"{edit.module}.{part}": cast(Role, EDIT_KINDS[edit.kind].role)
            for edit in spec.structure.edits
            for part in EDIT_KINDS[edit.kind].adds
        }

    # ---- the family ----

    @property
    def config(self) -> Mapping[str, Any]:
        """The stock config."""
        return self.spec.structure.config

    @cached_property
    def known(self) -> bool:
        """Whether the family has a record. Without one no matrix has a block, and `record` raises."""
        return architectures.find(self.config) is not None

    @cached_property
    def record(self) -> Architecture:
        """The record of the family. Raises `PassError` where there is none."""
        return architectures.of(self.config)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.record.depth(self.config)

    @property
    def hidden(self) -> int:
        """Width of the hidden states between blocks."""
        return int(self.record.value(self.config, self.record.hidden_key))

    @property
    def heads(self) -> int:
        """Number of query heads of a block."""
        return int(self.record.value(self.config, self.record.heads_key))

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads of a block."""
        return self.record.kv_heads(self.config)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.record.head_dim(self.config)

    @cached_property
    def per_layer(self) -> Mapping[str, list[Any]]:
        """Config field ▶ its values by block, for the fields with one entry per block."""
        return self.record.per_layer_values(self.config)

    @property
    def positions(self) -> int | None:
        """Number of tokens that a text may have; None where nothing limits it, or without a record."""
        limits = [EDIT_KINDS[e.kind].longest(e) for e in self.spec.structure.edits]
        return min(filter(None, (self.known and self.record.positions(self.spec), *limits)), default=None)

    @property
    def trained_positions(self) -> int | None:
        """Number of tokens of the longest text the model was made for; None where neither table nor config tells."""
        known = self.config.get("max_position_embeddings")
        return self.positions or (known if isinstance(known, int) else None)

    @property
    def has_head(self) -> bool:
        """Whether the model has a head that predicts tokens."""
        return self.record.has_head(self.spec)

    @property
    def tied(self) -> bool:
        """Whether the config ties the head's weight to the embedding table."""
        return self.record.is_tied(self.spec)

    @cached_property
    def embedding(self) -> str | None:
        """Name of the table [V, h] that token ids are looked up in; None for a model that reads no token ids."""
        if self.record.input != "input_ids":
            return None
        return next((name for name in self.spec.tensors if name.endswith(f"{self.record.embeddings[0]}.weight")), None)

    @property
    def head_weight(self) -> Tensor | None:
        """The head's weight [V, h], which may be an alias of the embedding table; None without one."""
        return self.spec.tensors.get(self.record.head_tie) if self.has_head else None

    @property
    def experts_per_token(self) -> int:
        """Number of experts that each token is sent to; 1 where the config has no such number."""
        return int(self.record.value(self.config, self.record.active_experts_key or "") or 1)

    @property
    def expert_weights_sum_to_one(self) -> bool:
        """Whether the weights of a token's experts are divided by their sum."""
        key = self.record.expert_sum_key
        return key is None or bool(self.config.get(key))

    @property
    def cache_scales(self) -> Mapping[int, tuple[str, str]]:
        """Block number ▶ names of the static scales of its cached keys and values; empty where servers read none."""
        return self.record.cache_scales(self.spec) if self.known else {}

    @property
    def active_parameters(self) -> int:
        """Parameters used for one token; of experts, only those it is sent to. Without a record, all parameters."""
        return self.record.active_parameters(self.spec) if self.known else self.spec.parameters

    def in_memory(self, module: str) -> str:
        """The name that a module, called so in the file, has in a transformers model."""
        return self.record.in_memory(module, self.spec.structure.class_name) if self.known else module

    # ---- blocks and tensors ----

    @cached_property
    def blocks(self) -> tuple[ModelBlock, ...]:
        """The blocks by number; those of an encoder before those of a decoder."""
        parts: dict[tuple[str, int], dict[str, Tensor]] = {}
        paths: dict[tuple[str, int], str] = {}
        for tensor in self.spec.tensors.values():
            if (path := self.record.block_path(tensor.name)) is not None:
                start, rest = path
                stem, _, number = start[:-1].rpartition(".")
                parts.setdefault((stem, int(number)), {})[rest] = tensor
                paths[stem, int(number)] = start
        stems = list(dict.fromkeys(stem for stem, _ in parts))
        order = sorted(parts, key=lambda key: (self.record.in_stack(f"{paths[key]}x"), stems.index(key[0]), key[1]))
        return tuple(
            ModelBlock(
                key[1],
                paths[key],
                parts[key],
                tuple(self.linears[t.name] for t in parts[key].values() if t.name in self.linears),
            )
            for key in order
        )

    @cached_property
    def paths(self) -> Mapping[int, str]:
        """Number of a block ▶ the beginning of its tensors' names, with the dot; for families with one list of blocks."""
        return {block.index: block.path for block in self.blocks}

    @cached_property
    def outside(self) -> tuple[Tensor, ...]:
        """The tensors outside the blocks that have bytes of their own."""
        return tuple(tensor for tensor in self.spec.stored() if self.block_of(tensor.name) is None)

    def block_of(self, name: str) -> int | None:
        """Number of the block that a tensor belongs to; None outside the blocks, and without a record."""
        return self.record.block_index(name) if self.known else None

    def path_of(self, name: str) -> str | None:
        """Path of the block that a tensor belongs to, with the dot; None outside the blocks, and without a record."""
        path = self.record.block_path(name) if self.known else None
        return None if path is None else path[0]

    def is_expert(self, name: str) -> bool:
        """Whether a tensor belongs to one of a block's experts."""
        return self.known and self.record.is_expert(name)

    @cached_property
    def has_experts(self) -> bool:
        """Whether any tensor belongs to an expert."""
        return any(self.is_expert(name) for name in self.spec.tensors)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every module that owns a tensor, in the order of the file."""
        return tuple(dict.fromkeys(tensor.module for tensor in self.spec.tensors.values()))

    # ---- matrices ----

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """Name ▶ matrix, of every tensor with two axes or more, shared ones too."""
        return {t.name: self._linear(t) for t in self.spec.tensors.values() if len(t.shape) >= 2}

    @cached_property
    def layers(self) -> tuple[Linear, ...]:
        """Float weights of the linear layers of blocks that have bytes of their own. Raises `PassError` without a record."""
        architectures.of(self.config)
        return tuple(x for x in self.linears.values() if x.is_layer and x.shared_with is None and x.tensor.is_float)

    @cached_property
    def targets(self) -> tuple[Linear, ...]:
        """The matrices that a pass takes by default: `layers`, but not residuals of low rank."""
        return tuple(linear for linear in self.layers if linear.role != "residual")

    def added(self, name: str) -> Role | None:
        """The role of a tensor that an edit adds: factor, residual or projection; None for the model's own tensors."""
        return self._added.get(name.rpartition(".")[0])

    def _linear(self, tensor: Tensor) -> Linear:
        path = self.record.block_path(tensor.name) if self.known else None
        block = None if path is None else self.record.block_index(tensor.name)
        part = tensor.module if path is None else path[1].rpartition(".")[0]
        role = self._role(tensor, None if path is None else part)
        transposed = (
            self.known
            and self.record.input_axis == 0
            and path is not None
            and len(tensor.shape) == 2
            and role not in ("factor", "residual")
        )
        base = next((f"{base}." for base in self.record.experts if part.startswith(f"{base}.")), "") if path else ""
        number = part.removeprefix(base).partition(".")[0] if base else ""
        return Linear(tensor, role, block, part, transposed, int(number) if number.isdigit() else None)

    def _role(self, tensor: Tensor, part: str | None) -> Role:
        """The role of a matrix; ``part``: its module within its block, None outside the blocks."""
        if (added := self._added.get(tensor.module)) is not None:
            return added
        if not self.known:
            return "other"
        record = self.record
        if part is not None:
            return record.role(part)
        if tensor.name == record.head_tie or tensor.module == record.head:
            return "head"
        if tensor.module.endswith(record.embeddings):
            return "embedding"
        beside = record.projections[:2] if record.projections else ()
        return "projection" if tensor.module.endswith(beside) and beside else "other"

    # ---- requirements of passes ----

    def require_blockwise(self, fix: str) -> None:
        """Raises `PassError`, with that fix, for families whose blocks cannot run one after another."""
        if self.record.stacks:
            raise PassError(
                f"calibration cannot run the blocks of {self.record.model_type} one after another: those of its decoder also "
                "read the encoder's output",
                fix=fix,
            )

    def require_inside_blocks(self, names: Collection[str]) -> None:
        """Raises `PassError` for a tensor that calibrated methods do not reach: outside the blocks, or no linear layer."""
        self.require_blockwise("use `method: magnitude`")
        if outside := sorted(name for name in names if self.block_of(name) is None):
            raise PassError(
                f"{outside[0]} is outside the blocks, which calibrated methods do not reach",
                key="only",
                fix="use `method: magnitude` for it",
            )
        self.require_layers(names, "use `method: magnitude` for it")

    def require_layers(self, names: Collection[str], instead: str) -> None:
        """Raises `PassError` for a matrix of a block that is not a linear layer, such as a router."""
        inside = (linear for linear in map(self.linears.get, sorted(names)) if linear and linear.block is not None)
        if (linear := next((linear for linear in inside if not linear.is_layer), None)) is not None:
            module = re.sub(r"\.\d+(?=\.)", ".*", linear.module)
            raise PassError(
                f"{linear.name} is not a linear layer; calibrated methods change only linear layers",
                key="only",
                fix=f"leave it out: skip: [{module}], or {instead}",
            )

    def require_nameable(self, key: str | None = None, fix: str | None = None) -> None:
        """Raises `PassError` for families whose modules have other names in memory than their tensors in files."""
        if self.record.stacks or self.record.module_blocks is not None:
            raise PassError(
                f"the structure of {self.record.model_type} cannot be changed block by block", key=key, fix=fix
            )


class _Identity:
    """A spec as a key, compared by identity: specs hold mappings, so they have no hash."""

    __slots__ = ("spec",)

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return id(self.spec)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.spec is self.spec


@lru_cache(maxsize=_KEPT)
def _cached_map(key: _Identity) -> ModelMap:
    return ModelMap(key.spec)


def model_map(spec: Spec) -> ModelMap:
    """The map of a spec, the same one for the same spec."""
    return _cached_map(_Identity(spec))
