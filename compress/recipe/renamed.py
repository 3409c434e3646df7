"""Keys and values of recipes that were renamed, old ▶ new: one table for errors, docs and the translation of old recipes.

A recipe that uses an old spelling is refused at its place with the new one. Nothing old is accepted silently.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """One key.

    Attributes:
        section: name of the pass; empty for a key of the recipe itself.
        old: the key as it was; dotted inside a section of settings.
        new: the key as it is; equal to ``old`` where only values have changed.
        values: old value ▶ new value; values that are not listed stay.
    """

    section: str
    old: str
    new: str
    values: Mapping[Any, Any] = field(default_factory=dict)

    def value(self, old: Any) -> Any:
        """The new value for an old one."""
        known = isinstance(old, (str, bool)) and old in self.values
        return copy.deepcopy(self.values[old]) if known else old

    def knows(self, old: Any) -> bool:
        """Whether an old value has another spelling now."""
        return isinstance(old, (str, bool)) and old in self.values


#: By `error_correction`, what ``refine: true`` did.
_ALL_CORRECTIONS = ["asymmetric", "alternating", "curvature"]
_RECONSTRUCTED = ("cast", "prune_unstructured", "prune_structured", "factorize")

TABLE: tuple[Renamed, ...] = (
    Renamed("", "workers", "threads"),
    Renamed("cast", "refine", "error_correction", {True: _ALL_CORRECTIONS, False: []}),
    *(Renamed(name, "tune_epochs", "reconstruction_epochs") for name in _RECONSTRUCTED),
    *(Renamed(name, "tune_rate", "reconstruction_lr") for name in _RECONSTRUCTED),
    Renamed("prune_unstructured", "allocation", "allocation", {"loss": "kl"}),
    Renamed("factorize", "allocation", "allocation", {"loss": "kl"}),
    Renamed("prune_structured", "widths", "allocation", {"even": "uniform", "uneven": "kl"}),
    Renamed("prune_structured", "score", "importance", {"loss": "obs"}),
    Renamed("prune_structured", "layer_score", "layer_importance", {"loss": "kl", "influence": "block_influence"}),
    Renamed("prune_structured", "repair", "compensation", {"tune": "reconstruction"}),
    Renamed("distill", "rate", "learning_rate"),
    Renamed("distill", "warmup", "warmup_ratio"),
    Renamed("distill", "batch", "batch_size"),
    Renamed("distill", "micro_batch", "micro_batch_size"),
    Renamed("distill", "clip", "max_grad_norm"),
    Renamed("distill", "average", "ema_decay"),
    Renamed("distill", "held_out", "validation_samples"),
    Renamed("distill", "teacher_cache.k", "teacher_cache.top_k"),
)


def find(section: str, key: str) -> Renamed | None:
    """The entry for an old key, or an old key whose values have changed. ``key`` is dotted below a section."""
    return next((entry for entry in TABLE if (entry.section, entry.old) == (section, key)), None)


def spelled(key: str, value: Any) -> str:
    """``key: value`` in YAML, on one line."""
    text = value if isinstance(value, str) else json.dumps(value).replace('"', "")
    return f"{key.rpartition('.')[2]}: {text}"


def translated(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe in today's keys, from one in old keys; what is new already stays. The recipe itself is left as it is."""
    result: dict[str, Any] = _section("", copy.deepcopy(dict(recipe)))
    if isinstance(passes := result.get("passes"), Sequence) and not isinstance(passes, str):
        result["passes"] = [_entry(entry) for entry in passes]
    return result


def _entry(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    return {name: _section(name, settings) for name, settings in entry.items()}


def _section(name: str, settings: Any, prefix: str = "") -> Any:
    if not isinstance(settings, Mapping):
        return settings
    result = {}
    for key, value in settings.items():
        entry = find(name, f"{prefix}{key}")
        if entry is None:
            result[key] = _section(name, value, f"{prefix}{key}.") if name else value
        else:
            result[entry.new.rpartition(".")[2]] = entry.value(value)
    return result


def rows() -> list[tuple[tuple[str, ...], str, str]]:
    """Sections, old and new spelling: a row for each key, and for each value with another spelling."""
    by_spelling: dict[tuple[str, str], list[str]] = {}
    for entry in TABLE:
        spellings = [(spelled(entry.old, old), spelled(entry.new, new)) for old, new in entry.values.items()]
        if entry.old != entry.new:
            spellings.insert(0, (entry.old, entry.new))
        for spelling in spellings:
            by_spelling.setdefault(spelling, []).append(entry.section)
    return [(tuple(sections), old, new) for (old, new), sections in by_spelling.items()]
