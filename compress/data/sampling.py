"""Documents ▶ samples of token ids, drawn by seed: windows of packed text, or documents by themselves."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from compress.data.batches import Batches
from compress.data.documents import Document
from compress.data.rendering import beginning, encoded, rendered, tokenized
from compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A document with this many characters for each token of the stream is drawn in pieces: tokens have about four.
_LONG = 16


def sample_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], samples: int, length: int, seed: int
) -> Batches:
    """Draw ``samples`` windows of ``length`` tokens.

    Documents are shuffled by seed, tokenised one by one and packed into one stream, with an end-of-text token between them
    (where the tokenizer has one). Windows are drawn from the stream at random without overlap. Where the tokenizer puts a
    beginning-of-text token before a text, every window begins with one: models that were trained with it expect it.

    A text much longer than the stream is cut at ends of lines into pieces of a few windows, which are shuffled among the
    other documents as ``file#index@character``: its rest is not tokenised.

    Raises:
        DataError: the text gives fewer than ``samples`` windows, holds chats that the tokenizer has no template for, or a
            window has no room beside the beginning-of-text token.
    """
    import torch

    generator = random.Random(seed)
    begin, cut = _window(tokenizer, length)
    # a stream four times as long as asked is random enough, whatever the text's size
    wanted = 4 * samples * cut
    order = [piece for document in documents for piece in _pieces(document, _LONG * cut, _LONG * wanted)]
    generator.shuffle(order)
    stream, begins = _stream(tokenizer, order, wanted, begin)
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
    """Return all windows of ``length`` tokens of documents packed as in `sample_windows`, in an order drawn by seed.

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
    """The ids that a window of ``length`` tokens begins with, and the number of tokens after them. Raises `DataError`."""
    begin = beginning(tokenizer)
    if begin is None:
        return [], length
    if length < 2:
        raise DataError(
            "a sample of 1 token has no room beside the beginning-of-text token", fix="set length to 2 or more"
        )
    return [begin], length - 1


def _pieces(document: Document, size: int, longest: int) -> Iterator[Document]:
    """A document, or where its text has more than ``longest`` characters its lines, in pieces of ``size`` or a little more."""
    if document.messages is not None or len(document.text) <= longest:
        yield document
        return
    start = 0
    while start < len(document.text):
        end = document.text.find("\n", start + size, start + 2 * size) + 1 or start + size
        yield Document(f"{document.id}@{start}", document.text[start:end])
        start = end


def _stream(
    tokenizer: PreTrainedTokenizerBase, order: Sequence[Document], wanted: int | None, begin: list[int]
) -> tuple[list[int], list[int]]:
    """The stream of tokens of documents, up to the one that completes ``wanted`` tokens; and where each document begins.

    Documents that begin with ``begin`` themselves (chats) lose it: windows add it.
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
    """Draw ``samples`` documents (all with None), each by itself as the model reads it, with labels where they have some.

    Each has the tokenizer's special tokens, and a pair both of its texts. Longer ones are cut to ``length`` tokens, the
    special ones among them ([CLS] … [SEP] stays whole). Shorter ones are padded on the right with the padding token (else the
    end-of-text token, else 0), and masked.

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
        inputs = encoded(document, tokenizer, length)
        if ids := inputs["input_ids"]:
            rows.append(ids)
            kinds.append(inputs.get("token_type_ids", []))
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
