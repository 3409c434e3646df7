"""Documents ▶ samples for encoder-decoders: the ids of a source, and those that the decoder reads."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.data.batches import Batches
from compress.data.documents import Document
from compress.data.rendering import tokenized
from compress.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def start_token(*configs: Mapping[str, Any]) -> int:
    """Id of the token that a decoder begins with, by the first config that names one; 0 where none does."""
    for key in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in configs:
            if isinstance(value := config.get(key), int):
                return value
    return 0


def with_targets(windows: Batches, start: int) -> Batches:
    """Windows of text that are both source and target: the decoder reads the start token, then all but the last."""
    import torch

    first = torch.full_like(windows.ids[:, :1], start)
    return replace(windows, targets=torch.cat([first, windows.ids[:, :-1]], 1))


def sample_pairs(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    samples: int | None,
    length: int,
    seed: int,
    start: int,
) -> Batches:
    """Draw ``samples`` documents (all with None), each with a source and a target of at most ``length`` tokens.

    A pair of texts has both; a chat's last answer is the target of the messages before it; a plain text is both. The decoder
    reads the start token, then all of the target but its last token. Shorter ones are padded on the right and masked.

    Raises:
        DataError: there are fewer than ``samples`` documents with a source and a target.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    sources: list[list[int]] = []
    targets: list[list[int]] = []
    chosen: list[str] = []
    for document in order:
        source, target = _texts(document)
        cut = {"truncation": True, "max_length": length}
        ids = list(tokenized(tokenizer, source, where=document.id, **cut)["input_ids"])
        if ids:
            sources.append(ids)
            targets.append(decoder_ids(tokenizer, target, start, length, document.id))
            chosen.append(document.id)
        if len(chosen) == samples:
            break
    if len(chosen) < (samples or 1):
        raise DataError(
            f"the recipe asks for {samples or 1} pairs of texts, the data has {len(chosen)}",
            fix="name more text, or ask for fewer samples",
        )
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    source_ids, mask = padded(sources, int(padding))
    uneven = mask is not None or len({*map(len, targets)}) > 1
    read, target_mask = padded(targets, int(padding), other_than=source_ids.shape[1] if uneven else None)
    return Batches(source_ids, mask, tuple(chosen), targets=read, target_mask=target_mask)


def decoder_ids(tokenizer: Any, target: str, start: int, length: int, where: str) -> list[int]:
    """The ids that a decoder reads while it writes a target: the start token, then all but the last."""
    options = {"text_target": target, "truncation": True, "max_length": length}
    ids = list(tokenized(tokenizer, where=where, **options)["input_ids"])
    return (ids if ids[:1] == [start] else [start, *ids])[:-1] or [start]


def padded(
    rows: Sequence[Sequence[int]], padding: int, other_than: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids [samples, length] and which of them count; None for all.

    Args:
        other_than: a length that the result must not have: the other text has it, and one of the two is padded.
    """
    import torch

    length = max(map(len, rows))
    if length == other_than:
        length += 1
    ids = torch.full((len(rows), length), padding)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = True
    return ids, None if mask.all() else mask


def _texts(document: Document) -> tuple[str, str]:
    """The source and the target of a document."""
    if document.pair is not None:
        return document.pair
    if document.messages is None:
        return document.text, document.text
    roles = [message["role"] for message in document.messages]
    if "assistant" not in roles[1:]:
        raise DataError("is a chat without an answer, which is to be the target", where=document.id)
    last = len(roles) - 1 - roles[::-1].index("assistant")
    said = [str(message["content"] or "") for message in document.messages]
    return "\n".join(said[:last]), said[last]
