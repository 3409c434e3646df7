"""Model families: where blocks, embeddings, heads and norms are. All knowledge of families lives in `records`.

No other module asks for a ``model_type``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.architectures.record import Architecture
from compress.architectures.records import RECORDS
from compress.checkpoint.spec import Spec
from compress.errors import PassError

__all__ = ["RECORDS", "Architecture", "known", "of", "positions"]

_BY_TYPE = {record.model_type: record for record in RECORDS}


def known(config: Mapping[str, Any]) -> bool:
    """Whether there is a record for the config's model type."""
    return config.get("model_type") in _BY_TYPE


def of(config: Mapping[str, Any]) -> Architecture:
    """The record of the config's family. Raises `PassError` where there is none."""
    found = _BY_TYPE.get(str(config.get("model_type")))
    if found is None:
        raise PassError(
            f"the model type `{config.get('model_type')}` has no architecture record",
            fix=f"records: {', '.join(sorted(_BY_TYPE))}; CONTRIBUTING.md says how to add one",
        )
    return found


def positions(spec: Spec) -> int | None:
    """How many tokens a text may have; None where that has no limit, or there is no record."""
    config = spec.structure.config
    return of(config).positions(spec) if known(config) else None
