"""Samples of token ids, or of images, as passes and training read them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from compress.data.documents import Document
from compress.data.images import pixels
from compress.errors import DataError

if TYPE_CHECKING:
    import torch


class Features:
    """Features of sounds, or pixels, made when samples are asked for; looks like a tensor with samples first.

    Attributes:
        name: of the model's argument.
    """

    def __init__(self, name: str, files: Sequence[str], read: Callable[[Sequence[str]], torch.Tensor]) -> None:
        self.name, self._files, self._read = name, files, read

    @cached_property
    def shape(self) -> torch.Size:
        """Shape, samples first."""
        import torch

        return torch.Size((len(self._files), *self._read(self._files[:1]).shape[1:]))

    def numel(self) -> int:
        """Number of values."""
        return self.shape.numel()

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, rows: Sequence[int]) -> torch.Tensor:
        return self._read([self._files[row] for row in rows])

    def part(self, rows: slice | torch.Tensor) -> Features:
        """Those samples."""
        files = self._files[rows] if isinstance(rows, slice) else [self._files[row] for row in rows.tolist()]
        return Features(self.name, files, self._read)

    def to(self, device: Any) -> torch.Tensor:
        """All samples, on a device."""
        return self._read(self._files).to(device)


@dataclass(frozen=True, eq=False)
class Batches:
    """Samples of token ids.

    Attributes:
        ids: int64 [samples, length].
        mask: bool [samples, length], False for padding, which is on the right; None where there is none.
        types: int64 [samples, length], which text of a pair a token belongs to; None where there are no pairs, or the
            tokenizer does not tell.
        labels: int64 [samples], classes of labelled texts; None where there are none.
        images: a function from numbers of samples to their pixels; ``ids`` are then these numbers, [samples, 1].
        targets: int64 [samples, target length], what the decoder of an encoder-decoder reads; None for other models.
        target_mask: bool, as ``mask``, of the targets; its length is not that of ``mask``.
        features: what the model reads of sounds or images in place of ``ids``, which are then the samples' numbers.
        given: all of the model's inputs by name, but for the mask; None where they follow from the others.
        chosen: the source of each sample: ``file#document+token`` for a window of packed text (where it begins),
            ``file#document`` for a document by itself, ``file#row`` for given token ids, ``class/file`` for an image.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    chosen: tuple[str, ...] = ()
    types: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    images: Callable[[Sequence[int]], torch.Tensor] | None = None
    targets: torch.Tensor | None = None
    target_mask: torch.Tensor | None = None
    features: Features | None = None
    given: Mapping[str, torch.Tensor] | None = None

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """The model's inputs by name, without the mask."""
        if self.given is not None:
            return dict(self.given)
        read: dict[str, Any] = {"input_ids": self.ids} if self.features is None else {self.features.name: self.features}
        read |= {} if self.types is None else {"token_type_ids": self.types}
        return read | ({} if self.targets is None else {"decoder_input_ids": self.targets})

    def inputs(self, device: Any) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward, on a device."""
        masked = {} if self.mask is None else {"attention_mask": self.mask.long()}
        return {name: value.to(device) for name, value in {**self.values, **masked}.items()}

    def first(self, samples: int) -> Batches:
        """The first ``samples`` samples."""
        return self._part(slice(samples))

    def last(self, samples: int) -> Batches:
        """The last ``samples`` samples."""
        return self._part(slice(-samples, None))

    def parts(self, tokens: int) -> list[Batches]:
        """Consecutive parts of about ``tokens`` tokens, at least one sample each."""
        size = max(1, tokens // self.ids.shape[1])
        return [self._part(slice(i, i + size)) for i in range(0, len(self.ids), size)]

    def at(self, rows: Sequence[int]) -> Batches:
        """The samples with these numbers, in this order."""
        import torch

        return replace(self._part(torch.tensor(rows)), chosen=tuple(self.chosen[row] for row in rows if self.chosen))

    def _part(self, rows: slice | torch.Tensor) -> Batches:
        return replace(
            self,
            ids=self.ids[rows],
            mask=None if self.mask is None else self.mask[rows],
            types=None if self.types is None else self.types[rows],
            labels=None if self.labels is None else self.labels[rows],
            chosen=self.chosen[rows] if isinstance(rows, slice) else (),
            targets=None if self.targets is None else self.targets[rows],
            target_mask=None if self.target_mask is None else self.target_mask[rows],
            features=None if self.features is None else self.features.part(rows),
            given=None if self.given is None else {name: value[rows] for name, value in self.given.items()},
        )

    def sha256(self) -> str:
        """Digest of the ids as little-endian int64, row by row, then of masks, types, labels, targets and given inputs."""
        import torch

        whole = hashlib.sha256(self.ids.contiguous().numpy().astype("<i8").tobytes())
        for mask in (self.mask, self.target_mask):
            if mask is not None:
                whole.update(mask.contiguous().numpy().tobytes())
        for numbers in (self.types, self.labels, self.targets):
            if numbers is not None:
                whole.update(numbers.contiguous().numpy().astype("<i8").tobytes())
        for name, value in sorted((self.given or {}).items()):
            whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            whole.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()


def of_images(documents: Sequence[Document], processor: Any, seed: int) -> Batches:
    """All images, in an order drawn by seed; pixels are read on demand."""
    import torch

    order = list(documents)
    random.Random(seed).shuffle(order)
    files = [str(document.image) for document in order]
    return Batches(
        torch.arange(len(order))[:, None],
        chosen=tuple(document.id for document in order),
        labels=torch.tensor([document.label for document in order], dtype=torch.long),
        images=partial(_pixels, files, processor),  # no lambda: it goes to other processes
    )


def of_pictures(documents: Sequence[Document], processor: Any, samples: int | None, seed: int) -> Batches:
    """``samples`` images (all with None), drawn by seed, for calibration. Raises `DataError` where there are fewer."""
    drawn = of_images(documents, processor, seed)
    if len(drawn.ids) < (samples or 1):
        raise DataError(f"the recipe asks for {samples} samples, the folder has {len(drawn.ids)} images")
    files = {document.id: str(document.image) for document in documents}
    read = Features("pixel_values", [files[id_] for id_ in drawn.chosen], partial(pixels, processor=processor))
    return replace(drawn, images=None, features=read).first(samples or len(drawn.ids))


def _pixels(files: Sequence[str], processor: Any, rows: Sequence[int]) -> torch.Tensor:
    return pixels([files[row] for row in rows], processor)


def used_shape(shape: Sequence[int], samples: int | None, length: int | None, where: str) -> tuple[int, int]:
    """Number of samples and of tokens per sample to use, of ids with this shape; None means all. Raises `DataError`."""
    rows, columns = shape
    samples, length = samples or rows, length or columns
    if samples > rows or length > columns:
        raise DataError(
            f"holds {rows} samples of {columns} tokens, {samples} of {length} are asked for",
            where=where,
            fix="leave out `samples` and `length` to use all",
        )
    return samples, length


def first(batches: Batches, samples: int | None, length: int | None, where: str) -> Batches:
    """The first ``samples`` samples, cut to their first ``length`` tokens; None means all.

    Raises:
        DataError: there are fewer.
    """
    samples, length = used_shape(batches.ids.shape, samples, length, where)
    mask = None if batches.mask is None else batches.mask[:samples, :length]
    return Batches(batches.ids[:samples, :length].contiguous(), mask, batches.chosen[:samples])


def check_positions(
    length: int | None, positions: int | None, where: str | None = None, name: str = "calibration"
) -> None:
    """Raise `DataError` where samples of ``length`` tokens exceed the model's ``positions``; None is unknown and passes."""
    if length is not None and positions is not None and length > positions:
        raise DataError(
            f"{name} samples of {length} tokens are beyond the model's {positions} positions",
            where=where,
            fix=f"set data.{name}.length to {positions}",
        )


def check_vocabulary(batches: Batches, size: int | None, where: str | None = None) -> None:
    """Raise `DataError` naming the first id that is negative, or not below ``size`` where that is known."""
    wrong = batches.ids < 0
    if size is not None:
        wrong |= batches.ids >= size
    if not wrong.any():
        return
    row, column = wrong.nonzero()[0].tolist()
    known = "" if size is None else f", the model knows 0 to {size - 1}"
    raise DataError(
        f"{batches.chosen[row]} has token {int(batches.ids[row, column])} at {column}{known}",
        where=where,
        fix="use the tokenizer that belongs to the model",
    )
