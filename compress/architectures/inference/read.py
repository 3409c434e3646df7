"""The record of a model, read off its class and the names of its files."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

from compress.architectures.inference.config import cache_kind, config_fields
from compress.architectures.inference.lists import depth_key, input_embeddings, main_first, owner_of, section_of
from compress.architectures.inference.parts import Blocks, Sizes, attentions_of, mlps_of
from compress.architectures.inference.roles import experts_in, kind_of, matrices_of, parts_of
from compress.architectures.inference.skeleton import Skeleton
from compress.architectures.inferred import BlockList, Inferred, Matrix, refilled, starred
from compress.spec.spec import Spec


class Names:
    """Which parameter each tensor of the files becomes.

    Attributes:
        targets: tensor ▶ parameter, or the parameter that it is a part of. unread: tensors that the class has no place for.
        parts: tensors that become a part of a parameter, or several parameters.
        ignored: those of the unread ones that transformers leaves out without a word.
    """

    def __init__(self, spec: Spec, skeleton: Skeleton) -> None:
        self.targets: dict[str, str] = {}
        self.stored = {tensor.name for tensor in spec.stored()}
        self.modules: dict[str, str] = {}
        self.parts: set[str] = set()
        self.unread: list[str] = []
        self.ignored: list[str] = []
        for name in spec.tensors:
            loaded = skeleton.loaded_as(name)
            if loaded is None:
                self.unread.append(name)
                if skeleton.ignores(name):
                    self.ignored.append(name)
                continue
            self.targets[name], renamed = loaded
            if renamed != loaded[0]:
                self.parts.add(name)
            self.modules[name.rpartition(".")[0]] = renamed.rpartition(".")[0]
        self._files: dict[str, str] = {}
        for name, target in self.targets.items():
            self._files.setdefault(target, name)

    def in_file(self, parameter: str) -> str | None:
        """The tensor that becomes a parameter; None where the files have none."""
        return self._files.get(parameter)

    def path_in_file(self, path: str) -> str | None:
        """Path in files of a module in memory with numbered parts below it; None where the files have no tensor of it.

        It is the path of most tensors: files may hold some parameters of the blocks in lists of their own.
        """
        inside = ((name, target) for name, target in self.targets.items() if target.startswith(f"{path}."))
        places = Counter(place for name, target in inside if (place := _common_tail(name, target, path)) is not None)
        return places.most_common(1)[0][0] if places else None

    def absent(self, skeleton: Skeleton) -> list[str]:
        """Linear layers in memory of which the files have no weight, or one that is more or less than theirs."""
        whole = ((name, target) for name, target in self.targets.items() if name in self.stored - self.parts)
        weights = (target for name, target in whole if target.endswith(".weight"))
        loaded = {target.rpartition(".")[0] for target in weights}
        return [path for path, module in skeleton.modules.items() if kind_of(module) == "linear" and path not in loaded]

    def memory(self) -> dict[str, str]:
        """Module in files ▶ module in memory, where they differ, with stars where that gives each of them back."""
        differing = {a: b for a, b in self.modules.items() if a != b}
        result: dict[str, str] = {}
        groups: dict[str, set[str]] = defaultdict(set)
        for a, b in differing.items():
            groups[starred(a)].add(starred(b))
        same = {starred(a) for a, b in self.modules.items() if a == b}
        for a, b in differing.items():
            pattern = starred(a)
            target = next(iter(groups[pattern]))
            if len(groups[pattern]) == 1 and pattern not in same and refilled(target, a) == b:
                result[pattern] = target
            else:
                result[a] = b
        return result


def _common_tail(name: str, target: str, path: str) -> str | None:
    """The part of a file's name that stands for a list's path in memory, told by the number after it."""
    number = target[len(path) + 1 :].partition(".")[0]
    count = sum(part.isdigit() for part in path.split("."))
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    if len(places) <= count or parts[places[count]] != number:
        return None
    return ".".join(parts[: places[count]])


def _lists(skeleton: Skeleton, names: Names) -> tuple[tuple[BlockList, ...], dict[str, int], Any]:
    """The lists of blocks, the lengths of those by their config fields, and the config of the main one."""
    lists: list[BlockList] = []
    lengths: dict[str, int] = {}
    main_config = skeleton.config
    for path, module, kind in main_first(skeleton):
        file_path = names.path_in_file(path)
        if file_path is None:
            continue
        config = owner_of(skeleton, path)[1].config
        section = section_of(skeleton.config, config)
        if not section and config is not skeleton.config:
            config = skeleton.config
        in_stage = any(part.isdigit() for part in path.split("."))  # the config lists the depths of stages
        key = None if in_stage else depth_key(config, path, len(module))
        if (
            key is None
            and not in_stage
            and config is not skeleton.config
            and (key := depth_key(skeleton.config, path, len(module)))
        ):
            config, section = skeleton.config, ""
        whole = None if key is None else f"{section}.{key}".lstrip(".")
        if whole is not None:
            lengths[whole] = len(module)
        if not lists:
            main_config = config
            kind = "main"
        lists.append(BlockList(file_path, path, cast(Any, kind), whole, section))
    return tuple(lists), lengths, main_config


def _prefix(path: str, embedding: str | None) -> tuple[str, str]:
    """(prefix, rest) of the main list's path: the prefix is that of the embedding too where they share one."""
    parts = path.split(".")
    other = [] if embedding is None else embedding.split(".")
    shared = 0
    while shared < min(len(parts), len(other)) - 1 and parts[shared] == other[shared]:
        shared += 1
    return ".".join(parts[:shared]), ".".join(parts[shared:])


