"""Fields of configs as transformers named them before version 5, by which other runtimes read a checkpoint. Imports no torch.

transformers 5 writes ``dtype`` and ``rope_parameters`` alone; mistral.rs and others ask for ``torch_dtype``, ``rope_theta`` and
``rope_scaling``. So both are written, and what says the same twice is dropped when a checkpoint is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stock config with the older names of fields that it has under the newer ones alone. Inverse: `without_older_keys`."""
    return {**_older(config), **config}


def without_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stock config without older fields that repeat what the newer ones say; others stay."""
    older = _older(config)
    return {key: value for key, value in config.items() if key not in older or value != older[key]}


def _older(config: Mapping[str, Any]) -> dict[str, Any]:
    """The older fields that say what the newer ones of a config do; none for rotary positions that differ by kind of layer."""
    older: dict[str, Any] = {}
    if isinstance(config.get("dtype"), str):
        older["torch_dtype"] = config["dtype"]
    rotary = config.get("rope_parameters")
    if not isinstance(rotary, dict) or not isinstance(rotary.get("rope_theta"), int | float):
        return older
    older["rope_theta"] = rotary["rope_theta"]
    if "partial_rotary_factor" in rotary:
        older["partial_rotary_factor"] = rotary["partial_rotary_factor"]
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") != "default":
        older["rope_scaling"] = scaling
    return older
