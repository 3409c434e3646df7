"""The data sets of a run: documents, token batches, fingerprints; each made when first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import DataError
from compress.pipeline.fingerprint import fingerprint
from compress.text import Document, check_disjoint, read_documents
from compress.text import fingerprint as fingerprint_files

if TYPE_CHECKING:
    from compress.recipe import Recipe


@dataclass
class DataSets:
    """Text of a recipe's ``data`` section. ``folder`` is where the tokenizer is."""

    recipe: Recipe
    folder: Path
    _documents: dict[str, list[Document]] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)
    _batches: dict[str, Any] = field(default_factory=dict)

    def files(self, name: str) -> Sequence[str]:
        """Files of the set ``name``; empty where the recipe has none."""
        section = getattr(self.recipe.data, name, None)
        return () if section is None else tuple(section.files)

    def documents(self, name: str) -> list[Document]:
        """Documents of a set, in order."""
        if name not in self._documents:
            if not self.files(name):
                raise DataError(f"the recipe has no data.{name}")
            self._documents[name] = read_documents(self.files(name), self.recipe.document_separator)
        return self._documents[name]

    def fingerprint(self, name: str) -> str:
        """Of the files' contents and of every setting that picks samples from them."""
        if name not in self._hashes:
            section = getattr(self.recipe.data, name)
            settings = section.model_dump(mode="json", exclude={"files"})
            self._hashes[name] = fingerprint(
                [fingerprint_files(self.files(name)), settings, self.recipe.document_separator]
            )
        return self._hashes[name]

    def tokenizer(self) -> Any:
        """The original checkpoint's tokenizer."""
        from compress.loading import load_tokenizer

        if "tokenizer" not in self._batches:
            self._batches["tokenizer"] = load_tokenizer(self.folder, trust_remote_code=self.recipe.trust_remote_code)
        return self._batches["tokenizer"]

    def batches(self, name: str) -> Any:
        """Token windows of a set that is sampled: int64 [samples, length]."""
        from compress.calibration.batches import sample_windows

        if name not in self._batches:
            section = getattr(self.recipe.data, name)
            self._batches[name] = sample_windows(
                self.tokenizer(), self.documents(name), section.samples, section.length, self.recipe.seed
            )
        return self._batches[name]

    def check_disjoint(self) -> None:
        """Evaluation shares no text with training or calibration. Raises `DataError`."""
        if not self.files("evaluation"):
            return
        others: dict[tuple[str, ...], str] = {}
        for name in ("training", "calibration"):
            if files := tuple(self.files(name)):
                others.setdefault(files, name)  # often the same files: compare once
        for name in others.values():
            check_disjoint(self.documents("evaluation"), self.documents(name), name)
