"""The declarative record of a model family, and what can be read off it. Imports neither torch nor numpy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from compress.architectures.groups import Attention, Hidden, Mlp, Relative
from compress.errors import CheckpointError, PassError
from compress.spec.classes import CAUSAL_LM, MASKED_LM
from compress.spec.spec import DTYPE_BITS, FLOAT_DTYPES, Spec

#: What a matrix of a block does: ``distances`` are added to the scores of attention.
BlockRole = Literal["attention", "mlp", "router", "distances", "other"]


@dataclass(frozen=True)
class Leftover:
    """Tensors that files of a family may hold and a class does not read.

    Attributes:
        pattern: regular expression that such a name ends with, or has after a dot.
        lacking: how the names of the classes without such tensors end; all classes, where not said.
    """

    pattern: str
    lacking: tuple[str, ...] = ("",)

    def fits(self, name: str, class_name: str) -> bool:
        """Whether a class of that name has no tensor of that name, but files may."""
        return class_name.endswith(self.lacking) and re.search(rf"(?:^|\.)(?:{self.pattern})", name) is not None


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Names are those of files, which are not always those of modules in memory.

    Attributes:
        model_type: as in ``config.json``.
        prefix: name of the base model inside a class with a head (``model.`` of ``model.layers``); files written by the base
            class alone leave it out, all of it or its first part.
        blocks: path of the list of repeated blocks below the prefix.
        embeddings: modules below the prefix that look up vectors, or make them of pixels; the one of the vocabulary first.
        position_table: the one of them that holds a learned vector per position; None where positions are computed.
        skipped_positions: config ▶ how many of that table's rows, its first ones, no token is given.
        stacks: further such lists (the decoder's, where ``blocks`` are the encoder's) ▶ the config field with their number; a
            model may lack them. A sweep cannot follow such families, and no block can go by its number.
        module_blocks: path of that list in the model, where transformers renames it on loading.
        renames: (pattern, replacement) pairs, applied in order to a module's name in files, that give its name in the model.
        pooler: module below the prefix that the base class has and files may leave out.
        packable: whether stock transformers loads codes that lie under another name than the weight's.
        flat_classes: how the names end of classes with a head whose model has the blocks without the prefix.
        input: what the model reads, an argument of its forward: token ids, or something else that text cannot give.
        head: module (no prefix) that projects onto the vocabulary, None for a base model.
        head_tie: the parameter that ``tie_word_embeddings`` ties to the first embedding.
        projections: modules below the prefix between a thinner table of embeddings and the hidden states, and between them and
            a head tied to it, and the config field with its width; None where the stock class has no such thing.
        bias_tie: (target, source) of a head's bias that ``tie_word_embeddings`` ties to another parameter.
        head_classes: how the names of the classes with that head end.
        depth_key, hidden_key, heads_key: config fields; ``kv_heads_key`` and ``head_dim_key`` where the family has them.
        spellings: other names that configs give those fields ▶ the field; where both stand, the other name counts.
        per_layer: config fields that hold one entry per block.
        per_layer_defaults: those that older configs leave out ▶ what transformers makes of the config without them.
        dense_blocks_key: config field that lists the numbers of blocks without experts.
        sparse_step_key: config field beside it: every so many-th block has experts.
        numbered: config switches that make a block's computation depend on its number.
        routers: modules inside a block that choose experts: matrices, but no linear layers to prune.
        experts: modules inside a block that hold the experts; ``experts_key`` (how many) and ``active_experts_key`` (how
            many of them a token uses) are config fields.
        input_axis: axis of a weight matrix that its inputs run along: -1 for Linear, 0 for GPT-2's Conv1D.
        scaled_cache: attention module of a block beside which servers look for static scales of cached keys and values; None
            where they look for none.
        causal: whether it decodes, as it reads, with a key-value cache.
        tie_default: value of ``tie_word_embeddings`` where the config does not say it.
        mlps, attention, hidden: what structured pruning may narrow, see `architectures.groups`.
        cross: attention of a decoder's blocks to what the encoder gives, beside ``attention``.
        relative: a stock family to become where the config forbids a new number of heads.
        base_class: name of the class without a head.
        leftovers: what files may hold beside the model: heads of other classes, tables that models now compute.
        old_names: ends of names that older files spell otherwise ▶ as transformers spells them.
        copies: parameters (no prefix) that are the first embedding's, whatever the config says; files may hold them.
    """

    model_type: str
    prefix: str
    blocks: str
    embeddings: tuple[str, ...]
    position_table: str | None = None
    skipped_positions: Callable[[Mapping[str, Any]], int] = lambda config: 0
    stacks: Mapping[str, str] = field(default_factory=dict)
    module_blocks: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    pooler: str | None = None
    packable: bool = True
    flat_classes: tuple[str, ...] = ()
    input: str = "input_ids"
    head: str | None = "lm_head"
    head_tie: str = "lm_head.weight"
    projections: tuple[str, str, str] | None = None
    bias_tie: tuple[str, str] | None = None
    head_classes: tuple[str, ...] = (*CAUSAL_LM.suffixes, *MASKED_LM.suffixes, "ForPreTraining")
    depth_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = None
    head_dim_key: str | None = None
    spellings: Mapping[str, str] = field(default_factory=dict)
    per_layer: tuple[str, ...] = ()
    per_layer_defaults: Mapping[str, Callable[[Mapping[str, Any]], list[Any]]] = field(default_factory=dict)
    dense_blocks_key: str | None = None
    sparse_step_key: str | None = None
    numbered: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    experts_key: str | None = None
    active_experts_key: str | None = None
    input_axis: int = -1
    scaled_cache: str | None = None
    causal: bool = True
    tie_default: bool = False
    mlps: tuple[Mlp, ...] = ()
    attention: Attention | None = None
    cross: Attention | None = None
    hidden: Hidden | None = None
    relative: Relative | None = None
    base_class: str = ""
    leftovers: tuple[Leftover, ...] = ()
    old_names: Mapping[str, str] = field(default_factory=dict)
    copies: tuple[str, ...] = ()

    @cached_property
    def _block(self) -> re.Pattern[str]:
        """Groups: what stands before the number, the number, the rest with its dot."""
        first, _, rest = self.prefix.rpartition(".")
        inner = f"(?:{re.escape(first)}\\.)?{re.escape(rest)}\\." if first else f"{re.escape(rest)}\\."
        lists = "|".join(map(re.escape, filter(None, (self.blocks, *self.stacks, self.module_blocks))))
        return re.compile(rf"^((?:{inner})?(?:{lists})\.)(0|[1-9][0-9]{{0,8}})(\..+)$", re.DOTALL)

    def value(self, config: Mapping[str, Any], key: str) -> Any:
        """A field of the config under any of its names, None where it has none."""
        names = [*(name for name, meant in self.spellings.items() if meant == key), key]
        return next((config[name] for name in names if config.get(name) is not None), None)

    def block_index(self, name: str) -> int | None:
        """Number of the block that a tensor belongs to, None outside the blocks."""
        match = self._block.match(name)
        return int(match[2]) if match else None

    def block_path(self, name: str) -> tuple[str, str] | None:
        """(what a tensor's name begins with up to its block's number and dot, the rest); None outside the blocks."""
        match = self._block.match(name)
        return (f"{match[1]}{match[2]}.", match[3][1:]) if match else None

    def in_stack(self, name: str) -> bool:
        """Whether a tensor belongs to a block of a further list, such as the decoder's beside the encoder's."""
        match = self._block.match(name)
        return match is not None and match[1].endswith(tuple(f"{stack}." for stack in self.stacks))

    def renumber(self, name: str, index: int) -> str:
        """The tensor's name in block ``index``."""
        return self._block.sub(rf"\g<1>{index}\g<3>", name)

    @staticmethod
    def is_base(class_name: str | None) -> bool:
        """Whether a class, None where the config names none, is the one without a head."""
        return class_name is None or re.search(r"(?<!Head)(?<!Heads)Model$", class_name) is not None

    def in_memory(self, module: str, class_name: str | None) -> str:
        """The name that a module, called so in a file, has in a model of that class (None: the base class)."""
        for pattern, replacement in self.renames:
            module = re.sub(pattern, replacement, module)
        first, _, rest = self.prefix.partition(".")
        if class_name is None or self.is_base(class_name):
            return module.removeprefix(f"{first}.")
        paths = (self.blocks, *self.stacks, self.module_blocks, *self.embeddings, *(self.projections or ())[:2])
        parts = {rest or path.partition(".")[0] for path in filter(None, paths)} | {"pooler"}
        if module.partition(".")[0] in parts and not class_name.endswith(self.flat_classes):
            return f"{first}.{module}"  # files of the base class leave the prefix out
        return module

    def is_block_matrix(self, name: str) -> bool:
        """Whether a matrix of that name is a linear layer of a block (what pruning takes by default); routers are none."""
        match = self._block.match(name)
        others = (*self.routers, self.attention.table if self.attention else None)
        return match is not None and name.endswith(".weight") and match[3][1:].rpartition(".")[0] not in others

    @cached_property
    def _roles(self) -> Mapping[str, BlockRole]:
        """Module below a block ▶ its role; ``*`` stands for the number of an expert."""
        found: dict[str, BlockRole] = {}
        for attention in filter(None, (self.attention, self.cross)):
            modules = (attention.query, attention.key, attention.value, attention.output)
            found |= dict.fromkeys(modules, "attention")
            if attention.table is not None:
                found[attention.table] = "distances"
        for mlp in self.mlps:
            found |= dict.fromkeys((*mlp.up, mlp.down), "mlp")
        return found | dict.fromkeys(self.routers, "router")

    def role(self, part: str) -> BlockRole:
        """The role of a matrix of a block, by its module's path below the block."""
        return self._roles.get(self.starred(part), "other")

    def starred(self, part: str) -> str:
        """The path of a module below a block, with ``*`` for the number of an expert."""
        base = next((f"{base}." for base in self.experts if part.startswith(f"{base}.")), None)
        return part if base is None else f"{base}*.{part.removeprefix(base).partition('.')[2]}"

    def depth(self, config: Mapping[str, Any]) -> int:
        """Number of blocks."""
        return int(self.value(config, self.depth_key))

    def per_layer_values(self, config: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Config field ▶ its list of one entry per block; the family's default where the config leaves it out."""
        found = {}
        for key in self.per_layer:
            values = config.get(key)
            if values is None and key in self.per_layer_defaults:
                values = self.per_layer_defaults[key](config)
            if isinstance(values, list):
                found[key] = values
        return found

    def cut_depth(self, config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
        """The config with only the blocks ``keep``: depth, every per-layer list, and block numbers.

        Raises:
            PassError: blocks compute by their number, which would change.
        """
        if switch := next((key for key in self.numbered if config.get(key)), None):
            raise PassError(
                f"`{switch}` makes each block compute by its number, so none can go without changing the others",
                key="layers",
            )
        depth = self.depth(config)
        result = {key: value for key, value in config.items() if self.spellings.get(key) != self.depth_key}
        result[self.depth_key] = len(keep)
        for key, values in self.per_layer_values(config).items():
            if len(values) == depth:
                result[key] = [values[i] for i in keep]
        if self.dense_blocks_key and self.sparse_step_key:
            # a step cannot say which blocks have experts once some are gone; the list of those without them always can
            step = int(config.get(self.sparse_step_key) or 1)
            listed = config.get(self.dense_blocks_key) or []
            dense = [i in listed or (i + 1) % step != 0 for i in keep]
            result[self.sparse_step_key] = 1
            result[self.dense_blocks_key] = [new for new, is_dense in enumerate(dense) if is_dense]
        return result

    def positions(self, spec: Spec) -> int | None:
        """How many tokens a text may have; None where positions are computed (rotary, ALiBi)."""
        name = self._find(spec, f"{self.position_table}.weight") if self.position_table else None
        return spec.tensors[name].shape[0] - self.skipped_positions(spec.structure.config) if name else None

    def head_dim(self, config: Mapping[str, Any]) -> int:
        """Width of one attention head."""
        explicit = self.value(config, self.head_dim_key) if self.head_dim_key else None
        return int(explicit or self.value(config, self.hidden_key) // self.value(config, self.heads_key))

    def rotary_entries(self, config: Mapping[str, Any]) -> int:
        """Entries of a key that rotary positions turn in pairs; 0 where something else lies between queries and keys."""
        if self.attention is None or not self.attention.rotary:
            return 0
        nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
        share = config.get("partial_rotary_factor") or nested.get("partial_rotary_factor") or 1
        return int(self.head_dim(config) * share)

    def kv_bytes_per_token(self, config: Mapping[str, Any], *, quantised: bool = False) -> int | None:
        """Bytes of keys and values that decoding caches per token, in ``config.dtype`` or 8 bits; None without a cache.

        Sliding windows are left out of account: blocks with one stop growing once it is full, so for texts longer than the
        window this is more than what is cached.
        """
        if not self.causal:
            return None
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        bits = 8 if quantised else next((DTYPE_BITS[k] for k, v in FLOAT_DTYPES.items() if v == dtype), 32)
        return 2 * self.depth(config) * self.kv_heads(config) * self.head_dim(config) * bits // 8

    def cache_scales(self, spec: Spec) -> dict[int, tuple[str, str]]:
        """Number of a block ▶ names of the static scales of its cached keys and values; empty where servers read none."""
        if self.scaled_cache is None:
            return {}
        paths = {self.block_path(name) for name in spec.tensors} - {None}
        starts = {int(path[0].rstrip(".").rpartition(".")[2]): path[0] for path in paths if path is not None}
        return {
            index: (f"{start}{self.scaled_cache}.k_scale", f"{start}{self.scaled_cache}.v_scale")
            for index, start in sorted(starts.items())
        }

    def kv_heads(self, config: Mapping[str, Any]) -> int:
        """Heads of keys and values of a block."""
        heads = self.value(config, self.kv_heads_key) if self.kv_heads_key else None
        return int(heads or self.value(config, self.heads_key))

    def active_parameters(self, spec: Spec) -> int:
        """Parameters used for one token: all of them, but of the experts only the share that a token is sent to."""
        config = spec.structure.config
        total = self.value(config, self.experts_key) if self.experts_key else None
        active = self.value(config, self.active_experts_key) if self.active_experts_key else None
        if not total or not active:
            return spec.parameters
        experts = sum(t.count for t in spec.stored() if t.is_float and self.is_expert(t.name))
        return spec.parameters - experts + experts * min(int(active), int(total)) // int(total)

    def is_expert(self, name: str) -> bool:
        """Whether a tensor of that name belongs to one of a block's experts."""
        match = self._block.match(name)
        return match is not None and match[3].startswith(tuple(f".{path}." for path in self.experts))

    def ties(self, spec: Spec) -> Iterator[tuple[str, str]]:
        """(name, source) of parameters that the config ties and the file leaves out; the head's weight comes last.

        The file may hold either of two tied parameters; stock transformers fills in the other.
        """
        for target, source in self.tied_pairs(spec):
            if source in spec.tensors and target not in spec.tensors:
                yield target, source
            elif target in spec.tensors and source not in spec.tensors:
                yield source, target

    def tied_pairs(self, spec: Spec) -> list[tuple[str, str]]:
        """(name, source) of the parameters that the config ties, whether the file holds them or not; the head's weight last."""
        if not self.is_tied(spec):
            return []
        embedding = f"{self.embeddings[0]}.weight"
        pairs = [self.bias_tie] if self.bias_tie else []
        return [*pairs, (self.head_tie, self._find(spec, embedding) or self._spelt(spec, embedding))]

    def held_copies(self, spec: Spec) -> list[tuple[str, str]]:
        """(name, source) of the embedding's copies that the file holds and every class of the family reads as the embedding."""
        source = self._find(spec, f"{self.embeddings[0]}.weight")
        names = (start + name for name in self.copies for start in (f"{self.prefix}.", ""))
        return [] if source is None else [(name, source) for name in names if name in spec.tensors]

    def is_leftover(self, name: str, class_name: str | None) -> bool:
        """Whether the class of that name (None: the one without a head) does not read a tensor that files may hold."""
        return any(leftover.fits(name, class_name or self.base_class) for leftover in self.leftovers)

    def new_name(self, name: str) -> str:
        """The name of a tensor of a file as transformers spells it now."""
        old = next((end for end in self.old_names if name.endswith(end)), None)
        return name if old is None else name.removesuffix(old) + self.old_names[old]

    def is_tied(self, spec: Spec) -> bool:
        """Whether its config ties what tokens are predicted by to what they are looked up by."""
        return self.has_head(spec) and bool(spec.structure.config.get("tie_word_embeddings", self.tie_default))

    def has_head(self, spec: Spec) -> bool:
        """Whether the checkpoint's class has a head that predicts tokens."""
        return self.head is not None and (spec.structure.class_name or "").endswith(self.head_classes)

    def _find(self, spec: Spec, name: str) -> str | None:
        """The name as the file spells it: with the prefix, with its last part, or without."""
        prefixes = (f"{self.prefix}.", f"{self.prefix.rpartition('.')[2]}.", "")
        return next((p + name for p in prefixes if p + name in spec.tensors), None)

    def _spelt(self, spec: Spec, name: str) -> str:
        """The name of a tensor that the file does not hold, as it spells others: with the prefix, or without."""
        start = f"{self.prefix}."
        return start + name if any(other.startswith(start) for other in spec.tensors) else name

    def check(self, spec: Spec, where: str) -> None:
        """Config and weights agree on depth and embedding shape. Raises `CheckpointError`."""
        config = spec.structure.config
        needed = (self.depth_key, self.hidden_key, self.heads_key)
        optional = (
            self.kv_heads_key,
            self.head_dim_key,
            self.experts_key,
            self.active_experts_key,
            *self.stacks.values(),
        )
        for key in (*needed, *filter(None, optional)):
            value = self.value(config, key)
            if not (value is None and key not in needed) and (type(value) is not int or value < 1):
                raise CheckpointError(f"config.json has no usable `{key}`", where=where)
        matches = [match for match in map(self._block.match, spec.tensors) if match is not None]
        lists = {stack: {int(m[2]) for m in matches if m[1].endswith(f"{stack}.")} for stack in self.stacks}
        numbers = {int(m[2]) for m in matches if not m[1].endswith(tuple(f"{stack}." for stack in self.stacks))}
        self._check_depth("block ", numbers, self.depth(config), where)
        for stack, found in lists.items():
            if found:
                self._check_depth(f"{stack}.", found, int(config.get(self.stacks[stack]) or self.depth(config)), where)
        embedding = self._find(spec, f"{self.embeddings[0]}.weight")
        if embedding is None and self.is_tied(spec) and self.head_tie in spec.tensors:
            embedding = self.head_tie
        if embedding is None:
            raise CheckpointError(
                f"config and weights disagree: there is no {self.prefix}.{self.embeddings[0]}.weight", where=where
            )
        vocabulary = config.get("vocab_size") if self.input == "input_ids" else None
        shape = spec.tensors[embedding].shape
        if isinstance(vocabulary, int) and shape[0] != vocabulary:
            raise CheckpointError(
                f"config and weights disagree: {embedding} has {shape[0]} rows, the config says vocab_size {vocabulary}",
                where=where,
            )

    @staticmethod
    def _check_depth(what: str, found: set[int], depth: int, where: str) -> None:
        # a depth that a damaged config claims may be more than memory can count to
        missing = (index for index in range(min(depth, len(found) + 1)) if index not in found)
        if wrongs := [*missing, *(index for index in found if index >= depth)]:
            wrong = min(wrongs)
            side = "the weights hold none" if wrong < depth else f"the config says {depth}"
            raise CheckpointError(f"config and weights disagree: {what}{wrong}: {side}", where=where)
