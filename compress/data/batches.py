"""Calibration samples: token ids of a fixed length, drawn from text by seed, or given."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.headers import read_header
from compress.data.images import pixels
from compress.data.text import FIELD, Document, beginning, encoded, rendered, tokenized
from compress.errors import DataError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Batches:
    """Samples of token ids.

    Attributes:
        ids: int64 [samples, length].
        mask: bool [samples, length], False for padding, which stands on the right; None where there is none.
        types: int64 [samples, length], which text of a pair a token is of; None where there are no pairs, or the tokenizer
            does not say.
        labels: int64 [samples], classes of labelled texts; None where there are none.
        images: what makes the pixels of samples, by their numbers; ``ids`` are these numbers then, [samples, 1].
        chosen: what each sample is: ``file#document+token`` for a window of packed text (where it begins),
            ``file#document`` for a document by itself, ``file#row`` for given token ids, ``class/file`` for an image.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    chosen: tuple[str, ...] = ()
    types: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    images: Callable[[Sequence[int]], torch.Tensor] | None = None

    @property
    def values(self) -> dict[str, torch.Tensor]:
        """What the model reads, by name, but for the mask."""
        return {"input_ids": self.ids} | ({} if self.types is None else {"token_type_ids": self.types})

    def inputs(self, device: Any) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward."""
        masked = {} if self.mask is None else {"attention_mask": self.mask.long()}
        return {name: value.to(device) for name, value in {**self.values, **masked}.items()}

    def first(self, samples: int) -> Batches:
        """The first so many samples."""
        return self._part(slice(samples))

    def last(self, samples: int) -> Batches:
        """The last so many samples."""
        return self._part(slice(-samples, None))

    def parts(self, tokens: int) -> list[Batches]:
        """So many samples at a time that they hold about ``tokens`` tokens, one sample at least."""
        size = max(1, tokens // self.ids.shape[1])
        return [self._part(slice(i, i + size)) for i in range(0, len(self.ids), size)]

    def at(self, rows: Sequence[int]) -> Batches:
        """The samples of these numbers, in their order."""
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
        )

    def sha256(self) -> str:
        """Of the ids as little-endian int64, row by row, then of the mask's bytes, types and labels, where there are any."""
        whole = hashlib.sha256(self.ids.contiguous().numpy().astype("<i8").tobytes())
        if self.mask is not None:
            whole.update(self.mask.contiguous().numpy().tobytes())
        for numbers in (self.types, self.labels):
            if numbers is not None:
                whole.update(numbers.contiguous().numpy().astype("<i8").tobytes())
        return whole.hexdigest()


def of_images(documents: Sequence[Document], processor: Any, seed: int) -> Batches:
    """All images, in an order drawn by seed; their pixels are read when they are asked for."""
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


def _pixels(files: Sequence[str], processor: Any, rows: Sequence[int]) -> torch.Tensor:
    return pixels([files[row] for row in rows], processor)


def sample_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], samples: int, length: int, seed: int
) -> Batches:
    """``samples`` windows of ``length`` tokens.

    Documents are shuffled by seed, tokenised one by one with an end-of-text token between them (where the tokenizer has
    one) and packed into one stream, of which windows are drawn at random without overlap. Where the tokenizer puts a
    beginning-of-text token before a text, every window begins with one: models that were trained with it read nothing else.

    Raises:
        DataError: the text gives fewer than ``samples`` windows, holds chats that the tokenizer has no template for, or a
            window has no room beside the beginning-of-text token.
    """
    import torch

    generator = random.Random(seed)
    order = list(documents)
    generator.shuffle(order)
    begin, cut = _window(tokenizer, length)
    # a stream four times as long as asked is random enough, whatever the text's size
    stream, begins = _stream(tokenizer, order, 4 * samples * cut, begin)
    slots = len(stream) // cut
    if slots < samples:
        raise DataError(
            f"calibration asks for {samples} samples of {length} tokens, the text gives {slots}",
            fix="name more text, or ask for fewer or shorter samples",
        )
    starts = [slot * cut for slot in sorted(generator.sample(range(slots), samples))]
    return Batches(
        torch.tensor([begin + stream[start : start + cut] for start in starts]),
        chosen=tuple(_places(order, begins, starts)),
    )


