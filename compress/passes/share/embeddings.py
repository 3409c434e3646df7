"""Plans of embeddings: one table for input and output, or thin tables with projections."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.base import alias
from compress.checkpoint.edits.projected import projected
from compress.errors import PassError
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value
    from compress.passes.base import Context


def tied(spec: Spec) -> Spec:
    """Spec with input and output embeddings tied. Raises `PassError`."""
    mapped = model_map(spec)
    embedding, head = mapped.embedding, mapped.head_weight
    if embedding is None or head is None:
        raise PassError("this model has no head that predicts tokens", key="embeddings")
    if head.alias_of is not None:
        raise PassError("the embeddings are tied already", key="embeddings", fix="leave `embeddings` out")
    if head.shape != spec.tensors[embedding].shape:
        raise PassError(
            f"{head.name} {list(head.shape)} and {embedding} {list(spec.tensors[embedding].shape)} have unlike shapes",
            key="embeddings",
        )
    config = {**spec.structure.config, "tie_word_embeddings": True}
    rest = {n: t for n, t in spec.tensors.items() if n != head.name}
    rest[head.name] = alias(spec.tensors[embedding], head.name)
    return replace(spec, structure=replace(spec.structure, config=config), tensors=rest)


def thinned(spec: Spec, rank: int) -> Spec:
    """Spec with thin tables of that rank, and projections. Raises `PassError`."""
    mapped = model_map(spec)
    record, embedding = mapped.record, mapped.embedding
    if embedding is None:
        raise PassError(f"{record.model_type} looks no tokens up", key="embeddings")
    mapped.require_nameable("embeddings")
    head = mapped.head_weight
    tables = [embedding, *([head.name] if head is not None else [])]
    for name in tables:
        tensor = spec.tensors[name]
        if mapped.added(f"{tensor.module}.projection.weight") == "projection":
            raise PassError(f"{tensor.module} is two factors already", key="embeddings")
        if tensor.kept is not None:
            raise PassError(
                f"{name} has weights removed, and a thinner table would fill them in",
                key="embeddings",
                fix="factorise before pruning weights",
            )
    count, hidden = spec.tensors[embedding].shape
    own = sum(spec.tensors[name].alias_of is None for name in tables)
    most = (count * hidden * own - 1) // (count * own + hidden * len(tables))
    if rank > most:
        raise PassError(
            f"tables of rank {rank} and their projections are as large as what they replace, or larger",
            key="embedding_rank",
            fix=f"at most {most}" if most else "leave `embeddings` out",
        )
    if record.projections is None or head is None or not mapped.tied:
        return projected(spec, tables, rank)
    *modules, key = record.projections
    if any(f"{record.prefix}.{module}.weight" in spec.tensors for module in modules):
        raise PassError(f"{record.model_type} has a projection beside its table already", key="embeddings")
    tensors = dict(spec.tensors)
    for name in tables:
        tensors[name] = replace(tensors[name], shape=(count, rank))
    for module, shape in zip(modules, ((hidden, rank), (rank, hidden)), strict=True):
        name = f"{record.prefix}.{module}.weight"
        tensors[name] = replace(spec.tensors[embedding], name=name, shape=shape)
    config = {**spec.structure.config, key: rank}
    return replace(spec, structure=replace(spec.structure, config=config), tensors=tensors)


def thin(checkpoint: Checkpoint, rank: int, context: Context) -> Checkpoint:
    """The checkpoint with thin tables, fitted to calibration data."""
    from compress.checkpoint.values import Derived, Value, torch_dtype
    from compress.passes.share import fit_embeddings

    spec = checkpoint.spec
    after, record = thinned(spec, rank), model_map(spec).record
    factors = fit_embeddings.thin(
        checkpoint,
        after,
        context.data("calibration"),
        rank,
        device=context.device,
        dtype=context.dtype,
        progress=context.progress,
        work=context.workspace.path,
    )
    embedding = str(model_map(spec).embedding)
    sides = {embedding: "in", record.head_tie: "out"}
    new = {embedding: factors["table"]} | ({record.head_tie: factors["head"]} if "head" in factors else {})
    if len(after.structure.edits) > len(spec.structure.edits):
        beside = {f"{name.removesuffix('.weight')}.projection.weight": side for name, side in sides.items()}
    else:
        assert record.projections is not None
        modules = record.projections[:2]
        beside = {f"{record.prefix}.{m}.weight": side for m, side in zip(modules, ("in", "out"), strict=True)}
    new |= {n: factors[side].T if side == "in" else factors[side] for n, side in beside.items() if side in factors}

    def value(name: str) -> Value:
        if name not in new:
            return checkpoint.tensor(name)
        return Value(new[name].to(torch_dtype(after.tensors[name].dtype)).contiguous())

    return Derived(checkpoint, after, value)
