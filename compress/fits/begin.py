"""The keys of a recipe with a bound, for a model without one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.presets.begin import named_output
from compress.presets.drafts import Draft
from compress.presets.facts import read_facts
from compress.presets.fit import mapping_of


def first_bound(model: str, text: Path | None, bound: Mapping[str, str], *, offline: bool = False) -> dict[str, Any]:
    """A recipe's keys with an empty section ``fit``: text that is at hand, or that of the package, calibrates and evaluates.

    Args:
        model: folder or hub id. text: to calibrate and train on, in place of what is at hand. bound: keys of the section.

    Raises:
        CheckpointError: there is no such checkpoint. CompressError: no bound is given.
    """
    if not {"max_bytes", "max_ratio"} & bound.keys():
        raise CompressError("a search needs a bound", fix="give --max-bytes 200MB, or --max-ratio 20%")
    facts = read_facts(model, offline=offline)
    draft = Draft(({"cast": {"weights": "int4"}},), ("",), "some")
    mapping = mapping_of(facts, draft, named_output(model, "fit"))
    for key in ("passes", "gates", "evaluate"):
        mapping.pop(key, None)
    data = mapping.setdefault("data", {})
    if text is not None and "calibration" in data:
        data["calibration"]["files"] = [str(text)]
    if int(bound.get("tokens", "0")) and "calibration" in data:
        data["training"] = {key: data["calibration"][key] for key in ("files", "length")}
    return {**mapping, "fit": {}}
