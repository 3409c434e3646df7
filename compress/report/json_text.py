"""Reports as JSON: write. The JSON is strict: NaN and infinities are words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.files import write_atomically


def to_json(data: Mapping[str, Any]) -> str:
    """Strict JSON, indented; NaN and infinities become the words ``NaN``, ``Infinity``, ``-Infinity``."""
    return json.dumps(_strict(data), indent=1, allow_nan=False, ensure_ascii=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, (list, tuple)) else value


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write a report in one step."""
    write_atomically(path, (to_json(report) + "\n").encode())
