"""``shared``: the parameters ``parts`` of block ``module`` are those of block ``source``. Files hold them once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.base import alias, with_edits
from compress.checkpoint.edits.editing import ModelEdit
from compress.checkpoint.edits.residual import residual
from compress.errors import CheckpointError
from compress.spec.edits import EditKind
from compress.spec.spec import Edit, Spec, Tensor


class Shared(EditKind):
    """Tensors of a block that are those of another one."""

    kind = "shared"
    keys = ("source", "parts")
    storage = "shared"
    label = "blocks share tensors of others"
    spans_blocks = True

    def sound(self, values: Mapping[str, Any]) -> bool:
        """Whether there are a name and a list of names."""
        if values.keys() != set(self.keys):
            return False
        source, parts = values["source"], values["parts"]
        return isinstance(source, str) and isinstance(parts, list) and all(isinstance(p, str) for p in parts)

    def check(self, edit: Edit, spec: Spec, where: str) -> None:
        """Check that the source has the tensors and the block does not store them."""
        for name, source in self._names(edit):
            if source not in spec.tensors or name in spec.tensors:
                raise CheckpointError(f"config and weights disagree: an edit shares {name} with {source}", where=where)

    def aliases(self, edit: Edit, spec: Spec) -> Mapping[str, Tensor]:
        """The tensors of the block."""
        return {name: alias(spec.tensors[source], name) for name, source in self._names(edit)}

    def untied(self, edits: Sequence[Edit], spec: Spec) -> Collection[str]:
        """The tensors of the blocks."""
        return [name for edit in edits for name, _ in self._names(edit)]

    @staticmethod
    def _names(edit: Edit) -> list[tuple[str, str]]:
        """Name of each shared tensor and of its source."""
        return [(f"{edit.module}.{part}", f"{edit.values['source']}.{part}") for part in edit.values["parts"]]


def shared(spec: Spec, groups: Sequence[Sequence[int]], parts: Collection[str], rank: int) -> Spec:
    """Spec in which the blocks of a group share tensors, stored under the names of the group's first block.

    Args:
        groups: block numbers. parts: names of the tensors within a block. rank: rank of the residual that each block of a group
            gets for each shared matrix; 0 for none.
    """
    tensors, edits = dict(spec.tensors), []
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
                    edit, thin = residual(linears[tensor.name], rank)
                    edits.append(edit)
                    tensors |= thin
            if block != blocks[0]:
                edits.append(Edit("shared", path[:-1], {"source": source[:-1], "parts": sorted(parts)}))
    return with_edits(spec, edits, tensors)


# ---- editing: copied into the modelling file of compact checkpoints ----


class SharedModel(ModelEdit):
    """Makes parameters of a block those of another one. The dense twin has copies."""

    kind = "shared"

    def tied(self, find: Callable[[str], str], edit: dict[str, Any]) -> dict[str, str]:
        """The parameters of the block."""
        target, source = (find(name) for name in (edit["module"], edit["values"]["source"]))
        return {f"{target}.{part}": f"{source}.{part}" for part in edit["values"]["parts"]}
