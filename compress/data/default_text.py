"""The text that the package ships: the data set `default` of calibration and evaluation. Needs neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

#: The name that recipes have for it.
DEFAULT = "default"
_FOLDER = Path(__file__).parent / "text"
#: Data set ▶ its file. Documents of one stand in no other.
FILES: Mapping[str, Path] = MappingProxyType(
    {name: _FOLDER / f"{name}.jsonl" for name in ("calibration", "evaluation")}
)
#: Training reads the text of calibration.
_OF_SET = {"training": FILES["calibration"], **FILES}


def located(file: str, data_set: str) -> str:
    """The path of a file that a recipe names for a data set; that of the shipped text for `default`."""
    return str(_OF_SET[data_set]) if file == DEFAULT else file


def named(file: str) -> str:
    """The name that a recipe has for a file: `default` for the shipped text."""
    return DEFAULT if file in map(str, FILES.values()) else file
