"""Metrics of causal language models on documents: bits per byte, perplexity, KL divergence and agreement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from compress.data.documents import Document
from compress.data.rendering import beginning, rendered, tokenized
from compress.errors import CompressError, DataError
from compress.evaluation import positions
from compress.evaluation.metrics import values
from compress.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = "compress.evaluation/1"
#: With fewer documents, chunks of them are the unit of resampling.
FEW_DOCUMENTS = 30
#: Number of chunks that few documents are cut into, if there are enough windows.
CHUNKS = 60
#: Most logits (float32) of a batch, and most windows of a batch.
BATCH_VALUES, BATCH_WINDOWS = 1 << 25, 16


@dataclass(frozen=True, slots=True)
class TextScore:
    """Sums over the scored tokens of one document, or of one chunk of it.

    Attributes:
        bytes: UTF-8 bytes of its text.
        tokens: number of scored tokens.
        nll: negative log-likelihood, nats.
        kl: KL(reference ‖ model), nats; None without a reference.
        agree: number of tokens at which both models have the same most likely next token; None without a reference.
        positions: the same sums by position: key ▶ a number for each bin of `positions`, or None without a reference.
    """

    id: str
    bytes: int
    tokens: int
    nll: float
    kl: float | None
    agree: int | None
    positions: Mapping[str, list[Any] | None]


@dataclass(frozen=True)
class Scores:
    """Scores by document or by chunk (``unit``), and the windows that they were measured with."""

    documents: tuple[TextScore, ...]
    unit: str
    window: int
    stride: int
    begins: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values of schema ``compress.evaluation/1``, with the metrics over all documents; NaN stays NaN."""
        return {
            "schema": SCHEMA,
            "unit": self.unit,
            "window": self.window,
            "stride": self.stride,
            "begins_with_bos": self.begins,
            **metrics(self.unit, rows := [asdict(d) for d in self.documents]),
            "positions": positions.by_position(rows),
            "documents": rows,
        }


