"""The map of a model: its blocks, weight matrices, roles, experts and shared tensors, read off the headers of a checkpoint.

``model_map(spec)`` is the one place to ask. A spec has one map, made when first asked for. It needs no torch for families with
a written record.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache
from typing import Any, cast

from compress import architectures
from compress.architectures.inferred import Inferred
from compress.architectures.matrices import Linear, ModelBlock, Role
from compress.architectures.record import Architecture
from compress.errors import PassError
from compress.spec.edits import EDIT_KINDS
from compress.spec.spec import Spec, Tensor

__all__ = ["Linear", "ModelBlock", "ModelMap", "Role", "model_map"]
#: Specs whose maps are kept.
_KEPT = 16


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
        """Whether the model has a list of blocks. Without one no matrix has a block."""
        return bool(self.record.blocks)

    @cached_property
    def record(self) -> Architecture:
        """The record of the family, or one that is read off the model; see `architectures.record_for`."""
        return architectures.record_for(self.spec)

    @property
    def depth(self) -> int:
        """Number of blocks of the main list."""
        return self.record.depth(self.config) if self.record.depth_key else len(self.paths)

    @property
    def hidden(self) -> int:
        """Width of the hidden states between blocks."""
        return self._number(self.record.hidden_key, "hidden states")

    @property
    def heads(self) -> int:
        """Number of query heads of a block."""
        return self._number(self.record.heads_key, "attention heads")

    def _number(self, key: str, name: str) -> int:
        value = self.record.value(self.config, key) if key else None
        if type(value) is not int:
            raise PassError(f"the config of {self.record.model_type} has no known number of {name}")
        return value

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
        tables = self.record.embeddings[:1]
        return next((name for name in self.spec.tensors for table in tables if name.endswith(f"{table}.weight")), None)

    @property
    def head_weight(self) -> Tensor | None:
        """The head's weight [V, h], which may be an alias of the embedding table; None without one."""
        return self.spec.tensors.get(self.record.head_tie) if self.has_head else None

    @property
    def tables(self) -> list[Tensor]:
        """The tables [V, h] of floats that tokens are looked up in and predicted with; a head that is tied is no other one."""
        if not self.known:
            return []
        named = [None if self.embedding is None else self.spec.tensors[self.embedding], self.head_weight]
        return [t for t in named if t is not None and t.alias_of is None and len(t.shape) == 2 and t.is_float]

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
        """Float weights of the linear layers of blocks that have bytes of their own; of all, where there are no blocks."""
        return tuple(x for x in self.linears.values() if x.is_layer and x.shared_with is None and x.tensor.is_float)

    @cached_property
    def targets(self) -> tuple[Linear, ...]:
        """The matrices that a pass takes by default: `layers`, but not residuals of low rank, and not those of towers."""
        return tuple(x for x in self.layers if x.role != "residual" and not self.record.in_tower(x.name))

    @cached_property
    def _joined(self) -> Mapping[tuple[str, int], list[Linear]]:
        joined: dict[tuple[str, int], list[Linear]] = {}
        for linear in self.linears.values():
            joined.setdefault((linear.module.rpartition(".")[0], linear.I), []).append(linear)
        return joined

    def joined(self, name: str) -> list[Linear]:
        """The matrices that servers may join with one, itself too: those of the same module with as many inputs."""
        linear = self.linears[name]
        return self._joined[linear.module.rpartition(".")[0], linear.I] if linear.block is not None else [linear]

    def added(self, name: str) -> Role | None:
        """The role of a tensor that an edit adds: factor, residual or projection; None for the model's own tensors."""
        return self._added.get(name.rpartition(".")[0])

    def _linear(self, tensor: Tensor) -> Linear:
        record, path = self.record, self.record.block_path(tensor.name)
        block = None if path is None else record.block_index(tensor.name)
        part = tensor.module if path is None else path[1].rpartition(".")[0]
        added = self._added.get(tensor.module)
        role = added or cast(Role, record.matrix_role(tensor.name, None if path is None else part))
        if added is None:
            layer = record.is_layer(tensor.name, path is not None)
        else:
            layer = path is not None and tensor.name.endswith(".weight")
        transposed = (
            len(tensor.shape) in (2, 3)
            and role not in ("factor", "residual")
            and record.is_transposed(tensor.name, path is not None)
        )
        base = next((f"{base}." for base in record.experts if part.startswith(f"{base}.")), "") if path else ""
        number = part.removeprefix(base).partition(".")[0] if base else ""
        kernel = isinstance(record, Inferred) and record.is_kernel(tensor.name)
        return Linear(tensor, role, block, part, transposed, int(number) if number.isdigit() else None, layer, kernel)

    # ---- requirements of passes ----

    def require_one_list(self, fix: str) -> None:
        """Raises `PassError`, with that fix, for families whose blocks are in several lists."""
        if self.record.stacks:
            raise PassError(
                f"the blocks of {self.record.model_type} are in several lists, which this does not tell apart",
                fix=fix,
            )

    def require_class(self, fix: str = "use a method that needs none, such as `rtn` or `magnitude`") -> None:
        """Raises `PassError`, with that fix, for a model that no class builds, so that it reads no data."""
        if self.record.source == "shapes" and not self.config.get("auto_map"):
            kind = self.config.get("model_type")
            raise PassError(
                f"no class of transformers builds a model of the type `{kind}`, so it reads no data",
                fix=fix,
            )

    def require_inside_blocks(self, names: Collection[str]) -> None:
        """Raises `PassError` for a tensor that calibrated methods do not reach: outside the blocks, or no linear layer."""
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
        record = self.record
        renamed = bool(record.memory) if isinstance(record, Inferred) else record.module_blocks is not None
        if record.stacks or renamed:
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
