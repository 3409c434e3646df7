"""Facts that decide which recipe fits a checkpoint, from its headers and the names of files around it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from compress.architectures.model_map import ModelMap, model_map
from compress.checkpoint.files import read_json
from compress.checkpoint.open import open_headers
from compress.checkpoint.sidecars import safe_file, with_links
from compress.data.default_text import DEFAULT
from compress.data.documents import check_columns
from compress.data.kinds import FIELD, FIELD_KINDS, kind
from compress.errors import DataError
from compress.evaluation.tasks import LANGUAGE, MASKED, Task, is_seq2seq, task_of
from compress.files import expanded
from compress.models.processors import has_tokenizer
from compress.spec.spec import Spec, Tensor

#: Data set ▶ beginnings of the names of its text files.
_NAMES = {"calibration": ("calib", "train"), "evaluation": ("valid", "eval", "test", "dev")}
_KINDS = (".txt", ".jsonl")
_FOLDERS = (".", "data")
#: Lines that are searched for a separator, and its form.
_LINES, _SEPARATOR = 10_000, re.compile(r"<\|\w+\|>")
#: Tokens of a sample and of an evaluation window.
_LENGTH = 256


@dataclass(frozen=True)
class Facts:
    """Facts about a checkpoint.

    Attributes:
        model: folder or hub id. spec, metadata: of its headers.
        folder: the local folder or file; None for a hub id.
        options: keys of a recipe that opening the checkpoint needs, such as `trust_remote_code`.
        text: data set ▶ file; both are the text of the package where none is at hand.
    """

    model: str
    spec: Spec
    metadata: Mapping[str, str]
    folder: Path | None
    options: Mapping[str, bool]
    text: Mapping[str, str]

    @cached_property
    def map(self) -> ModelMap:
        """The map of the model."""
        return model_map(self.spec)

    @property
    def class_name(self) -> str:
        """The stock class, or the model type where the class is not known."""
        return self.spec.structure.class_name or self.spec.structure.model_type

    @property
    def task(self) -> Task | None:
        """The task by the class; None where no metric measures it."""
        task = task_of(self.spec.structure.class_name)
        return task if self.class_name.endswith(task.suffixes) and not is_seq2seq(self.spec.structure) else None

    @property
    def reads_text(self) -> bool:
        """Whether the model reads token ids, and has a tokenizer that makes them of text."""
        ids = self.map.known and self.map.record.input == "input_ids"
        return ids and (
            self.folder is None or has_tokenizer(self.folder if self.folder.is_dir() else self.folder.parent)
        )

    @property
    def calibrated(self) -> bool:
        """Whether passes can calibrate on plain text."""
        return self.reads_text and self.spec.structure.class_name is not None

    @property
    def evaluated(self) -> bool:
        """Whether plain text measures the model."""
        task = self.task
        return self.calibrated and task is not None and "text" in task.takes and (task is not MASKED or self._masks)

    @property
    def _masks(self) -> bool:
        if self.folder is None:
            return True
        files = [n for n in ("tokenizer_config.json", "special_tokens_map.json") if safe_file(self.folder, n).exists()]
        return any(isinstance(read := read_json(self.folder, n), dict) and read.get("mask_token") for n in files)

    @property
    def decodes(self) -> bool:
        """Whether the model predicts the next token."""
        return self.task is LANGUAGE

    @property
    def length(self) -> int:
        """Tokens of a sample, and of a window."""
        positions = [n for n in (self.map.positions, self.map.trained_positions) if n]
        return min(_LENGTH, *positions) if positions else _LENGTH

    @cached_property
    def tables(self) -> list[Tensor]:
        """The tables of tokens that have no codes yet."""
        return [tensor for tensor in self.map.tables if tensor.quant_format is None]

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables."""
        return sum(tensor.dense_bytes for tensor in self.tables)

    @property
    def bf16(self) -> bool:
        """Whether no weight has floats of another format."""
        return all(t.dtype == "BF16" for t in self.spec.stored() if t.is_float)

    @property
    def wide(self) -> bool:
        """Whether matrices have 32-bit floats."""
        return any(t.dtype in ("F32", "F64") and len(t.shape) > 1 for t in self.spec.stored())


def read_facts(
    model: str,
    *,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    offline: bool = False,
) -> Facts:
    """Facts about a folder or a hub id. Raises `CheckpointError` where there is no checkpoint."""
    reference = with_links(model, allow_links)
    options = {"trust_remote_code": trust_remote_code, "ignore_auto_map": ignore_auto_map}
    spec, metadata = open_headers(reference, offline=offline, **options)
    path, options = expanded(reference), {**options, "allow_links": allow_links}
    folder = path if path.exists() else None
    return Facts(model, spec, metadata, folder, {k: v for k, v in options.items() if v}, text_at_hand())


def text_at_hand() -> dict[str, str]:
    """Text files of the current folder and ``data/``, if one is for calibration and one for evaluation; else `default`."""
    named: dict[str, str] = {}
    for place in map(Path, _FOLDERS):
        files = sorted(path for path in place.iterdir() if path.suffix in _KINDS) if place.is_dir() else []
        for data_set, beginnings in _NAMES.items():
            close = [path for begin in beginnings for path in files if path.name.lower().startswith(begin)]
            if close and _has_text(close[0]):
                named.setdefault(data_set, str(close[0]))
    return named if len(named) == len(_NAMES) else dict.fromkeys(_NAMES, DEFAULT)


def _has_text(file: Path) -> bool:
    if kind(file) not in FIELD_KINDS:
        return file.stat().st_size > 0
    try:
        check_columns([str(file)], {FIELD: "field"})
    except DataError:
        return False
    return True


def separator_of(file: str) -> str | None:
    """The line that separates documents in a text file, such as ``<|doc|>``, if its first lines have one."""
    if kind(file) != ".txt":
        return None
    with Path(file).open(encoding="utf-8", errors="replace") as lines:
        return next((line.strip() for line in islice(lines, _LINES) if _SEPARATOR.fullmatch(line.strip())), None)
