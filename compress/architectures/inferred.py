"""A record that was read off a model's class, or off the names and shapes of its tensors. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from compress.architectures.record import Architecture, BlockRole
from compress.errors import PassError
from compress.spec.spec import Spec

#: Role of a matrix outside the blocks.
OuterRole = Literal["embedding", "head", "other"]


def starred(name: str) -> str:
    """A name with ``*`` for every part that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def refilled(pattern: str, name: str) -> str:
    """A pattern with its stars replaced by the numbers in a name, in order; stars beyond these stay."""
    numbers = iter([part for part in name.split(".") if part.isdigit()])
    return ".".join(next(numbers, "*") if part == "*" else part for part in pattern.split("."))


def _pattern(paths: Sequence[str]) -> re.Pattern[str]:
    """Matches a tensor of an item of one of these lists. Groups: the path up to the number, the number, the rest."""
    if not paths:
        return re.compile(r"(?!)()()()")
    lists = "|".join(re.escape(p).replace(r"\*", "[0-9]+") for p in sorted(paths, key=len, reverse=True))
    return re.compile(rf"^((?:{lists})\.)(0|[1-9][0-9]{{0,8}})(\..+)$", re.DOTALL)


@dataclass(frozen=True)
class BlockList:
    """A list of repeated blocks.

    Attributes:
        path: in files. module: in memory, for the class that the record was read off.
        kind: ``main``, ``stack`` (runs beside or after the main one, such as a decoder after an encoder) or ``tower`` (makes
            inputs of the main list from images or sound; its layers are no blocks).
        depth_key: config field with its length, with dots for nested configs; None where it is not known.
        section: part of the config that describes it, with dots; empty for the config itself.
    """

    path: str
    module: str
    kind: Literal["main", "stack", "tower"] = "main"
    depth_key: str | None = None
    section: str = ""


@dataclass(frozen=True)
class Matrix:
    """A tensor of two axes or more.

    Attributes:
        role: its role. layer: whether it is the weight of a linear layer or a convolution that passes take.
        transposed: whether it is stored [I, O]. kernel: whether it is the kernel of a convolution.
    """

    role: BlockRole | OuterRole = "other"
    layer: bool = False
    transposed: bool = False
    kernel: bool = False


