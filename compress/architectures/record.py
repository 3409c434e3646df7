"""The declarative record of a model family, and the facts that follow from it. Imports neither torch nor numpy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from compress.architectures.groups import Attention, Hidden, Mlp, Relative
from compress.architectures.leftovers import Leftover
from compress.architectures.norms import Norms
from compress.errors import PassError
from compress.spec.classes import CAUSAL_LM, MASKED_LM
from compress.spec.spec import Spec

#: What a matrix of a block does: ``distances`` are added to the scores of attention.
BlockRole = Literal["attention", "mlp", "router", "distances", "other"]


@dataclass(frozen=True)
class Architecture:
    """The record of one model family.

    All names are names in files. They may differ from the names of modules in memory.

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        prefix: name of the base model inside a class with a head (``model`` of ``model.layers``). Files written by the base
            class leave out the prefix, or its first part.
        blocks: path of the list of repeated blocks, below the prefix.
        embeddings: modules below the prefix that embed token ids, positions or pixels; the vocabulary's comes first.
        position_table: the one of them with a learned vector per position; None where positions are computed.
        skipped_positions: config ▶ number of leading rows of that table that no token uses.
        stacks: path of a further list of blocks (a decoder's, where ``blocks`` is the encoder's) ▶ the config field with its
            length. A model may lack such a list. The lists run one after another, in this order. No block can be removed by its
            number.
        module_blocks: path of the list of blocks in memory, where transformers renames it on loading.
        renames: (pattern, replacement) pairs, applied in order, that turn a module's name in files into its name in memory.
        pooler: module below the prefix that the base class has, and that files may leave out.
        packable: whether stock transformers loads packed codes, which are stored under another name than the weight.
        flat_classes: suffixes of the classes with a head whose blocks have no prefix in memory.
        input: the argument of the model's forward that data fills: ``input_ids``, or one that text cannot fill.
        head: module (without prefix) that projects onto the vocabulary; None where the family has none.
        head_tie: the parameter that ``tie_word_embeddings`` ties to the first embedding.
        projections: two modules below the prefix, from a thin embedding table to the hidden states and from these to a tied
            head, and the config field with the table's width; None where the stock class has no such modules.
        bias_tie: (target, source): the head's bias, and the parameter that ``tie_word_embeddings`` ties it to.
        head_classes: suffixes of the classes with that head.
        depth_key, hidden_key, heads_key: config fields. ``kv_heads_key`` and ``head_dim_key``: where the family has them.
        spellings: other name of a config field ▶ the field. The other name wins where a config has both.
        cache: kind of the blocks' cache, a key of `architectures.cache.VALUES`; empty where it is not known.
        latent: config fields ▶ their defaults, whose sum is cached per token by all heads of a block (``cache: latent``).
        window: config ▶ tokens that a block with a sliding window sees, the token itself among them; None without windows.
        per_layer: config fields that hold one entry per block.
        per_layer_defaults: field that older configs leave out ▶ function from the config to its value in transformers.
        dense_blocks_key: config field that lists the numbers of the blocks without experts.
        sparse_step_key: config field beside it; only every n-th block has experts.
        dense_first_key: config field with the number of blocks, the first ones, without experts.
        depth_scaled: config fields that are divided by the square root of the number of blocks.
        numbered: config switches that make the computation of a block depend on its number.
        routers: modules inside a block that choose experts, or weigh one that all tokens use. No linear layers to prune.
        experts: modules inside a block that hold the experts. ``experts_key``, ``active_experts_key``: config fields with the
            number of experts, and with the number that each token uses.
        expert_sum_key: config field that says whether the weights of a token's experts are divided by their sum; None where
            they always are.
        input_axis: axis of a weight matrix that its inputs run along: -1 for ``Linear``, 0 for ``Conv1D``.
        scaled_cache: attention module of a block in which servers look for static scales of cached keys and values; None where
            they look for none.
        eager: whether transformers has no SDPA for it, so that on CPU its attention holds all scores at once.
        open_attention: whether attention is called through transformers' table of attention functions, and hands on to it what
            the cache returns. Then heads can have windows of their own.
        causal: whether it decodes with a key-value cache. tie_default: ``tie_word_embeddings`` in a config without it.
        mlps, attention, hidden: the groups that structured pruning may remove, see `architectures.groups`. norms: those that
            linear layers alone read.
        attention_parts: modules of a block's attention, where it has none of these groups.
        cross: cross-attention of a decoder's blocks, beside ``attention``.
        relative: the stock family to become where this family's config cannot express a number of heads.
        base_class: name of the class without a head.
        leftovers: tensors that files may hold beside the model: heads of other classes, tables that models now compute.
        old_names: end of a name in older files ▶ the end in transformers today.
        copies: parameters (without prefix) that every class ties to the first embedding; files may hold them.
        source: where the record comes from: ``written`` by hand, ``inferred`` from the class, or from ``shapes`` alone.
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
    cache: str = "keys and values"
    latent: Mapping[str, int] = field(default_factory=dict)
    window: Callable[[Mapping[str, Any]], int | None] = lambda config: config.get("sliding_window")
    per_layer: tuple[str, ...] = ()
    per_layer_defaults: Mapping[str, Callable[[Mapping[str, Any]], list[Any]]] = field(default_factory=dict)
    dense_blocks_key: str | None = None
    sparse_step_key: str | None = None
    dense_first_key: str | None = None
    depth_scaled: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    experts_key: str | None = None
    active_experts_key: str | None = None
    expert_sum_key: str | None = None
    input_axis: int = -1
    scaled_cache: str | None = None
    eager: bool = False
    open_attention: bool = False
    causal: bool = True
    tie_default: bool = False
    mlps: tuple[Mlp, ...] = ()
    attention: Attention | None = None
    norms: Norms | None = None
    attention_parts: tuple[str, ...] = ()
    cross: Attention | None = None
    hidden: Hidden | None = None
    relative: Relative | None = None
    base_class: str = ""
    leftovers: tuple[Leftover, ...] = ()
    old_names: Mapping[str, str] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    source: Literal["written", "inferred", "shapes"] = "written"

    @cached_property
    def block_pattern(self) -> re.Pattern[str]:
        """Matches a tensor of a block. Groups: the path up to the number, the number, the rest with its dot."""
        first, _, rest = self.prefix.rpartition(".")
        inner = f"(?:{re.escape(first)}\\.)?{re.escape(rest)}\\." if first else f"{re.escape(rest)}\\."
        lists = "|".join(map(re.escape, filter(None, (self.blocks, *self.stacks, self.module_blocks))))
        return re.compile(rf"^((?:{inner})?(?:{lists})\.)(0|[1-9][0-9]{{0,8}})(\..+)$", re.DOTALL)

    def value(self, config: Mapping[str, Any], key: str) -> Any:
        """Value of a config field under any of its spellings; None where the config has none."""
        names = [*(name for name, meant in self.spellings.items() if meant == key), key]
        return next((config[name] for name in names if config.get(name) is not None), None)

    def block_index(self, name: str) -> int | None:
        """Number of the block that a tensor belongs to; None outside the blocks."""
        match = self.block_pattern.match(name)
        return int(match[2]) if match else None

    def block_path(self, name: str) -> tuple[str, str] | None:
        """(path of its block with the dot, name inside the block) of a tensor; None outside the blocks."""
        match = self.block_pattern.match(name)
        return (f"{match[1]}{match[2]}.", match[3][1:]) if match else None

    def list_of(self, name: str) -> str | None:
        """Path of the list of blocks that a tensor is in, one of ``blocks`` and ``stacks``; None outside the blocks."""
        if (match := self.block_pattern.match(name)) is None:
            return None
        return next((stack for stack in self.stacks if match[1].endswith(f"{stack}.")), self.blocks)

    def in_stack(self, name: str) -> bool:
        """Whether a tensor belongs to a block of one of the ``stacks``, such as a decoder."""
        return self.list_of(name) in self.stacks

    def renumber(self, name: str, index: int) -> str:
        """Name of the same tensor in block ``index``."""
        return self.block_pattern.sub(rf"\g<1>{index}\g<3>", name)

    @staticmethod
    def is_base(class_name: str | None) -> bool:
        """Whether a class is a base class, without a head. A config that names no class means one."""
        return class_name is None or re.search(r"(?<!Head)(?<!Heads)Model$", class_name) is not None

    def in_memory(self, module: str, class_name: str | None) -> str:
        """Name in memory of a module, given its name in files and the class that loads it (None: the base class)."""
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

    @cached_property
    def _roles(self) -> Mapping[str, BlockRole]:
        """Module below a block ▶ its role; ``*`` stands for the number of an expert."""
        roles: dict[str, BlockRole] = dict.fromkeys(self.attention_parts, "attention")
        for attention in filter(None, (self.attention, self.cross)):
            modules = (attention.query, attention.key, attention.value, attention.output)
            roles |= dict.fromkeys(modules, "attention")
            if attention.table is not None:
                roles[attention.table] = "distances"
        for mlp in self.mlps:
            roles |= dict.fromkeys((*mlp.up, mlp.down), "mlp")
        return roles | dict.fromkeys(self.routers, "router")

    def role(self, part: str) -> BlockRole:
        """The role of a matrix of a block, by its module's path below the block."""
        return self._roles.get(self.starred(part), "other")

    def matrix_role(self, name: str, part: str | None) -> str:
        """The role of a matrix; ``part``: its module within its block, None outside the blocks."""
        if part is not None:
            return self.role(part)
        module = name.rpartition(".")[0]
        if name == self.head_tie or module == self.head:
            return "head"
        if module.endswith(self.embeddings):
            return "embedding"
        return "projection" if self.projections and module.endswith(self.projections[:2]) else "other"

    def is_layer(self, name: str, in_block: bool) -> bool:
        """Whether a tensor of two axes or more is the weight of a linear layer that passes take."""
        path = self.block_path(name) if in_block and name.endswith(".weight") else None
        return path is not None and self.role(path[1].rpartition(".")[0]) not in ("router", "distances")

    def is_transposed(self, name: str, in_block: bool) -> bool:
        """Whether a matrix is stored [I, O]."""
        return in_block and self.input_axis == 0

    def in_tower(self, name: str) -> bool:
        """Whether a tensor belongs to a block that makes the model's inputs from images or sound."""
        return False

    def starred(self, part: str) -> str:
        """The path of a module below a block, with ``*`` for the number of an expert."""
        base = next((f"{base}." for base in self.experts if part.startswith(f"{base}.")), None)
        return part if base is None else f"{base}*.{part.removeprefix(base).partition('.')[2]}"

    def depth(self, config: Mapping[str, Any]) -> int:
        """Number of blocks."""
        return int(self.value(config, self.depth_key))

    def per_layer_values(self, config: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Config field ▶ its list of one entry per block; the family's default where the config leaves it out."""
        lists = {}
        for key in self.per_layer:
            values = config.get(key)
            if values is None and key in self.per_layer_defaults:
                values = self.per_layer_defaults[key](config)
            if isinstance(values, list):
                lists[key] = values
        return lists

    def cut_depth(self, config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
        """The config with only the blocks ``keep``: their number, every per-layer list, and the list of dense blocks.

        Raises:
            PassError: the computation of a block depends on its number, which would change.
        """
        if switch := next((key for key in self.numbered if config.get(key)), None):
            raise PassError(
                f"`{switch}` makes the computation of a block depend on its number, so that removing one changes others",
                key="layers",
            )
        depth = self.depth(config)
        result = {key: value for key, value in config.items() if self.spellings.get(key) != self.depth_key}
        result[self.depth_key] = len(keep)
        for key, values in self.per_layer_values(config).items():
            if len(values) == depth:
                result[key] = [values[i] for i in keep]
        if self.dense_blocks_key and self.sparse_step_key:
            # once blocks are gone no step says which ones have experts; the list of dense blocks always can
            step = int(config.get(self.sparse_step_key) or 1)
            listed = config.get(self.dense_blocks_key) or []
            dense = [i in listed or (i + 1) % step != 0 for i in keep]
            result[self.sparse_step_key] = 1
            result[self.dense_blocks_key] = [new for new, is_dense in enumerate(dense) if is_dense]
        if self.dense_first_key and config.get(self.dense_first_key) is not None:
            result[self.dense_first_key] = sum(i < int(config[self.dense_first_key]) for i in keep)
        for key in self.depth_scaled:
            if config.get(key) is not None:  # without a value it follows the number of blocks
                result[key] = config[key] * (len(keep) / depth) ** 0.5
        return result

    def require_heads_apart(self, key: str) -> None:
        """Raise `PassError` where a norm spans the queries or keys of all heads."""
        if self.attention is not None and self.attention.norms is not None:
            raise PassError(
                f"{self.model_type} normalises the queries and keys of all heads together, so none can go",
                key=key,
                fix="remove `mlp` or `layers` instead",
            )

    def positions(self, spec: Spec) -> int | None:
        """Number of tokens that a text may have; None where positions are computed (rotary, ALiBi)."""
        name = self.find_name(spec, f"{self.position_table}.weight") if self.position_table else None
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

    def cache_scales(self, spec: Spec) -> dict[int, tuple[str, str]]:
        """Block number ▶ names of the static scales of its cached keys and values; empty where servers read none."""
        if self.scaled_cache is None:
            return {}
        paths = {self.block_path(name) for name in spec.tensors} - {None}
        starts = {int(path[0].rstrip(".").rpartition(".")[2]): path[0] for path in paths if path is not None}
        return {
            index: (f"{start}{self.scaled_cache}.k_scale", f"{start}{self.scaled_cache}.v_scale")
            for index, start in sorted(starts.items())
        }

    def kv_heads(self, config: Mapping[str, Any]) -> int:
        """Number of key and value heads of a block."""
        heads = self.value(config, self.kv_heads_key) if self.kv_heads_key else None
        return int(heads or self.value(config, self.heads_key))

    def active_parameters(self, spec: Spec) -> int:
        """Parameters used for one token: all but those of the experts that the token is not sent to."""
        config = spec.structure.config
        total = self.value(config, self.experts_key) if self.experts_key else None
        active = self.value(config, self.active_experts_key) if self.active_experts_key else None
        if not total or not active:
            return spec.parameters
        experts = sum(t.count for t in spec.stored() if t.is_float and self.is_expert(t.name))
        return spec.parameters - experts + experts * min(int(active), int(total)) // int(total)

    def is_expert(self, name: str) -> bool:
        """Whether a tensor belongs to one of a block's experts."""
        match = self.block_pattern.match(name)
        return match is not None and match[3].startswith(tuple(f".{path}." for path in self.experts))

    def ties(self, spec: Spec) -> Iterator[tuple[str, str]]:
        """(name, source) of the tied parameters that the file leaves out; the head's weight comes last.

        A file may hold either of two tied parameters. Stock transformers fills in the other one.
        """
        for target, source in self.tied_pairs(spec):
            if source in spec.tensors and target not in spec.tensors:
                yield target, source
            elif target in spec.tensors and source not in spec.tensors:
                yield source, target

    def tied_pairs(self, spec: Spec) -> list[tuple[str, str]]:
        """(name, source) of the parameters that the config ties, in the file or not; the head's weight comes last."""
        if not self.is_tied(spec):
            return []
        embedding = f"{self.embeddings[0]}.weight"
        pairs = [self.bias_tie] if self.bias_tie else []
        return [*pairs, (self.head_tie, self.find_name(spec, embedding) or self._spelt(spec, embedding))]

    def held_copies(self, spec: Spec) -> list[tuple[str, str]]:
        """(name, source) of the ``copies`` of the embedding that the file holds."""
        source = self.find_name(spec, f"{self.embeddings[0]}.weight")
        names = (start + name for name in self.copies for start in (f"{self.prefix}.", ""))
        return [] if source is None else [(name, source) for name in names if name in spec.tensors]

    def is_leftover(self, name: str, class_name: str | None) -> bool:
        """Whether a tensor of a file is a leftover, which the class (None: the base class) does not read."""
        return any(leftover.fits(name, class_name or self.base_class) for leftover in self.leftovers)

    def new_name(self, name: str) -> str:
        """Name of a tensor in transformers today, given its name in a file."""
        old = next((end for end in self.old_names if name.endswith(end)), None)
        return name if old is None else name.removesuffix(old) + self.old_names[old]

    def is_tied(self, spec: Spec) -> bool:
        """Whether the config ties the head's weight to the embedding table."""
        return self.has_head(spec) and bool(spec.structure.config.get("tie_word_embeddings", self.tie_default))

    def has_head(self, spec: Spec) -> bool:
        """Whether the checkpoint's class has the head that predicts tokens."""
        return self.head is not None and (spec.structure.class_name or "").endswith(self.head_classes)

    def find_name(self, spec: Spec, name: str) -> str | None:
        """The name as the file has it: with the prefix, with its last part, or without; None if there is no such tensor."""
        prefixes = (f"{self.prefix}.", f"{self.prefix.rpartition('.')[2]}.", "")
        return next((p + name for p in prefixes if p + name in spec.tensors), None)

    def _spelt(self, spec: Spec, name: str) -> str:
        """The name of a tensor that the file lacks, with the prefix if the file's other names have it."""
        start = f"{self.prefix}."
        return start + name if any(other.startswith(start) for other in spec.tensors) else name