def metrics(unit: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bytes, tokens and all metrics of `TextScore` rows."""
    sums = {key: sum(row[key] for row in rows) for key in ("bytes", "tokens")}
    return {**sums, **values("evaluation", {"unit": unit, "documents": rows})}


@dataclass(frozen=True)
class _Window:
    """Tokens of one forward pass; the targets from ``first`` on are scored here."""

    document: int
    ids: list[int]  # one more than the model reads: the last is only a target
    first: int
    start: int  # index in the document of the first scored target

    @property
    def tokens(self) -> int:
        """Number of scored targets."""
        return len(self.ids) - 1 - self.first


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    window: int,
    stride: int,
    reference: PreTrainedModel | None = None,
    title: str = "evaluate",
    progress: Progress | None = None,
) -> Scores:
    """Score every token of every document once, with float32 log-probabilities.

    Each document is tokenised by itself, with the tokenizer's beginning-of-text token in front if it has one. A forward pass
    reads up to ``window`` tokens. The next one starts ``stride`` tokens later and scores only tokens not scored yet. If the
    tokenizer puts a beginning-of-text token before texts, every forward pass begins with one, as the model expects. A chat is
    scored as rendered by the tokenizer's template, roles and markers included.

    Args:
        reference: model to compare with, over the shared ids if the vocabularies are padded differently.

    Raises:
        CompressError: the model is not a causal language model, or cannot read ``window`` tokens.
        DataError: no text, tokens that the model does not know, or a chat without a template.
    """
    import torch

    _check(model, window)
    documents = [_as_shown(document, tokenizer) for document in documents]
    begin = tokenizer.bos_token_id
    encoded, edges = _encoded(tokenizer, documents, begin)
    always = beginning(tokenizer)
    windows = [w for i, ids in enumerate(encoded) for w in _windows(i, ids, window, stride, always)]
    if not windows:
        raise DataError("the evaluation text has no token to score")
    embeddings: Any = model.get_input_embeddings()
    highest, size = max(max(ids) for ids in encoded if ids), int(embeddings.weight.shape[0])
    if highest >= size:
        raise DataError(f"the tokenizer gives token {highest}, the model knows {size}", fix="use its own tokenizer")
    sums: list[torch.Tensor] = []
    batch = max(1, min(BATCH_WINDOWS, BATCH_VALUES // (window * size)))
    pad, bins = begin if begin is not None else 0, positions.bin_of(window - 1) + 1
    with torch.inference_mode(), (progress or SilentProgress()).task(title, len(windows), "windows") as task:
        for at in range(0, len(windows), batch):
            part = windows[at : at + batch]
            sums.append(_score(model, reference, part, pad, bins))
            task.advance(len(part), documents[part[-1].document].id)
    scores = _by_unit(documents, windows, edges, torch.cat(sums), paired=reference is not None)
    unit = "chunk" if len(documents) < FEW_DOCUMENTS else "document"
    return Scores(tuple(scores), unit, window, stride, begin is not None)


def _by_unit(
    documents: Sequence[Document],
    windows: Sequence[_Window],
    edges: Sequence[Sequence[int]],
    sums: torch.Tensor,
    *,
    paired: bool,
) -> list[TextScore]:
    """Scores by document, or by chunk of documents if these are few.

    Args:
        edges: of each document, the byte at which the text of each token begins, and its number of bytes.
        sums: NLL, KL and agreement of each window by bin of positions, [windows, bins, 3].
        paired: whether there is a reference, without which KL and agreement are None.
    """
    few = len(documents) < FEW_DOCUMENTS
    per_chunk = max(1, len(windows) // CHUNKS)
    scores = []
    for document, group in groupby(range(len(windows)), key=lambda i: windows[i].document):
        members = list(group)
        pieces = [members[i : i + per_chunk] for i in range(0, len(members), per_chunk)] if few else [members]
        for number, piece in enumerate(pieces):
            name = documents[document].id + (f".{number}" if few else "")
            part = [windows[i] for i in piece]
            scores.append(_text_score(name, part, edges[document], sums[piece].sum(0), paired=paired))
    return scores


def _text_score(
    name: str, windows: Sequence[_Window], edges: Sequence[int], sums: torch.Tensor, *, paired: bool
) -> TextScore:
    """Score of the windows of one row. ``sums``: NLL, KL and agreement by bin of positions, [bins, 3]."""
    tokens, size = [0] * len(sums), [0] * len(sums)
    for window in windows:
        for number, start, end in positions.spans(window.first, len(window.ids) - 1):
            target = window.start + start - window.first
            tokens[number] += end - start
            # the bytes of a first token, which is never a target, count with the second one
            size[number] += edges[target + end - start] - (edges[target] if target > 1 else 0)
    nll, kl, agree = (column.tolist() for column in sums.unbind(1))
    counts = [int(count) for count in agree] if paired else None
    return TextScore(
        id=name,
        bytes=sum(size),
        tokens=sum(tokens),
        nll=sum(nll),
        kl=sum(kl) if paired else None,
        agree=None if counts is None else sum(counts),
        positions={"tokens": tokens, "bytes": size, "nll": nll, "kl": kl if paired else None, "agree": counts},
    )


def _check(model: PreTrainedModel, window: int) -> None:
    config: Any = model.config
    if not model.can_generate() or config.is_encoder_decoder:
        raise CompressError(f"bits per byte needs a causal language model, this is {type(model).__name__}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and window > positions:
        raise CompressError(
            f"a window of {window} tokens is beyond the model's {positions} positions", fix=f"set window to {positions}"
        )


def _as_shown(document: Document, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A chat as rendered, without the beginning-of-text token, which is put before every document later."""
    if document.messages is None:
        return document
    text = rendered(document, tokenizer).removeprefix(str(tokenizer.bos_token or ""))
    return replace(document, text=text, messages=None)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], begin: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each document, with ``begin`` in front if it is given, and its edges.

    Edges are the byte at which the text of each token begins, and after these the number of bytes of the document.
    """
    encoded, edges = [], []
    for document in documents:
        ids, starts = _tokens(tokenizer, document.text)
        at = _bytes_before(document.text)
        encoded.append([*([begin] if begin is not None else []), *ids])
        edges.append([*([0] if begin is not None else []), *(at[start] for start in starts), at[-1]])
    return encoded, edges


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids, and for each the index of its first character in ``text``."""
    if tokenizer.is_fast:
        both = tokenized(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
        return list(both["input_ids"]), [start for start, _ in both["offset_mapping"]]
    ids = list(tokenized(tokenizer, text, add_special_tokens=False)["input_ids"])
    return ids, [len(text) * i // max(len(ids), 1) for i in range(len(ids))]


def _bytes_before(text: str) -> Sequence[int]:
    """Number of UTF-8 bytes before each character, and of the whole text."""
    if text.isascii():
        return range(len(text) + 1)
    return [0, *accumulate(len(character.encode()) for character in text)]


def _windows(document: int, ids: list[int], window: int, stride: int, begin: int | None) -> Iterator[_Window]:
    """Windows of a document. ``begin`` is put before all but the first, which begins with it already."""
    scored, start = 1, 0  # the first token is never a target
    while start < len(ids) - 1:
        lead = [begin] if begin is not None and start else []
        end = min(start + window - len(lead), len(ids) - 1)
        if end >= scored:
            yield _Window(document, lead + ids[start : end + 1], scored - 1 - start + len(lead), scored)
            scored = end + 1
        start = min(start + stride, end)  # no further than the last target, which the next window reads first


def _score(
    model: PreTrainedModel, reference: PreTrainedModel | None, windows: Sequence[_Window], pad: int, bins: int
) -> torch.Tensor:
    """Sums of NLL, KL and agreement over the scored targets by bin of positions, float64 [windows, bins, 3].

    Padding is on the right.
    """
    import torch

    longest = max(len(w.ids) for w in windows)
    ids = torch.full((len(windows), longest), pad)
    counts = torch.zeros(len(windows), longest - 1, dtype=torch.bool)
    for row, w in enumerate(windows):
        ids[row, : len(w.ids)] = torch.tensor(w.ids)
        counts[row, w.first : len(w.ids) - 1] = True
    ids, counts = ids.to(model.device), counts.to(model.device)
    theirs = None if reference is None else _logits(reference, ids)
    scores = torch.where(counts[..., None], compared(_logits(model, ids), theirs, ids[:, 1:]), 0).double()
    sums = torch.zeros(len(windows), bins, 3, dtype=torch.float64)
    for number, start, end in positions.spans(0, longest - 1):
        sums[:, number] = scores[:, start:end].sum(1).cpu()
    return sums


def compared(logits: torch.Tensor, theirs: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """NLL of the targets, KL(reference ‖ model) and agreement, [..., 3], nats.

    Args:
        logits: of the model, float32 [..., vocabulary].
        theirs: of the reference; without it KL and agreement are 0.
        targets: token ids [...].
    """
    import torch
    from torch.nn.functional import log_softmax

    logp = log_softmax(logits, -1)
    nll = -logp.gather(-1, targets[..., None])[..., 0]
    if theirs is None:
        return torch.stack([nll, torch.zeros_like(nll), torch.zeros_like(nll)], -1)
    shared = min(logits.shape[-1], theirs.shape[-1])
    if logits.shape[-1] != shared:
        logp = log_softmax(logits[..., :shared], -1)
    reference_logp = log_softmax(theirs[..., :shared], -1)
    kl = torch.where(reference_logp == -torch.inf, 0, reference_logp.exp() * (reference_logp - logp)).sum(-1)
    agree = logits[..., :shared].argmax(-1) == theirs[..., :shared].argmax(-1)
    return torch.stack([nll, kl, agree.to(nll.dtype)], -1)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    return logits.float()
