"""Kinds of data files, by their names. Needs neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path

#: Files of text; those of them with named fields; suffixes of packed files; files of token ids.
TEXT_KINDS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
FIELD_KINDS = TEXT_KINDS[1:]
PACKINGS = (".gz", ".zst")
ID_KINDS = (".npy", ".safetensors")
#: The field to read where none is named.
FIELD = "text"


def kind(file: str | Path) -> str:
    """A file's suffix without that of its packing, in small letters: ``.jsonl`` for ``a.jsonl.gz``."""
    path = Path(file)
    return (path.with_suffix("") if path.suffix.lower() in PACKINGS else path).suffix.lower()


def holds_ids(file: str | Path) -> bool:
    """Whether a file holds token ids rather than text, by its name."""
    return Path(file).suffix.lower() in ID_KINDS


def refusal(file: str | Path, *, ids: bool) -> str | None:
    """The reason that a file cannot be read, by its name alone; None where it can. ``ids``: accept token ids."""
    if holds_ids(file):
        return None if ids else "holds token ids, which only calibration takes"
    if kind(file) in TEXT_KINDS:
        return None
    path = Path(file)
    return f"is no {', '.join(TEXT_KINDS[:-1])} or {TEXT_KINDS[-1]} file (`{path.suffix or path.name}`)"
