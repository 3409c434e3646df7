"""Whether a config and the weights beside it describe the same model. No torch here."""

from __future__ import annotations

from compress.architectures.inferred import Inferred
from compress.architectures.record import Architecture
from compress.errors import CheckpointError
from compress.spec.spec import Spec


def check_agreement(record: Architecture, spec: Spec, where: str) -> None:
    """Check that config and weights agree on the number of blocks and on the shape of the embedding table.

    Raises:
        CheckpointError: they disagree, or the config lacks a number that the record needs.
    """
    if isinstance(record, Inferred):
        _check_lists(record, spec, where)
        return
    _check_numbers(record, spec, where)
    matches = [match for match in map(record.block_pattern.match, spec.tensors) if match is not None]
    stacks = {stack: {int(m[2]) for m in matches if m[1].endswith(f"{stack}.")} for stack in record.stacks}
    numbers = {int(m[2]) for m in matches if not m[1].endswith(tuple(f"{stack}." for stack in record.stacks))}
    config = spec.structure.config
    _check_depth("block ", numbers, record.depth(config), where)
    for stack, present in stacks.items():
        if present:
            depth = int(config.get(record.stacks[stack]) or record.depth(config))
            _check_depth(f"{stack}.", present, depth, where)
    _check_embedding(record, spec, where)


def _check_lists(record: Inferred, spec: Spec, where: str) -> None:
    """Check the length of every list of blocks that the config gives."""
    matches = [match for match in map(record.block_pattern.match, spec.tensors) if match is not None]
    for entry in record.of_kind("main", "stack"):
        depth = record.length(spec.structure.config, entry)
        if depth is not None:
            present = {int(m[2]) for m in matches if m[1] == f"{entry.path}."}
            _check_depth("block " if entry.kind == "main" else f"{entry.path}.", present, depth, where)


def _check_numbers(record: Architecture, spec: Spec, where: str) -> None:
    """Check that the config fields with sizes hold positive integers; only depth, width and heads must be there."""
    needed = (record.depth_key, record.hidden_key, record.heads_key)
    optional = (
        record.kv_heads_key,
        record.head_dim_key,
        record.experts_key,
        record.active_experts_key,
        *record.stacks.values(),
    )
    for key in (*needed, *filter(None, optional)):
        value = record.value(spec.structure.config, key)
        if not (value is None and key not in needed) and (type(value) is not int or value < 1):
            raise CheckpointError(f"config.json has no usable `{key}`", where=where)


def _check_depth(blocks: str, present: set[int], depth: int, where: str) -> None:
    """Check that the numbers of the blocks present are 0 to ``depth - 1``."""
    # a damaged config may claim a depth that memory cannot count to
    missing = (index for index in range(min(depth, len(present) + 1)) if index not in present)
    if wrongs := [*missing, *(index for index in present if index >= depth)]:
        wrong = min(wrongs)
        side = "the weights hold none" if wrong < depth else f"the config says {depth}"
        raise CheckpointError(f"config and weights disagree: {blocks}{wrong}: {side}", where=where)


def _check_embedding(record: Architecture, spec: Spec, where: str) -> None:
    """Check that the table of embeddings is there, with a row per token of the vocabulary."""
    embedding = record.find_name(spec, f"{record.embeddings[0]}.weight")
    if embedding is None and record.is_tied(spec) and record.head_tie in spec.tensors:
        embedding = record.head_tie
    if embedding is None:
        raise CheckpointError(
            f"config and weights disagree: there is no {record.prefix}.{record.embeddings[0]}.weight", where=where
        )
    vocabulary = spec.structure.config.get("vocab_size") if record.input == "input_ids" else None
    shape = spec.tensors[embedding].shape
    if isinstance(vocabulary, int) and shape[0] != vocabulary:
        raise CheckpointError(
            f"config and weights disagree: {embedding} has {shape[0]} rows, the config says vocab_size {vocabulary}",
            where=where,
        )
