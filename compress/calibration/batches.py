"""Token windows of a fixed length, drawn from text by seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.errors import DataError
from compress.text import Document

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def sample_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], samples: int, length: int, seed: int
) -> torch.Tensor:
    """``samples`` windows of ``length`` tokens, int64 [samples, length].

    Documents are shuffled by seed, tokenised one by one with an end-of-text token between them (where the tokenizer has
    one) and packed into one stream, of which windows are drawn at random without overlap.

    Raises:
        DataError: the text gives fewer than ``samples`` windows.
    """
    import torch

    generator = random.Random(seed)
    order = list(documents)
    generator.shuffle(order)
    wanted = 4 * samples * length  # a stream four times as long as asked is random enough, whatever the text's size
    stream: list[int] = []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for document in order:
        stream += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(stream) >= wanted:
            break
    slots = len(stream) // length
    if slots < samples:
        raise DataError(
            f"calibration asks for {samples} samples of {length} tokens, the text gives {slots}",
            fix="name more text, or ask for fewer or shorter samples",
        )
    starts = sorted(generator.sample(range(slots), samples))
    return torch.tensor([stream[s * length : (s + 1) * length] for s in starts])
