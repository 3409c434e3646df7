"""Edits applied to specs: which tensors an edit adds, replaces or shares. Imports no torch.

`edits` applies them to models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.errors import CheckpointError, PassError
from compress.spec.spec import DENSE, Edit, Spec, Tensor

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint

#: Kind of edit ▶ kind of tensors, by which passes accept a checkpoint.
STORAGE: Mapping[str, str] = {
    "factors": "factored",
    "projected": "factored",
    "residual": "shared",
    "shared": "shared",
    "sized": "uneven",
}
#: Kind of edit ▶ keys of its ``values``; other kinds have ``rank`` and ``transposed``.
_VALUES = {"shared": {"source", "parts"}, "sized": {"outputs", "inputs"}, "projected": {"rank"}}


def to_json(edits: Iterable[Edit]) -> list[dict[str, Any]]:
    """JSON list for ``config.json``."""
    return [{"kind": e.kind, "module": e.module, "values": dict(e.values)} for e in edits]


def from_json(rows: Any, where: str) -> tuple[Edit, ...]:
    """Inverse of `to_json`. Raises `CheckpointError` for kinds that this version does not know and for damaged edits."""
    try:
        found = tuple(Edit(str(row["kind"]), str(row["module"]), dict(row["values"])) for row in rows or ())
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"has damaged `edits`: {error!r}", where=where) from None
    for edit in found:
        keys = _VALUES.get(edit.kind, {"rank", "transposed"})
        if edit.kind not in STORAGE:
            raise CheckpointError(
                f"has an edit that this version does not know: {edit.kind}",
                where=where,
                fix="update compress",
            )
        if edit.values.keys() != keys or not _sound(edit.values):
            raise CheckpointError(f"has a damaged edit: {edit.kind} of {edit.module}", where=where)
    return found


def _sound(values: Mapping[str, Any]) -> bool:
    """Whether the values of an edit have the right types."""
    if "parts" in values:
        parts = values["parts"]
        return isinstance(values["source"], str) and isinstance(parts, list) and all(isinstance(p, str) for p in parts)
    sizes = [value for key, value in values.items() if key != "transposed"]
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes) and isinstance(
        values.get("transposed", False), bool
    )


def with_shared(spec: Spec, where: str) -> Spec:
    """Spec with aliases for shared tensors, which files store once. Raises `CheckpointError` if edits and tensors disagree."""
    aliases = {}
    for edit in spec.structure.edits:
        if edit.kind != "shared":
            check = {"projected": _check_projected, "sized": _check_sized}.get(edit.kind, _check_low_rank)
            check(spec, edit, where)
            continue
        for part in edit.values["parts"]:
            name, source = f"{edit.module}.{part}", f"{edit.values['source']}.{part}"
            if source not in spec.tensors or name in spec.tensors:
                raise CheckpointError(f"config and weights disagree: an edit shares {name} with {source}", where=where)
            aliases[name] = alias(spec.tensors[source], name)
    return replace(spec, tensors={**spec.tensors, **aliases})


def _check_low_rank(spec: Spec, edit: Edit, where: str) -> None:
    """Check that the two matrices of an edit are there and have its rank."""
    prefix, rank = "residual_" if edit.kind == "residual" else "", edit.values["rank"]
    down, up = (f"{edit.module}.{prefix}{suffix}.weight" for suffix in ("down", "up"))
    _check(spec, down, f"of rank {rank}", lambda shape: shape[0] == rank, where)
    _check(spec, up, f"of rank {rank}", lambda shape: shape[1] == rank, where)


def _check_projected(spec: Spec, edit: Edit, where: str) -> None:
    """Check the rank of the projection and of its table, which is missing if the config ties it to another."""
    table, rank = f"{edit.module}.weight", edit.values["rank"]
    _check(spec, f"{edit.module}.projection.weight", f"of rank {rank}", lambda shape: rank in shape, where)
    if table in spec.tensors:
        _check(spec, table, f"of rank {rank}", lambda shape: shape[1] == rank, where)


def _check_sized(spec: Spec, edit: Edit, where: str) -> None:
    """Check that the matrix has the shape of the edit."""
    outputs, inputs = edit.values["outputs"], edit.values["inputs"]
    linear = model_map(spec).linears.get(f"{edit.module}.weight")
    fits = linear is not None and (outputs, inputs) == (linear.O, linear.I)
    _check(spec, f"{edit.module}.weight", f"of {outputs} x {inputs}", lambda shape: fits, where)


def _check(spec: Spec, name: str, said: str, fits: Callable[[tuple[int, ...]], bool], where: str) -> None:
    """Check that a matrix is there and that its shape fits. Raises `CheckpointError`."""
    shape = spec.tensors[name].shape if name in spec.tensors else None
    if shape is None or len(shape) != 2 or not fits(shape):
        found = "is missing" if shape is None else f"is {list(shape)}"
        raise CheckpointError(f"config and weights disagree: {name}, {said}, {found}", where=where)


def alias(source: Tensor, name: str) -> Tensor:
    """Alias of ``source`` under another name."""
    return replace(source, name=name, alias_of=source.name, kept=None, storage=DENSE, quant_format=None)


def factored(spec: Spec, ranks: Mapping[str, int]) -> Spec:
    """Spec with factors in place of weight matrices. ``ranks``: name of the matrix ▶ rank."""
    tensors: dict[str, Tensor] = {}
    edits = list(spec.structure.edits)
    linears = model_map(spec).linears
    biases = {f"{spec.tensors[name].module}.bias": spec.tensors[name].module for name in ranks}
    for name, tensor in spec.tensors.items():
        if name in ranks:
            linear = linears[name]
            shapes = {"down": (ranks[name], linear.I), "up": (linear.O, ranks[name])}
            for part, shape in shapes.items():
                new = f"{tensor.module}.{part}.weight"
                tensors[new] = replace(tensor, name=new, shape=shape, kept=None, storage=DENSE)
            edits.append(Edit("factors", tensor.module, {"rank": ranks[name], "transposed": linear.transposed}))
        elif name in biases:
            new = f"{biases[name]}.up.bias"
            tensors[new] = replace(tensor, name=new)
        else:
            tensors[name] = tensor
    return replace(spec, structure=replace(spec.structure, edits=tuple(edits)), tensors=tensors)


def projected(spec: Spec, tables: Iterable[str], rank: int) -> Spec:
    """Spec with thin tables: that of the embeddings [V, h] ▶ [V, r], then that of the head, each with a projection."""
    tensors, edits = dict(spec.tensors), list(spec.structure.edits)
    for number, name in enumerate(tables):
        tensor = tensors[name]
        count, hidden = tensor.shape
        tensors[name] = replace(tensor, shape=(count, rank))
        beside = f"{tensor.module}.projection.weight"
        shape = (rank, hidden) if number else (hidden, rank)
        tensors[beside] = replace(tensor, name=beside, shape=shape, alias_of=None)
        edits.append(Edit("projected", tensor.module, {"rank": rank}))
    return replace(spec, structure=replace(spec.structure, edits=tuple(edits)), tensors=tensors)


def shared(spec: Spec, groups: Sequence[Sequence[int]], parts: Collection[str], rank: int) -> Spec:
    """Spec in which the blocks of a group share tensors, stored under the names of the group's first block.

    Args:
        groups: block numbers. parts: names of the tensors within a block. rank: rank of the residual that each block of a group
            gets for each shared matrix; 0 for none.
    """
    tensors, edits = dict(spec.tensors), list(spec.structure.edits)
    paths, linears = model_map(spec).paths, model_map(spec).linears
    for blocks in groups:
        source = paths[blocks[0]]
        for block in blocks:
            path = paths[block]
            for part in parts:
                tensor = spec.tensors[path + part]
                if block != blocks[0]:
                    tensors[path + part] = alias(spec.tensors[source + part], path + part)
                if rank and len(tensor.shape) == 2:
                    linear = linears[tensor.name]
                    for suffix, shape in (("up", (linear.O, rank)), ("down", (rank, linear.I))):
                        name = f"{tensor.module}.residual_{suffix}.weight"
                        tensors[name] = replace(tensor, name=name, shape=shape, kept=None, storage=DENSE)
                    edits.append(Edit("residual", tensor.module, {"rank": rank, "transposed": linear.transposed}))
            if block != blocks[0]:
                edits.append(Edit("shared", path[:-1], {"source": source[:-1], "parts": sorted(parts)}))
    return replace(spec, structure=replace(spec.structure, edits=tuple(edits)), tensors=tensors)


def sized(spec: Spec, modules: Iterable[str]) -> Spec:
    """Spec with ``sized`` edits for modules whose tensors have their new shapes already."""
    edits = list(spec.structure.edits)
    for module in modules:
        linear = model_map(spec).linears[f"{module}.weight"]
        edits.append(Edit("sized", module, {"outputs": linear.O, "inputs": linear.I}))
    return replace(spec, structure=replace(spec.structure, edits=tuple(edits)))


def uneven(spec: Spec) -> str | None:
    """First module with a ``sized`` edit, None without any."""
    return next((e.module for e in spec.structure.edits if e.kind == "sized"), None)


def dense_spec(spec: Spec) -> tuple[Spec, dict[str, tuple[str, ...]]]:
    """Spec of the dense twin, and for each of its tensors the names of the tensors here that it is computed from.

    One name: a copy. Two: the product of [O, r] and [r, I]. Three: the first plus the product of the others.

    Raises:
        PassError: a ``sized`` edit has no dense twin.
    """
    if (odd := uneven(spec)) is not None:
        raise PassError(
            f"no stock class can express that {odd} has its own width", fix="prune with `allocation: uniform`"
        )
    edits = {e.module: e for e in spec.structure.edits if e.kind != "shared"}
    untied = sum(edit.kind == "projected" for edit in edits.values()) > 1  # two projections make two tables of one
    shared = {f"{e.module}.{part}" for e in spec.structure.edits if e.kind == "shared" for part in e.values["parts"]}
    sources: dict[str, tuple[str, ...]] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in spec.tensors.items():
        module, _, last = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        if spec.structure.kv_cache is not None and tensor.is_cache_scale:
            continue
        role = model_map(spec).added(name)
        if role in ("residual", "projection") or (role == "factor" and part == "down"):
            continue
        if name in shared:
            tensor = spec.tensors[str(tensor.alias_of)]
        elif untied and tensor.alias_of is not None:
            tensor = replace(spec.tensors[tensor.alias_of], name=name)
        made_of: tuple[str, ...] = (name,)
        own, shape, kept = name, tensor.shape, tensor.kept
        if role == "factor" and last == "bias":
            own = f"{parent}.bias"
        elif role == "factor":
            own, made_of, kept = f"{parent}.weight", (name, f"{parent}.down.weight"), None
            shape = (tensor.shape[0], spec.tensors[f"{parent}.down.weight"].shape[1])
            shape = shape[::-1] if edits[parent].values["transposed"] else shape
        elif module in edits and edits[module].kind == "projected" and last == "weight":
            made_of, kept = (name, f"{module}.projection.weight"), None
            shape = (tensor.shape[0], max(spec.tensors[made_of[1]].shape))
        elif module in edits and edits[module].kind == "residual" and last == "weight":
            made_of, kept = (name, f"{module}.residual_up.weight", f"{module}.residual_down.weight"), None
        tensors[own] = replace(tensor, name=own, shape=shape, kept=kept, quant_format=None, storage=DENSE)
        sources[own] = made_of
    config = {**spec.structure.config, **({"tie_word_embeddings": False} if untied else {})}
    return replace(spec, structure=replace(spec.structure, edits=(), config=config), tensors=tensors), sources


def dense(checkpoint: Checkpoint) -> Checkpoint:
    """Dense twin of a checkpoint, of the stock class: products for factors, copies for shared tensors."""
    from compress.checkpoint.edits import product, unprojected, with_residual
    from compress.checkpoint.values import Derived, Value

    twin, sources = dense_spec(checkpoint.spec)
    transposed = {e.module for e in checkpoint.spec.structure.edits if e.values.get("transposed")}

    def read(name: str) -> Value:
        first, *others = (checkpoint.tensor(source) for source in sources[name])
        if not others:
            return Value(first.data, first.mask)
        turned = name.rpartition(".")[0] in transposed
        if len(others) == 1 and model_map(checkpoint.spec).added(sources[name][1]) == "projection":
            return Value(unprojected(first.data, others[0].data))
        if len(others) == 1:
            return Value(product(first.data, others[0].data, turned))
        return Value(with_residual(first.data, others[0].data, others[1].data, turned))

    return Derived(checkpoint, twin, read)
