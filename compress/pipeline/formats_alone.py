"""Stages that change number formats alone: what they write is checked without the model's class, whose import is half of a run.

The writer has decoded every tensor from the files, and compared it with what was handed to it. Names, shapes and config are
those of the input. What is left is the config of the codes: read back, it must say of every tensor what was planned.
"""

from __future__ import annotations

from collections.abc import Iterable

from compress import passes
from compress.architectures.model_map import model_map
from compress.checkpoint.files import read_json
from compress.checkpoint.open import Stored
from compress.checkpoint.storage.compressed_tensors.parse import SchemeGroups, parse
from compress.checkpoint.storage.compressed_tensors.write import KEY
from compress.errors import CheckpointError
from compress.planning import PlannedStage
from compress.spec.spec import FLOAT_DTYPES, Spec, Structure

#: Fields of a config that number formats change.
_FORMATS = ("dtype", "torch_dtype", KEY)
#: Fields that a model's class may ignore, which only its outputs show.
_MAY_BE_UNUSED = ("layer_types", "sliding_window")


def streams(stages: Iterable[PlannedStage]) -> bool:
    """Whether every pass of the stages works tensor by tensor, without data."""
    return all(passes.get(p.name).mode_for(p.settings) == "stream" for stage in stages for p in stage.passes)


def formats_alone(before: Spec, after: Spec) -> bool:
    """Whether a stock checkpoint differs from another in number formats alone, and a written record knows all its tensors."""
    one, other = before.structure, after.structure
    kept = [{k: v for k, v in s.config.items() if k not in _FORMATS} for s in (one, other)]
    if kept[0] != kept[1] or one.edits or other.edits or other.compact or one.config.get("auto_map"):
        return False
    shapes = [{t.name: (t.shape, t.alias_of) for t in spec.tensors.values()} for spec in (before, after)]
    return shapes[0] == shapes[1] and not before.sources and _regular(before)


def _regular(spec: Spec) -> bool:
    """Whether all blocks have the same tensors, and outside them are only tables, a head and norms, so that none is missing."""
    mapped = model_map(spec)
    if any(spec.structure.config.get(key) for key in _MAY_BE_UNUSED):
        return False
    if mapped.record.source != "written" or not mapped.record.packable or mapped.has_experts or mapped.record.stacks:
        return False
    blocks = [{name: tensor.shape for name, tensor in block.tensors.items()} for block in mapped.blocks]
    if len(blocks) != mapped.depth or any(block != blocks[0] for block in blocks):
        return False
    tables = [mapped.embedding, *([mapped.head_weight.name] if mapped.head_weight is not None else [])]
    others = [t for t in mapped.outside if t.name not in tables]
    return None not in tables and all(len(t.shape) == 1 for t in others) and bool(others)


def check_codes_config(stored: Stored) -> None:
    """Check that the config of a checkpoint's codes, read back, says what each of its matrices is.

    Raises:
        CheckpointError: naming a matrix that differs.
    """
    assert stored.folder is not None
    config, where = read_json(stored.folder, "config.json"), str(stored.folder)
    coded = {t.name: t for t in stored.spec.stored() if t.quant_format is not None}
    if not coded and KEY not in config:
        return
    mapped = model_map(stored.spec)
    tensors, _, _ = parse(Structure(config), stored.entries, where)
    groups = SchemeGroups(config[KEY], where)
    for tensor in stored.spec.stored():
        if len(tensor.shape) != 2 or tensor.dtype not in FLOAT_DTYPES or not tensor.name.endswith(".weight"):
            continue
        kind = "Embedding" if mapped.linears[tensor.name].role == "embedding" else "Linear"
        meant = groups.scheme(mapped.in_memory(tensor.module), kind) is not None
        read, planned = tensors.get(tensor.name), coded.get(tensor.name)
        if meant != (planned is not None) or (read and read.quant_format) != (planned and planned.quant_format):
            raise CheckpointError(
                f"the config does not say what {tensor.name} is",
                where=where,
                fix="use `store: compact`, and report this",
            )
