"""Metrics of causal language models on documents: bits per byte, perplexity, KL divergence and agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from compress.architectures.cache import reach
from compress.data.documents import Document
from compress.data.rendering import beginning, rendered, tokenized
from compress.errors import CompressError, DataError
from compress.evaluation import positions
from compress.evaluation.changes import Changes
from compress.evaluation.examples import check_tokens
from compress.evaluation.metrics import values
from compress.evaluation.windows import TokenWindow, batches, bins_of, cut, segments
from compress.models.blocks import record_of
from compress.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.spec.spec import Spec

SCHEMA = "compress.evaluation/1"
#: With fewer documents, chunks of them are the unit of resampling.
FEW_DOCUMENTS = 30
#: Number of chunks that few documents are cut into, if there are enough windows.
CHUNKS = 60
#: Most logits (float32) of a batch, most windows of a batch, and most documents that are streamed side by side.
BATCH_VALUES, BATCH_WINDOWS, BATCH_STREAMS = 1 << 25, 16, 4


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
    """Scores by document or by chunk (``unit``), the windows that they were measured with, and the rows of `Changes`."""

    documents: tuple[TextScore, ...]
    unit: str
    window: int
    stride: int
    begins: bool
    streaming: bool
    changed: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """JSON values of schema ``compress.evaluation/1``, with the metrics over all documents; NaN stays NaN."""
        return {
            "schema": SCHEMA,
            "unit": self.unit,
            "window": self.window,
            "stride": self.stride,
            "begins_with_bos": self.begins,
            "streaming": self.streaming,
            **metrics(self.unit, rows := [asdict(d) for d in self.documents]),
            "positions": positions.by_position(rows),
            "repetitions": None,  # the metric of that name sets them
            "changed": self.changed,
            "documents": rows,
        }


def metrics(unit: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bytes, tokens and all metrics of `TextScore` rows."""
    sums = {key: sum(row[key] for row in rows) for key in ("bytes", "tokens")}
    return {**sums, **values("evaluation", {"unit": unit, "documents": rows})}


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    window: int,
    stride: int,
    streaming: bool = False,
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
        streaming: read documents in segments of ``window`` tokens through the cache, so that every token sees all that the
            model remembers of the document before it.
        reference: model to compare with, over the shared ids if the vocabularies are padded differently.

    Raises:
        CompressError: the model is not a causal language model, cannot read ``window`` tokens, or has no cache to stream with.
        DataError: no text, tokens that the model does not know, or a chat without a template.
    """
    import torch

    from compress.evaluation.scoring import score_streams, score_windows

    check_model(model, window)
    documents = [_as_shown(document, tokenizer) for document in documents]
    begin = tokenizer.bos_token_id
    encoded, edges = encoded_documents(tokenizer, documents, begin)
    if streaming:
        windows = [w for i, ids in enumerate(encoded) for w in segments(i, ids, window)]
    else:
        windows = [w for i, ids in enumerate(encoded) for w in cut(i, ids, window, stride, beginning(tokenizer))]
    if not windows:
        raise DataError("the evaluation text has no token to score")
    check_tokens(model, max(max(ids) for ids in encoded if ids))
    embeddings: Any = model.get_input_embeddings()
    most = BATCH_STREAMS if streaming else BATCH_WINDOWS
    many = max(1, min(most, BATCH_VALUES // (window * int(embeddings.weight.shape[0]))))
    pad = begin if begin is not None else 0
    if not streaming and many > 1 and record_of(model).source != "written":
        many = 1 if _reads_padding(model, windows[:many], pad) else many
    sums = torch.zeros(len(windows), bins_of(windows), 3, dtype=torch.float64)  # nll, kl, agree
    score, changes = score_streams if streaming else score_windows, Changes()
    with torch.inference_mode(), (progress or SilentProgress()).task(title, len(windows), "windows") as task:
        for members in batches(windows, many, streaming=streaming):
            part = [windows[i] for i in members]
            sums[members] = score(model, reference, part, pad, sums.shape[1], changes)
            task.advance(len(part), documents[part[-1].document].id)
    scores = _by_unit(documents, windows, edges, sums, paired=reference is not None)
    unit = "chunk" if len(documents) < FEW_DOCUMENTS else "document"
    changed = changes.rows(documents, tokenizer)
    return Scores(tuple(scores), unit, window, stride, begin is not None, streaming, changed)


def _reads_padding(model: PreTrainedModel, windows: Sequence[TokenWindow], pad: int) -> bool:
    """Whether padding behind a window changes its scores, as where tokens see those after them."""
    import torch

    from compress.evaluation.scoring import score_windows

    shortest, longest = min(windows, key=lambda w: w.reads), max(windows, key=lambda w: w.reads)
    if shortest.reads == longest.reads:
        return False
    bins = bins_of(windows)
    with torch.inference_mode():
        beside = score_windows(model, None, [shortest, longest], pad, bins)[0]
        alone = score_windows(model, None, [shortest], pad, bins)[0]
    return not torch.allclose(beside, alone, rtol=1e-4, atol=1e-4)


def _by_unit(
    documents: Sequence[Document],
    windows: Sequence[TokenWindow],
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
    name: str, windows: Sequence[TokenWindow], edges: Sequence[int], sums: torch.Tensor, *, paired: bool
) -> TextScore:
    """Score of the windows of one row. ``sums``: NLL, KL and agreement by bin of positions, [bins, 3]."""
    tokens, size = [0] * len(sums), [0] * len(sums)
    for window in windows:
        for number, start, end in positions.spans(window.begins + window.first, window.begins + window.reads):
            target = window.start + start - window.begins - window.first
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


def check_streams(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], spec: Spec) -> None:
    """Check that a checkpoint can read every document through its cache. Raises `CompressError`."""
    if (limit := reach(spec)) is None:
        return
    encoded, _ = encoded_documents(tokenizer, documents, tokenizer.bos_token_id)
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]), default=None)
    if longest is not None and (tokens := len(encoded[longest]) - 1) > limit:
        raise CompressError(
            f"has {tokens:,} tokens, the model was trained on {limit:,} positions, and not every block of it forgets what is "
            "far away",
            where=documents[longest].id,
            fix="stream shorter documents, or a model with a window in every block",
        )


def check_longest(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], first: int) -> None:
    """Check that some document has a token to predict at the position ``first``. Raises `DataError`."""
    encoded, _ = encoded_documents(tokenizer, documents, tokenizer.bos_token_id)
    if (longest := max((len(ids) for ids in encoded), default=0)) < first + 2:
        raise DataError(
            f"the longest document of the evaluation has {longest:,} tokens, so none is predicted at position {first:,}",
            fix="give longer documents, or a gate from an earlier position",
        )


def check_model(model: PreTrainedModel, window: int) -> None:
    """Check that a model is a causal language model that reads ``window`` tokens. Raises `CompressError`."""
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


def encoded_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], begin: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of each document, with ``begin`` in front if it is given, and its edges.

    Edges are the byte at which the text of each token begins, and after these the number of bytes of the document.
    """
    encoded, edges = [], []
    for document in (_as_shown(each, tokenizer) for each in documents):
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