def _embeddings(skeleton: Skeleton, names: Names, lists: tuple[BlockList, ...]) -> list[str]:
    """Modules in files outside the blocks that embed: the one for token ids, or pixels, first."""
    import torch

    first = input_embeddings(skeleton)
    result: list[str] = []
    tables = [
        path
        for path, module in skeleton.modules.items()
        if isinstance(module, torch.nn.Embedding) and not any(path.startswith(f"{e.module}.") for e in lists)
    ]
    own = _with_weight(skeleton, first) if isinstance(first, torch.nn.Module) else None
    for path in filter(None, [own, *tables]):
        name = names.in_file(f"{path}.weight") or names.in_file(_source(skeleton, f"{path}.weight"))
        if name is not None:
            result.append(name.rpartition(".")[0])
    return list(dict.fromkeys(result))


def _with_weight(skeleton: Skeleton, module: Any) -> str | None:
    """Path of a module, or of the first one in it that has a weight of two axes or more."""
    weight = (m for m in getattr(module, "modules", tuple)() if getattr(getattr(m, "weight", None), "ndim", 0) >= 2)
    return skeleton.names.get(id(next(weight, None)))


def _longest(
    skeleton: Skeleton, names: Names, embeddings: list[str], lists: tuple[BlockList, ...]
) -> tuple[str | None, int | None]:
    """The table of token positions in files, and the tokens of the longest text that it allows; None without one."""
    if skeleton.model.main_input_name != "input_ids":
        return None, None
    homes = tuple(f"{e.module.rpartition('.')[0].partition('.')[0]}." for e in lists if e.kind != "tower")
    towers = tuple(f"{e.module.rpartition('.')[0].rpartition('.')[0]}." for e in lists if e.kind == "tower")
    for path, module in skeleton.modules.items():
        if not path.startswith(homes) or (towers and path.startswith(towers)):
            continue
        name = names.in_file(f"{path}.weight")
        owner = None if name is None else name.rpartition(".")[0]
        if owner is None or owner not in embeddings or not re.search(r"pos|wpe", path.rpartition(".")[2]):
            continue
        rows, most = int(module.weight.shape[0]), getattr(skeleton.config, "max_position_embeddings", None)
        if isinstance(most, int) and rows > most:
            return owner, most
        return owner, rows - (0 if module.padding_idx is None else int(module.padding_idx) + 1)
    return None, None


def _source(skeleton: Skeleton, parameter: str) -> str:
    return skeleton.ties.get(parameter, parameter)


def _pairs(skeleton: Skeleton, names: Names, head: str | None) -> tuple[list[tuple[str, str]], tuple[str, str] | None]:
    """(name, source) of tied parameters as files name them, and the pair that ties the head."""
    pairs, head_pair = [], None
    for target, source in skeleton.ties.items():
        file_source, file_target = names.in_file(source), names.in_file(target)
        pair = (file_target or _as_in_file(names, target), file_source or _as_in_file(names, source))
        if pair[0] == pair[1]:
            continue
        pairs.append(pair)
        if head is not None and target == f"{head}.weight":
            head_pair = pair
    return pairs, head_pair


def _as_in_file(names: Names, parameter: str) -> str:
    """Name that a parameter would have in these files: with the prefix that others of its module's neighbours have there."""
    path = parameter
    while path:
        path = path.rpartition(".")[0]
        for module, memory in names.modules.items():
            if path and (memory == path or memory.startswith(f"{path}.")) and module.endswith(memory[len(path) :]):
                start = module[: len(module) - len(memory) + len(path)]
                return f"{start}{parameter[len(path) :]}"
    return parameter


