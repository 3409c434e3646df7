"""Fields of a config, set where the record of the family says that they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.architectures.inferred import Inferred
from compress.architectures.record import Architecture


def with_field(record: Architecture, config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The config with one field of the main list's part set; other spellings of the field are removed."""
    others = {other for other, meant in record.spellings.items() if meant == key}
    part = record.part_of(config) if isinstance(record, Inferred) else config
    changed = {**{k: v for k, v in part.items() if k not in others}, key: value}
    return record.with_part(config, changed) if isinstance(record, Inferred) else changed
