"""Metrics of masked language models at randomly masked tokens: perplexity, KL divergence and agreement."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.data.documents import Document
from compress.data.rendering import rendered, tokenized
from compress.errors import CompressError, DataError
from compress.evaluation.examples import Examples, check_tokens, longest_text, outputs
from compress.evaluation.language import BATCH_VALUES, FEW_DOCUMENTS
from compress.evaluation.metrics import values
from compress.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = "compress.masked/1"
#: Fraction of tokens that is masked (BERT, arXiv 1810.04805).
SHARE = 0.15


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens of one forward pass, special ones included, and the positions that are masked."""

    document: int
    ids: list[int]
    masked: list[int]


def score_masked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    window: int,
    reference: PreTrainedModel | None = None,
    title: str = "evaluate",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Mask `SHARE` of each window's tokens by the mask token and score the predictions there, in float32.

    Each document is cut into windows of up to ``window`` tokens, each with the tokenizer's special tokens, which are never
    masked. The masked positions depend only on the document's id and the number of the window, so every model is asked the same
    ones. Perplexity is over the masked tokens, as in transformers' run_mlm.py.

    Returns:
        JSON values of schema ``compress.masked/1``. With fewer than 30 documents the unit is the window (``chunk``).

    Raises:
        CompressError: the model cannot read ``window`` tokens.
        DataError: no text, or the tokenizer has no mask token.
    """
    import torch

    from compress.evaluation.scoring import compared

    if window > (limit := longest_text(model, tokenizer) or window):
        raise CompressError(
            f"a window of {window} tokens is beyond the {limit} that model and tokenizer take",
            fix=f"set window to {limit}",
        )
    windows = _windows(tokenizer, documents, window)
    check_tokens(model, max(max(w.ids) for w in windows))
    mask: Any = tokenizer.mask_token_id
    rows = tuple({"input_ids": _hidden(w, mask), "attention_mask": [1] * len(w.ids)} for w in windows)
    texts = Examples(rows, 0, model.config.pad_token_id)
    sums = torch.zeros(len(windows), 3, dtype=torch.float64)  # nll, kl, agree
    embeddings: Any = model.get_input_embeddings()
    fitting = BATCH_VALUES // int(embeddings.weight.shape[0])
    with texts.each(progress or SilentProgress(), title, fitting) as batches:
        for batch, inputs in batches:
            places = torch.tensor([(row, at) for row, i in enumerate(batch) for at in windows[i].masked])
            truth = torch.tensor([windows[i].ids[at] for i in batch for at in windows[i].masked])
            logits, theirs = _at(model, inputs, places), None if reference is None else _at(reference, inputs, places)
            measured = compared(logits, theirs, truth.to(logits.device))
            sums.index_add_(0, torch.tensor(batch)[places[:, 0]], measured.double().cpu())
    scores = _by_unit(documents, windows, sums, paired=reference is not None)
    unit = "chunk" if len(documents) < FEW_DOCUMENTS else "document"
    return {
        "schema": SCHEMA,
        "unit": unit,
        "window": window,
        "share": SHARE,
        "tokens": sum(row["tokens"] for row in scores),
        **values("masked", {"unit": unit, "documents": scores}),
        "documents": scores,
    }


def _by_unit(
    documents: Sequence[Document], windows: Sequence[_Window], sums: torch.Tensor, *, paired: bool
) -> list[dict[str, Any]]:
    """Rows by document, or by window if documents are few.

    Args:
        sums: NLL, KL and agreement of each window, [windows, 3].
        paired: whether there is a reference, without which KL and agreement are None.
    """
    few = len(documents) < FEW_DOCUMENTS
    units: dict[str, list[int]] = {}
    counts = [0] * len(documents)
    for i, w in enumerate(windows):
        name = documents[w.document].id
        units.setdefault(f"{name}.{counts[w.document]}" if few else name, []).append(i)
        counts[w.document] += 1
    scores = []
    for name, members in units.items():
        nll, kl, agree = sums[members].sum(0).tolist()
        scores.append(
            {
                "id": name,
                "tokens": sum(len(windows[i].masked) for i in members),
                "nll": nll,
                "kl": kl if paired else None,
                "agree": int(agree) if paired else None,
            }
        )
    return scores


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DataError` if a tokenizer has no mask token or cannot cut a text into windows."""
    if tokenizer.mask_token_id is None:
        raise DataError("the tokenizer has no mask token, which masked language modelling needs")
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer cannot cut a text into windows", fix="save it as a fast one, with tokenizer.json"
        )


def _windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], window: int) -> list[_Window]:
    check_tokenizer(tokenizer)
    windows = []
    for number, document in enumerate(documents):
        parts = tokenized(
            tokenizer,
            rendered(document, tokenizer),
            where=document.id,
            truncation=True,
            max_length=window,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        for part, (ids, special) in enumerate(zip(parts["input_ids"], parts["special_tokens_mask"], strict=True)):
            candidates = [at for at, one in enumerate(special) if not one]
            if candidates:
                count = max(1, round(SHARE * len(candidates)))
                generator = random.Random(f"{document.id}.{part}")
                windows.append(_Window(number, ids, sorted(generator.sample(candidates, count))))
    if not windows:
        raise DataError("the evaluation text has no token to score")
    return windows


def _hidden(window: _Window, mask: int) -> list[int]:
    hidden = list(window.ids)
    for at in window.masked:
        hidden[at] = mask
    return hidden


def _at(model: Any, inputs: dict[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Logits [places, vocabulary], float32."""
    logits: torch.Tensor = outputs(model, inputs).logits
    rows, at = places.to(logits.device).T
    return logits[rows, at].float()
