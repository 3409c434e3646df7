"""Predictions of teachers for training samples, on disk.

Per token a shard holds the k likeliest ids, their log-probabilities and the mass of all others. The others count as one
bucket, so the loss is a divergence; renormalising the k would bias it (Sparse Logit Sampling, arXiv 2503.16870).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import DataError, one_line
from compress.files import is_temporary, replacing, write_atomically
from compress.training.objective import Batch, Signal

#: Samples per shard.
SHARD = 256
FORMAT = 1
_KEY = "teacher-cache.json"


@dataclass
class TeacherCache:
    """A folder of shards. Samples are numbered in the order of the training data.

    Attributes:
        k: ids per token.
        vocabulary: number of ids that student and teachers share.
    """

    folder: Path
    k: int
    vocabulary: int
    _open: dict[int, tuple[Any, list[int]]] = field(default_factory=dict)

    def prepare(self, key: Mapping[str, Any]) -> None:
        """Make the folder, or check that it has this key. Raises `DataError`.

        Args:
            key: everything that the contents depend on, JSON values.
        """
        path = self.folder / _KEY
        wanted = {"format": FORMAT, "k": self.k, **key}
        if path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"is not a teacher cache: {error}", where=str(path)) from None
            if other := [
                name for name, value in wanted.items() if not isinstance(stored, dict) or stored.get(name) != value
            ]:
                raise DataError(
                    f"holds predictions of another teacher, or for other samples: its {other[0]} differs",
                    where=str(self.folder),
                    fix="name another folder in `teacher_cache`, or remove this one",
                )
            return
        if self.folder.exists() and not all(is_temporary(file) for file in self.folder.iterdir()):
            raise DataError("is a folder with other files, not a teacher cache", where=str(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(wanted, indent=1).encode())

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Missing shards that these samples need, in order."""
        return sorted(s for s in {row // SHARD for row in rows} if not self._path(s).exists())

    def write(self, shard: int, predictions: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write a shard: for each of its samples, in order, ids [n, k] and log-probabilities [n, k + 1]."""
        narrow = torch.uint16 if self.vocabulary <= 1 << 16 else torch.int32
        ends = torch.tensor([0, *(len(ids) for ids, _ in predictions)]).cumsum(0)
        tensors = {
            "ids": torch.cat([ids for ids, _ in predictions]).cpu().to(narrow),
            # half precision holds nothing below; exp of it is 0
            "log_probabilities": torch.cat([values for _, values in predictions]).cpu().clamp_min(-6e4).half(),
            "ends": ends,
        }
        with replacing(self._path(shard)) as temp:  # runs may fill the same cache
            save_file(tensors, temp)

    def read(self, row: int) -> tuple[Tensor, Tensor]:
        """Ids int64 [n, k] and log-probabilities float32 [n, k + 1] of a sample. Raises `DataError`."""
        shard, place = row // SHARD, row % SHARD
        path = self._path(shard)
        try:
            if shard not in self._open:
                opened: Any = safe_open(path, framework="pt")
                file = opened.__enter__()
                self._open[shard] = (file, file.get_tensor("ends").tolist())
            file, ends = self._open[shard]
            start, stop = ends[place], ends[place + 1]
            ids, values = (file.get_slice(name)[start:stop] for name in ("ids", "log_probabilities"))
        except (SafetensorError, OSError, IndexError) as error:
            raise DataError(
                f"is damaged: {one_line(error)}", where=str(path), fix="remove it; it is made anew"
            ) from None
        return ids.long(), values.float()

    def __call__(self, batch: Batch) -> Signal:
        """The teachers' predictions for the samples of a batch."""
        stored = [self.read(row) for row in batch.rows.tolist() if row >= 0]
        device = batch.predict.device
        ids = torch.cat([ids for ids, _ in stored]).to(device) if stored else torch.zeros(0, self.k, dtype=torch.long)
        values = torch.cat([values for _, values in stored]).to(device) if stored else torch.zeros(0, self.k + 1)
        assert len(ids) == int(batch.predict.sum())

        def distribution(part: slice) -> tuple[Tensor, Tensor]:
            # half precision leaves sums a little off 1
            return values[part].log_softmax(-1), ids[part]

        return Signal(distribution)

    def _path(self, shard: int) -> Path:
        return self.folder / f"teacher-{shard:05d}.safetensors"
