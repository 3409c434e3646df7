"""The dense twin of a checkpoint: the stock class with products for factors and copies of shared tensors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.checkpoint.edits import first_without_twin
from compress.errors import PassError
from compress.spec.edits import EDIT_KINDS, TwinTensor, copied
from compress.spec.spec import Edit, Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value


def dense_spec(spec: Spec) -> tuple[Spec, dict[str, TwinTensor]]:
    """Spec of the dense twin, and how each of its tensors is computed, by name.

    Raises:
        PassError: an edit has no dense twin.
    """
    if (odd := first_without_twin(spec)) is not None:
        what, instead = EDIT_KINDS[odd.kind].alone
        raise PassError(f"no stock class can express that {odd.module} {what}", fix=instead)
    owners: dict[str, Edit] = {}
    kinds: dict[str, list[Edit]] = defaultdict(list)
    for edit in spec.structure.edits:
        owners |= dict.fromkeys([edit.module, *(f"{edit.module}.{part}" for part in EDIT_KINDS[edit.kind].adds)], edit)
        kinds[edit.kind].append(edit)
    untied = {name for kind, edits in kinds.items() for name in EDIT_KINDS[kind].untied(edits, spec)}
    twins: dict[str, TwinTensor] = {}
    for name, tensor in spec.tensors.items():
        if spec.structure.kv_cache is not None and tensor.is_cache_scale:
            continue
        if name in untied:
            tensor = replace(spec.tensors[str(tensor.alias_of)], name=name)
        owner = owners.get(tensor.module)
        twin = copied(tensor) if owner is None else EDIT_KINDS[owner.kind].twin(owner, spec, tensor)
        if twin is not None:
            twins[twin.tensor.name] = twin
    config = dict(spec.structure.config)
    for kind, edits in kinds.items():
        config |= EDIT_KINDS[kind].twin_config(edits)
    tensors = {name: twin.tensor for name, twin in twins.items()}
    return replace(spec, structure=replace(spec.structure, edits=(), config=config), tensors=tensors), twins


def dense(checkpoint: Checkpoint) -> Checkpoint:
    """Dense twin of a checkpoint, of the stock class: products for factors, copies for shared tensors."""
    from compress.checkpoint.values import Derived, Value

    spec, twins = dense_spec(checkpoint.spec)

    def read(name: str) -> Value:
        twin = twins[name]
        values = [checkpoint.tensor(source) for source in twin.sources]
        if twin.compute is None:
            return Value(values[0].data, values[0].mask)
        return Value(twin.compute(*(value.data for value in values)))

    return Derived(checkpoint, spec, read)