@dataclass(frozen=True)
class Inferred(Architecture):
    """A record read off a model. Names are those of the files that it was read off, so they need no rules for prefixes.

    Attributes:
        class_name: the class that it was read off; None for shapes alone.
        lists: the lists of blocks; the main one first, then in the order of computation.
        matrices: tensor ▶ what it is; ``*`` stands for numbers. A whole name goes before its pattern.
        memory: module in files ▶ module in memory, where they differ; ``*`` stands for numbers.
        pairs: (name, source) of tied parameters, named as in files.
        head_pair: the pair that the config's ``tie_word_embeddings`` alone unties; None without one.
        ignored: tensors of files that the class does not read; ``*`` stands for numbers.
        section: part of the config that describes the main list, with dots; empty for the config itself.
        numbers: fields of it that list numbers of blocks.
        defaults: config fields that the files may leave out ▶ their values in transformers.
        longest: tokens of the longest text; None where no table limits it.
        absent: linear layers in memory that the files have no tensor of; they are tied, or have random weights.
        whole: tensors that transformers splits, joins, turns or shares, or that linear layers of other classes than torch's
            hold, so that it loads no codes of them; ``*``: numbers.
        joined: whether it makes weights other than experts' from several; it finds none of these beside codes.
        unknown: parts that could not be told for certain, in words.
    """

    class_name: str | None = None
    lists: tuple[BlockList, ...] = ()
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    memory: Mapping[str, str] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    head_pair: tuple[str, str] | None = None
    ignored: tuple[str, ...] = ()
    section: str = ""
    numbers: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    longest: int | None = None
    absent: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    joined: bool = False
    unknown: tuple[str, ...] = ()

    # ---- names ----

    @cached_property
    def block_pattern(self) -> re.Pattern[str]:
        """Matches a tensor of a block. Groups: the path up to the number, the number, the rest with its dot."""
        return _pattern([entry.path for entry in self.of_kind("main", "stack")])

    @cached_property
    def _tower_pattern(self) -> re.Pattern[str]:
        return _pattern([entry.path for entry in self.of_kind("tower")])

    def list_of(self, name: str) -> str | None:
        """Path of the list of blocks that a tensor is in, with numbers; None outside the blocks and in towers."""
        match = self.block_pattern.match(name)
        return None if match is None else match[1].removesuffix(".")

    def in_stack(self, name: str) -> bool:
        """Whether a tensor belongs to a block of another list than the main one."""
        match = self.block_pattern.match(name)
        return match is not None and match[1] != f"{self.lists[0].path}."

    def in_tower(self, name: str) -> bool:
        """Whether a tensor belongs to a layer of a tower, which makes inputs from images or sound; these are no blocks."""
        return self._tower_pattern.match(name) is not None

    def in_memory(self, module: str, class_name: str | None) -> str:
        """Name in memory of a module, given its name in files."""
        known = self.memory.get(module) or self.memory.get(starred(module))
        return module if known is None else refilled(known, module)

    def is_leftover(self, name: str, class_name: str | None) -> bool:
        """Whether a tensor of a file is a leftover, which the class does not read."""
        return starred(name) in self.ignored

    def find_name(self, spec: Spec, name: str) -> str | None:
        """The name as the file has it: with the prefix, or without; None if there is no such tensor."""
        prefixes = (f"{self.prefix}." if self.prefix else "", "")
        return next((p + name for p in prefixes if p + name in spec.tensors), None)

    # ---- matrices ----

    def matrix_role(self, name: str, part: str | None) -> Any:
        """The role of a matrix; ``part``: its module within its block, None outside the blocks."""
        return self._matrix(name).role

    def is_layer(self, name: str, in_block: bool) -> bool:
        """Whether a tensor is the weight of a linear layer that passes take."""
        return self._matrix(name).layer

    def is_transposed(self, name: str, in_block: bool) -> bool:
        """Whether a matrix is stored [I, O]."""
        return self._matrix(name).transposed

    def _matrix(self, name: str) -> Matrix:
        return self.matrices.get(name) or self.matrices.get(starred(name)) or Matrix()

    def is_kernel(self, name: str) -> bool:
        """Whether a tensor is the kernel of a convolution."""
        return self._matrix(name).kernel

    # ---- ties ----

    def tied_pairs(self, spec: Spec) -> list[tuple[str, str]]:
        """(name, source) of the head's weight and the table that the config ties it to; none without such a tie."""
        return [] if self.head_pair is None else [self.head_pair]

    def held_copies(self, spec: Spec) -> list[tuple[str, str]]:
        """(name, source) of tied parameters beside the head of which the file holds both."""
        return [p for p in self.pairs if p != self.head_pair and spec.tensors.keys() >= {*p}]

    def is_tied(self, spec: Spec) -> bool:
        """Whether the head's weight is the embedding table: the config ties them, and the files do not hold two."""
        pair = self.head_pair
        return pair is not None and not all(n in spec.tensors and spec.tensors[n].alias_of is None for n in pair)

    def has_head(self, spec: Spec) -> bool:
        """Whether the checkpoint's class has a head that predicts tokens."""
        return self.head is not None

    # ---- config ----

    def part_of(self, config: Mapping[str, Any], section: str | None = None) -> Mapping[str, Any]:
        """The part of a config that describes the main list, or another section; empty where it is left out."""
        part: Any = config
        for key in filter(None, (self.section if section is None else section).split(".")):
            part = part.get(key) if isinstance(part, Mapping) else None
        return part if isinstance(part, Mapping) else {}

    def with_part(self, config: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
        """The config with another part that describes the main list."""

        def put(inside: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
            if not keys:
                return dict(part)
            inner = inside.get(keys[0])
            return {**inside, keys[0]: put(inner if isinstance(inner, Mapping) else {}, keys[1:])}

        return put(config, [key for key in self.section.split(".") if key])

    def value(self, config: Mapping[str, Any], key: str) -> Any:
        """Value of a field of the main list's config under any of its spellings; transformers' default where it has none."""
        given = super().value(self.part_of(config), key)
        return self.defaults.get(key) if given is None else given

    def length(self, config: Mapping[str, Any], entry: BlockList) -> int | None:
        """Number of blocks of a list by the config; None where no field is known."""
        if entry.depth_key is None:
            return None
        section, _, key = entry.depth_key.rpartition(".")
        given = super().value(self.part_of(config, section), key)
        value = self.defaults.get(entry.depth_key) if given is None else given
        return value if type(value) is int else None

    def per_layer_values(self, config: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Config field ▶ its list of one entry per block."""
        lists = {key: self.value(config, key) for key in self.per_layer}
        return {key: value for key, value in lists.items() if isinstance(value, list)}

    def cut_depth(self, config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
        """The config with only the blocks ``keep`` of the main list; see `Architecture.cut_depth`.

        Raises:
            PassError: no field with the number of blocks is known.
        """
        if not self.depth_key:
            raise PassError(
                f"the config field with the number of blocks of {self.model_type} is not known", key="layers"
            )
        about = {*self.per_layer, *self.numbers, self.dense_first_key, self.dense_blocks_key, self.sparse_step_key}
        whole = {**{k: v for k, v in self.defaults.items() if k in about}, **self.part_of(config)}
        cut = super().cut_depth(whole, keep)
        cut |= {
            key: [new for new, old in enumerate(keep) if old in whole[key]] for key in self.numbers if whole.get(key)
        }
        return self.with_part(config, cut)

    def _cut_lists(self, config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, list[Any]]:
        return {key: [values[i] for i in keep] for key, values in self.per_layer_values(config).items()}

    def positions(self, spec: Spec) -> int | None:
        """Number of tokens that a text may have; None where positions are computed."""
        return self.longest

    # ---- lists ----

    def of_kind(self, *kinds: str) -> Iterator[BlockList]:
        """The lists of these kinds."""
        return (entry for entry in self.lists if entry.kind in kinds)
