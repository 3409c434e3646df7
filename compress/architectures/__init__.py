"""Model families: where blocks, embeddings, heads and norms are. All knowledge of families lives in `records`.

No other module asks for a ``model_type``. Entry points of the group ``compress.architectures`` add records of other packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

from compress.architectures.record import Architecture
from compress.architectures.records import RECORDS
from compress.errors import PassError
from compress.spec.spec import Spec

__all__ = ["RECORDS", "Architecture", "known", "of", "positions"]


@cache
def _by_type() -> dict[str, Architecture]:
    """Model type ▶ record; ours count before those of other packages. Raises `PassError` for an entry point that is none."""
    found: dict[str, Architecture] = {}
    for point in metadata.entry_points(group="compress.architectures"):
        try:
            record = point.load()
        except Exception as error:  # whatever a foreign module does on import
            raise PassError(f"the architecture record `{point.value}` cannot be loaded: {error!r}") from None
        if not isinstance(record, Architecture):
            raise PassError(f"the entry point `{point.name}` names {point.value}, which is no Architecture")
        found[record.model_type] = record
    return found | {record.model_type: record for record in RECORDS}


def known(config: Mapping[str, Any]) -> bool:
    """Whether there is a record for the config's model type."""
    return config.get("model_type") in _by_type()


def of(config: Mapping[str, Any]) -> Architecture:
    """The record of the config's family. Raises `PassError` where there is none."""
    found = _by_type().get(str(config.get("model_type")))
    if found is None:
        raise PassError(
            f"the model type `{config.get('model_type')}` has no architecture record",
            fix=f"records: {', '.join(sorted(_by_type()))}; CONTRIBUTING.md says how to write one",
        )
    return found


def positions(spec: Spec) -> int | None:
    """How many tokens a text may have; None where that has no limit, or there is no record."""
    config = spec.structure.config
    return of(config).positions(spec) if known(config) else None