def every_window(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], length: int, seed: int) -> Batches:
    """All windows of ``length`` tokens of documents packed as in `sample_windows`, in an order drawn by seed.

    Raises:
        DataError: the text gives no window; otherwise as `sample_windows`.
    """
    import torch

    generator = random.Random(seed)
    order = list(documents)
    generator.shuffle(order)
    begin, cut = _window(tokenizer, length)
    stream, begins = _stream(tokenizer, order, None, begin)
    if len(stream) < cut:
        raise DataError(
            f"training asks for windows of {length} tokens, the text has {len(begin) + len(stream)}",
            fix="name more text, or set a shorter `length`",
        )
    starts = [slot * cut for slot in range(len(stream) // cut)]
    generator.shuffle(starts)
    rows = torch.tensor(stream[: len(starts) * cut]).view(-1, cut)[torch.tensor(starts) // cut]
    rows = torch.cat([torch.tensor(begin, dtype=rows.dtype).expand(len(rows), -1), rows], 1)
    return Batches(rows, chosen=tuple(_places(order, begins, starts)))


def _window(tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[list[int], int]:
    """What a window of ``length`` tokens begins with, and how many tokens of the stream follow. Raises `DataError`."""
    begin = beginning(tokenizer)
    if begin is None:
        return [], length
    if length < 2:
        raise DataError(
            "a sample of 1 token has no room beside the beginning-of-text token", fix="set length to 2 or more"
        )
    return [begin], length - 1


def _stream(
    tokenizer: PreTrainedTokenizerBase, order: Sequence[Document], wanted: int | None, begin: list[int]
) -> tuple[list[int], list[int]]:
    """Tokens of documents one after another, up to the one that completes ``wanted`` tokens; where each document begins.

    What windows ``begin`` with is left out of documents that spell it (chats).
    """
    stream: list[int] = []
    begins: list[int] = []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for document in order:
        begins.append(len(stream))
        text = rendered(document, tokenizer)
        ids = list(tokenized(tokenizer, text, where=document.id, add_special_tokens=False)["input_ids"])
        stream += ids[len(begin) if begin and ids[:1] == begin else 0 :] + end
        if wanted is not None and len(stream) >= wanted:
            break
    return stream, begins


def _places(order: Sequence[Document], begins: Sequence[int], starts: Sequence[int]) -> Iterator[str]:
    from bisect import bisect_right

    for start in starts:
        number = bisect_right(begins, start) - 1
        yield f"{order[number].id}+{start - begins[number]}"


def sample_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], samples: int | None, length: int, seed: int
) -> Batches:
    """``samples`` documents drawn by seed (all of them with None), each by itself as the model reads it: with the tokenizer's
    special tokens, of a pair with both texts; and their labels, where they have some.

    Longer ones are cut to ``length`` tokens, the special ones among them ([CLS] … [SEP] stays whole); shorter ones are padded
    on the right with the padding token (else the end-of-text token, else 0), and masked.

    Raises:
        DataError: there are fewer than ``samples`` documents, chats that the tokenizer has no template for, or no room
            beside the special tokens.
    """
    import torch

    pairs = any(document.pair for document in documents)
    if length <= (special := tokenizer.num_special_tokens_to_add(pair=pairs)):
        raise DataError(
            f"the recipe asks for documents of {length} tokens, and {special} of them are special ones",
            fix=f"set length to {special + 1} or more",
        )
    order = list(documents)
    random.Random(seed).shuffle(order)
    rows: list[list[int]] = []
    kinds: list[list[int]] = []
    chosen, labels = [], []
    for document in order:
        found = encoded(document, tokenizer, length)
        if ids := found["input_ids"]:
            rows.append(ids)
            kinds.append(found.get("token_type_ids", []))
            chosen.append(document.id)
            labels.append(document.label)
        if len(rows) == samples:
            break
    if len(rows) < (samples or 1):
        raise DataError(
            f"the recipe asks for {samples or 1} padded documents, the text has {len(rows)}",
            fix="name more text, ask for fewer samples, or set `document_separator`",
        )
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids_SL = torch.full((len(rows), length), int(padding))
    mask_SL = torch.zeros(len(rows), length, dtype=torch.bool)
    types_SL = torch.zeros_like(ids_SL)
    for row, (ids, types) in enumerate(zip(rows, kinds, strict=True)):
        ids_SL[row, : len(ids)] = torch.tensor(ids)
        mask_SL[row, : len(ids)] = True
        types_SL[row, : len(types)] = torch.tensor(types, dtype=torch.long)
    # zero is what models take by default, and not all of them take types
    classes = [int(label) for label in labels if label is not None]
    return Batches(
        ids_SL,
        mask_SL,
        tuple(chosen),
        types_SL if types_SL.any() else None,
        torch.tensor(classes) if len(classes) == len(rows) else None,
    )


def read_ids(file: str | Path, field: str = FIELD) -> Batches:
    """Token ids of a ``.npy`` or ``.safetensors`` file: integers [samples, length].

    Args:
        field: the tensor to take of a ``.safetensors`` file; while it has the default's name, the only one will do.

    Raises:
        DataError: the file is missing, empty, damaged, lacks the tensor, or holds anything but integers [samples, length].
    """
    path = Path(file)
    try:
        if not path.stat().st_size:
            raise DataError("is empty", where=str(path))
        read = _npy(path) if path.suffix.lower() == ".npy" else _safetensors(path, field)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise DataError(reason, where=str(path)) from None
    return given_ids(read, str(path))


def _npy(path: Path) -> torch.Tensor:
    import numpy
    import torch

    try:
        with path.open("rb") as file:  # numpy.load would take what is no array for a pickle
            array = numpy.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"is no array: {one_line(error)}", where=str(path)) from None
    if array.dtype.kind not in "iu":
        raise DataError(f"holds {array.dtype.name}, not token ids", where=str(path), fix=_FIX)
    return torch.from_numpy(array.astype(numpy.int64))


def _safetensors(path: Path, field: str) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(_tensor_of(sorted(file.keys()), field, path))
    except SafetensorError as error:
        raise DataError(f"is damaged: {one_line(error)}", where=str(path)) from None
    return tensor


def _tensor_of(names: Sequence[str], field: str, path: Path) -> str:
    """The tensor that ``field`` names; while it has the default's name, the only one will do. Raises `DataError`."""
    name = names[0] if field == FIELD and len(names) == 1 else field
    if name not in names:
        raise DataError(
            f"has no tensor `{name}`",
            where=str(path),
            fix=f"set `field` to one of: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}",
        )
    return name


_FIX = "save integers [samples, length]"


def given_ids(ids: torch.Tensor, where: str = "data") -> Batches:
    """Token ids that are used as they are.

    Args:
        ids: integers [samples, length]. where: names them in errors; its last part names the samples.

    Raises:
        DataError: they are not integers, or not of two dimensions, or empty.
    """
    import torch

    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(f"holds {str(ids.dtype).removeprefix('torch.')}, not token ids", where=where, fix=_FIX)
    check_shape(ids.shape, where)
    name = Path(where).name
    return Batches(ids.detach().to("cpu", torch.int64), chosen=tuple(f"{name}#{row}" for row in range(len(ids))))


def check_shape(shape: Sequence[int], where: str) -> None:
    """Token ids are [samples, length], and there is one. Raises `DataError`."""
    if len(shape) != 2:
        raise DataError(f"has the shape {list(shape)}, which is not [samples, length]", where=where, fix=_FIX)
    if not shape[0] * shape[1]:
        raise DataError(f"holds no token: its shape is {list(shape)}", where=where)


def taken(shape: Sequence[int], samples: int | None, length: int | None, where: str) -> tuple[int, int]:
    """How many samples, and tokens of each, are used of ids [samples, length]; None for all. Raises `DataError`."""
    rows, columns = shape
    samples, length = samples or rows, length or columns
    if samples > rows or length > columns:
        raise DataError(
            f"holds {rows} samples of {columns} tokens, {samples} of {length} are asked for",
            where=where,
            fix="leave out `samples` and `length` to use all",
        )
    return samples, length


def ids_in(file: str, field: str) -> tuple[int, ...]:
    """Shape of the token ids of a ``.npy`` or ``.safetensors`` file, by its header alone.

    Raises:
        DataError: as `read_ids`, but for what only the numbers tell. CheckpointError: a damaged ``.safetensors`` file.
    """
    path = Path(file)
    if path.suffix.lower() == ".npy":
        kind, shape = _npy_header(path)
        if kind[-2:-1] not in ("i", "u"):
            raise DataError(f"holds {kind}, not token ids", where=file, fix=_FIX)
        return shape
    entries = read_header(path).entries
    found = entries[_tensor_of(sorted(entries), field, path)]
    if not found.dtype.startswith(("I", "U")):
        raise DataError(f"holds {found.dtype}, not token ids", where=file, fix=_FIX)
    return found.shape


def _npy_header(path: Path) -> tuple[str, tuple[int, ...]]:
    """The type, such as ``<i4``, and the shape of an array: numpy's format 1 to 3."""
    import ast

    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(file.read(2 if start[6:7] == b"\1" else 4), "little")
            header = ast.literal_eval(file.read(min(size, 1 << 16)).decode("latin-1").strip())
        kind, shape = str(header["descr"]), tuple(int(size) for size in header["shape"])
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError):
        raise DataError("is no array: its header cannot be read", where=str(path)) from None
    return kind, shape


def first(batches: Batches, samples: int | None, length: int | None, where: str) -> Batches:
    """The first ``samples`` rows, and of each the first ``length`` tokens; all with None.

    Raises:
        DataError: there are fewer.
    """
    samples, length = taken(batches.ids.shape, samples, length, where)
    mask = None if batches.mask is None else batches.mask[:samples, :length]
    return Batches(batches.ids[:samples, :length].contiguous(), mask, batches.chosen[:samples])


def check_positions(
    length: int | None, positions: int | None, where: str | None = None, name: str = "calibration"
) -> None:
    """Samples of ``length`` tokens fit the model's ``positions``, where both are known. Raises `DataError`."""
    if length is not None and positions is not None and length > positions:
        raise DataError(
            f"{name} samples of {length} tokens are beyond the model's {positions} positions",
            where=where,
            fix=f"set data.{name}.length to {positions}",
        )


def check_vocabulary(batches: Batches, size: int | None, where: str | None = None) -> None:
    """Every id is from 0 up, and below ``size`` where that is known. Raises `DataError` with the first that is not."""
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
