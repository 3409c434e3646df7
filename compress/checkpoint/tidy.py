"""What files hold beside the model is left out on opening: leftovers, copies of tied tensors, choices of one machine. No torch.

What belongs to a family stands in its record (`architectures`).
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

#: Whether two tensors of the files hold the same bytes.
Same = Callable[[str, str], bool]
#: Keys of a config that choose code to compute with, here and in the configs within: kernels that may not be there, or are
#: fetched. They belong to a machine, not to the model.
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
    """The config without what a machine chooses, and a note for each choice; the names of its weight files are not its own."""
    notes: dict[str, None] = {}

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, dict):
            return value
        for key in value.keys() & _CHOICES:
            if value[key]:
                notes[f"`{key}` of config.json is left out: it chooses code to compute with, not a model"] = None
        return {key: clean(item) for key, item in value.items() if key not in _CHOICES}

    result = clean({key: value for key, value in config.items() if key != "transformers_weights"})
    return result, tuple(sorted(notes))


def with_new_names(headers: Mapping[str, Header], config: Mapping[str, Any]) -> dict[str, Header]:
    """The headers with tensors named as transformers names them now, where the family's record says how older files did."""
    if not architectures.known(config):
        return dict(headers)
    record, names = architectures.of(config), {name for header in headers.values() for name in header.entries}

    def new(name: str) -> str:
        found = record.new_name(name)
        return name if found in names else found

    return {
        file: header
        if METADATA_KEY in header.metadata
        else replace(header, entries={new(name): entry for name, entry in header.entries.items()})
        for file, header in headers.items()
    }


def without_leftovers(spec: Spec) -> Spec:
    """The spec without the tensors that its class does not read, as far as the record of the family knows them, and a note."""
    config, class_name = spec.structure.config, spec.structure.class_name
    if not architectures.known(config):
        return spec
    record = architectures.of(config)
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
    """The spec without second copies of what its class holds once: those that the config ties, and the embedding's.

    A head whose values differ from those of the embedding that the config ties it to is kept beside it, as stock transformers
    keeps it, and the config says so from then on.

    Raises:
        CheckpointError: copies differ, and the family has no config that would keep both.
    """
    if not architectures.known(spec.structure.config):
        return spec
    record = architectures.of(spec.structure.config)
    tensors, notes = dict(spec.tensors), list(spec.notes)

    def alike(name: str, source: str) -> bool:
        a, b = spec.tensors[name], spec.tensors[source]
        if replace(a, name=source) != b or a.alias_of or a.quant_format is not None:
            return False
        return same(name, source)

    for name, source in record.held_copies(spec):
        if not alike(name, source):
            raise _apart(name, source, where)
        del tensors[name]
        notes.append(f"{name} is left out: it is {source}")
    pairs = [pair for pair in record.tied_pairs(spec) if spec.tensors.keys() >= {*pair}]
    head = next((pair for pair in pairs if pair[0] == record.head_tie), None)
    structure = spec.structure
    if head is not None and not alike(*head):
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
            del tensors[name]  # the record names it as an alias
            notes.append(f"{name} is stored once: it is {source}, to which the config ties it")
    return replace(spec, structure=structure, tensors=tensors, notes=tuple(notes))


def _apart(name: str, source: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"ties {name} to {source} by its config, but holds other values for each",
        where=where,
        fix="remove the one that is not meant from the weight files",
    )
