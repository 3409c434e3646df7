"""Removes what is not part of the model on opening: leftover tensors, copies of tied tensors, settings of one machine.

Records of families (`architectures`) say what is a leftover. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from compress import architectures
from compress.checkpoint.headers import Header
from compress.checkpoint.layout import METADATA_KEY
from compress.errors import CheckpointError
from compress.spec.spec import Spec

#: Function of two tensor names: whether the files hold the same bytes for both.
Same = Callable[[str, str], bool]
#: Keys, in a config or in nested ones, that choose kernels. These may be missing elsewhere, or are downloaded; they belong to a
#: machine, not to the model.
_CHOICES = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "attn_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "experts_implementation",
        "kernel_config",
        "use_kernels",
        "fusion_config",
        "distributed_config",
    }
)
_SHOWN = 3


def without_choices(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Config without machine-specific keys and without the name of its weight file, and a note for each choice removed."""
    notes: dict[str, None] = {}

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, dict):
            return value
        for key in value.keys() & _CHOICES:
            if value[key]:
                notes[f"`{key}` of config.json is left out: it chooses kernels and is not part of the model"] = None
        return {key: clean(item) for key, item in value.items() if key not in _CHOICES}

    result = clean({key: value for key, value in config.items() if key != "transformers_weights"})
    return result, tuple(sorted(notes))


def with_new_names(headers: Mapping[str, Header], config: Mapping[str, Any]) -> dict[str, Header]:
    """Headers with today's tensor names, for families whose record knows the names in older files."""
    if (record := architectures.find(config)) is None:
        return dict(headers)
    names = {name for header in headers.values() for name in header.entries}

    def new(name: str) -> str:
        today = record.new_name(name)
        return name if today in names else today

    return {
        file: header
        if METADATA_KEY in header.metadata
        else replace(header, entries={new(name): entry for name, entry in header.entries.items()})
        for file, header in headers.items()
    }


def without_leftovers(spec: Spec) -> Spec:
    """Spec without the leftover tensors that the family's record knows, and with a note on them."""
    class_name, record = spec.structure.class_name, architectures.record_for(spec)
    gone = [name for name in spec.tensors if record.is_leftover(name, class_name)]
    if not gone:
        return spec
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in gone))
    shown = ", ".join(kinds[:_SHOWN]) + (" and more" if len(kinds) > _SHOWN else "")
    count = f"{len(gone)} tensors are" if len(gone) > 1 else "1 tensor is"
    note = f"{count} left out, which {class_name or record.base_class or 'the model'} does not read: {shown}"
    tensors = {name: tensor for name, tensor in spec.tensors.items() if name not in gone}
    return replace(spec, tensors=tensors, notes=(*spec.notes, note))


def without_copies(spec: Spec, same: Same, where: str) -> Spec:
    """Spec without second copies of tensors that the class has once, such as tied embeddings.

    If a head differs from the embedding that the config ties it to, both are kept, as stock transformers keeps them, and
    ``tie_word_embeddings`` becomes false.

    Raises:
        CheckpointError: copies differ, and the family has no config that keeps both.
    """
    record = architectures.record_for(spec)
    tensors, notes = dict(spec.tensors), list(spec.notes)

    def alike(name: str, source: str) -> bool:
        a, b = spec.tensors[name], spec.tensors[source]
        if replace(a, name=source) != b or a.alias_of or a.quant_format is not None:
            return False
        return same(name, source)

    for name, source in record.held_copies(spec):
        if not alike(name, source):
            if record.source == "written":
                raise _apart(name, source, where)
            continue  # transformers keeps both
        del tensors[name]
        notes.append(f"{name} is left out: it is {source}")
    pairs = [pair for pair in record.tied_pairs(spec) if spec.tensors.keys() >= {*pair}]
    head = next((pair for pair in pairs if pair[0] == record.head_tie), None)
    structure = spec.structure
    if head is not None and not alike(*head) and record.source != "written":
        notes.append(f"{head[0]} is kept beside {head[1]}, whose values differ, although the config ties them")
        pairs = []
    elif head is not None and not alike(*head):
        needed = {record.bias_tie[0]} if record.bias_tie else set()
        if record.copies or not spec.tensors.keys() >= needed:
            raise _apart(*head, where)
        notes.append(
            f"{head[0]} is kept beside {head[1]}, whose values differ, although the config ties them: "
            "tie_word_embeddings is false from here on"
        )
        structure = replace(structure, config={**structure.config, "tie_word_embeddings": False})
        pairs = []
    for name, source in pairs:
        if alike(name, source):
            del tensors[name]  # the record adds it as an alias
            notes.append(f"{name} is stored once: it is {source}, to which the config ties it")
    return replace(spec, structure=structure, tensors=tensors, notes=tuple(notes))


def _apart(name: str, source: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"ties {name} to {source} in its config, but has different values for each",
        where=where,
        fix="remove the one that you do not mean from the weight files",
    )
