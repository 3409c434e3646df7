"""Model families: the record of each says where blocks, embeddings, heads and norms are.

All knowledge of families lives in this package; no other one asks for a ``model_type``. `model_map` answers questions about a
checkpoint. Entry points of the group ``compress.architectures`` add records of other packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from compress.architectures.record import Architecture
from compress.architectures.records import RECORDS
from compress.errors import PassError
from compress.extensions import entry_points
from compress.spec.spec import Spec

__all__ = ["RECORDS", "Architecture", "find", "of", "record_for"]


@cache
def _by_type() -> dict[str, Architecture]:
    """Model type ▶ record. Records of this package win over those of others. Raises `PassError` for a broken entry point."""
    records: dict[str, Architecture] = {}
    for point in entry_points("compress.architectures"):
        try:
            record = point.load()
        except Exception as error:  # a foreign module may do anything on import
            raise PassError(f"the architecture record `{point.value}` cannot be loaded: {error!r}") from None
        if not isinstance(record, Architecture):
            raise PassError(f"the entry point `{point.name}` names {point.value}, which is not an Architecture")
        records[record.model_type] = record
    return records | {record.model_type: record for record in RECORDS}


def find(config: Mapping[str, Any]) -> Architecture | None:
    """The record of the config's family; None where there is none."""
    return _by_type().get(str(config.get("model_type")))


def of(config: Mapping[str, Any]) -> Architecture:
    """The record of the config's family. Raises `PassError` where there is none."""
    if (record := find(config)) is None:
        raise PassError(
            f"the model type `{config.get('model_type')}` has no architecture record",
            fix=f"records: {', '.join(sorted(_by_type()))}; docs/extend/family.md says how to write one",
        )
    return record


def record_for(spec: Spec) -> Architecture:
    """The record of a model: the family's, else one that is inferred from the model's class, else one by shapes alone.

    `Architecture.source` says which. A record that is not written imports torch and transformers.
    """
    if (record := find(spec.structure.config)) is not None:
        return record
    from compress.architectures.inference import infer

    return infer(spec)