def _uncoded(
    spec: Spec, skeleton: Skeleton, names: Names, lists: tuple[BlockList, ...], experts: Sequence[str]
) -> dict[str, Any]:
    """The fields of a record that say which codes transformers cannot load. It can load those of numbered experts of blocks."""
    import torch

    blocks = [starred(entry.path) for entry in lists if entry.kind != "tower"]
    bases = tuple(f"{path}.*.{base}." for path in blocks for base in experts)
    tied = {*skeleton.ties, *skeleton.ties.values()}
    whole, joined = set[str](), False
    for name, target in names.targets.items():
        pattern = skeleton.converter_of(name)
        owner = skeleton.modules.get(target.rpartition(".")[0])
        if starred(name).startswith(bases) or len(spec.tensors[name].shape) < 2:
            continue
        joined |= pattern is not None and pattern.endswith(".weight")
        own = kind_of(owner) == "linear" and not isinstance(owner, torch.nn.Linear)
        if pattern is not None or own or (target in tied and any(target.startswith(f"{e.module}.") for e in lists)):
            whole.add(starred(name))
    return {"whole": tuple(sorted(whole)), "joined": joined}


def _parts(
    spec: Spec,
    lists: tuple[BlockList, ...],
    matrices: Mapping[str, Matrix],
    experts: Sequence[str],
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of a record that say where neurons and heads are."""
    layers = [
        matrix
        for name, matrix in matrices.items()
        if matrix.layer and not matrix.kernel and any(name.startswith(e.path) for e in lists)
    ]
    turned = {matrix.transposed for matrix in layers}
    if len(turned) != 1:
        return {}
    blocks = Blocks(spec, lists, matrices)
    values = fields["defaults"]
    hidden, heads, kv_heads = (values.get(fields[k]) for k in ("hidden_key", "heads_key", "kv_heads_key"))
    width = values.get(fields["head_dim_key"]) or (hidden // heads if hidden and heads else None)
    sizes = Sizes(heads, kv_heads, width)
    attention, cross = attentions_of(blocks, sizes, fields["head_dim_key"] is not None)
    return {
        "mlps": mlps_of(blocks, experts),
        "attention": attention,
        "cross": cross,
        "input_axis": 0 if turned == {True} else -1,
    }


def by_class(spec: Spec, skeleton: Skeleton) -> Inferred:
    """The record of a model."""
    names = Names(spec, skeleton)
    lists, lengths, part = _lists(skeleton, names)
    embeddings = _embeddings(skeleton, names, lists)
    try:
        output = skeleton.model.get_output_embeddings()
    except (NotImplementedError, AttributeError, TypeError):
        output = None
    head = None if output is None else skeleton.names.get(id(output))
    pairs, head_pair = _pairs(skeleton, names, head)
    prefix, blocks = _prefix(lists[0].path, embeddings[0] if embeddings else None) if lists else ("", "")
    below = f"{prefix}." if prefix else ""
    head_file = None if head is None else (names.in_file(f"{head}.weight") or _as_in_file(names, f"{head}.weight"))
    fields = config_fields(skeleton, part, lists, lengths, len(skeleton.modules[lists[0].module]) if lists else 0)
    matrices = matrices_of(spec, skeleton, names.targets, lists, embeddings, head)
    experts = experts_in(spec, names.targets, skeleton, lists, matrices)
    table, longest = _longest(skeleton, names, embeddings, lists)
    return Inferred(
        model_type=spec.structure.model_type,
        source="inferred",
        prefix=prefix,
        blocks=blocks,
        module_blocks=lists[0].module if lists else None,
        embeddings=tuple(name.removeprefix(below) for name in embeddings),
        stacks={e.path.removeprefix(below): e.depth_key or "" for e in lists if e.kind == "stack"},
        input=skeleton.model.main_input_name,
        head=None if head_file is None else head_file.rpartition(".")[0],
        head_tie=head_file or "",
        head_classes=(skeleton.class_name,),
        class_name=skeleton.class_name,
        lists=lists,
        memory=names.memory(),
        pairs=tuple(pairs),
        head_pair=head_pair,
        absent=tuple(names.absent(skeleton)),
        **_uncoded(spec, skeleton, names, lists, experts),
        ignored=tuple(sorted({starred(name) for name in names.ignored})),
        matrices=matrices,
        routers=parts_of("router", matrices, lists),
        experts=experts,
        attention_parts=parts_of("attention", matrices, lists),
        position_table=None if table is None else table.removeprefix(below),
        longest=longest,
        packable=skeleton.packable(entry.module for entry in lists if entry.kind != "tower"),
        **_parts(spec, lists, matrices, experts, fields),
        cache=cache_kind(spec, lists, fields),
        **fields,
    )
