"""Losses of causal language models over windows of tokens, and over segments that are read through the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import log_softmax

from compress.errors import CompressError
from compress.evaluation import positions
from compress.evaluation.windows import TokenWindow
from compress.models.classes import arguments_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.evaluation.changes import Changes

#: Most logits that are compared at once.
PIECE = 1 << 26
#: Names that caches have among the arguments of models and in their outputs.
_CACHES = frozenset({"cache", "past_key_values"})


def score_windows(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    windows: Sequence[TokenWindow],
    pad: int,
    bins: int,
    changes: Changes | None = None,
) -> torch.Tensor:
    """Sums of NLL, KL and agreement over the scored targets by bin of positions, float64 [windows, bins, 3].

    All windows are one batch, padded on the right.

    Args:
        reference: model to compare with; without it KL and agreement are 0.
        changes: collects the tokens that differ most from the reference's predictions.
    """
    ids, counts = (tensor.to(model.device) for tensor in _padded(windows, pad))
    theirs = None if reference is None else logits_of(reference, ids[:, :-1])
    scores = _scored(windows, ids, counts, logits_of(model, ids[:, :-1]), theirs, changes)
    return _by_bin(scores, 0, bins)


def _scored(
    windows: Sequence[TokenWindow],
    ids: torch.Tensor,
    counts: torch.Tensor,
    ours: torch.Tensor,
    theirs: torch.Tensor | None,
    changes: Changes | None,
) -> torch.Tensor:
    """NLL, KL and agreement of each target, 0 where it is not scored, [windows, tokens, 3]."""
    scores = torch.where(counts[..., None], compared(ours, theirs, ids[:, 1:]), 0)
    if theirs is not None and changes is not None:
        changes.add(windows, ids, scores[..., 1], ours, theirs)
    return scores


def score_streams(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    windows: Sequence[TokenWindow],
    pad: int,
    bins: int,
    changes: Changes | None = None,
) -> torch.Tensor:
    """As `score_windows`, of documents that are read segment by segment through the cache.

    Args:
        windows: all segments of some documents, document by document, equally many of each.

    Raises:
        CompressError: a model has no cache.
    """
    rows = [list(group) for _, group in groupby(range(len(windows)), key=lambda i: windows[i].document)]
    read, read_reference = Stream(model), None if reference is None else Stream(reference)
    sums = torch.zeros(len(windows), bins, 3, dtype=torch.float64)
    for members in zip(*rows, strict=True):
        part = [windows[i] for i in members]
        ids, counts = (tensor.to(model.device) for tensor in _padded(part, pad))
        theirs = None if read_reference is None else read_reference(ids[:, :-1])
        scores = _scored(part, ids, counts, read(ids[:, :-1]), theirs, changes)
        sums[list(members)] = _by_bin(scores, part[0].begins, bins)
    return sums


class Stream:
    """Reads texts in segments: each call reads the next tokens [texts, tokens] with the cache of those before."""

    def __init__(self, model: Any) -> None:
        """A stream of a model. Raises `CompressError` if it has no cache."""
        self._model = model
        self._cached: dict[str, Any] = {}
        self._name = min(arguments_of(model) & _CACHES, default="")
        if not self._name:
            raise self._refusal()

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the next token after each of ``ids``, float32 [texts, tokens, vocabulary]."""
        output = self._model(input_ids=ids, use_cache=True, **self._cached)
        if (cache := getattr(output, self._name, None)) is None:
            raise self._refusal()
        self._cached = {self._name: cache}
        logits: torch.Tensor = output.logits.float()
        return logits

    def _refusal(self) -> CompressError:
        name = type(self._model).__name__
        return CompressError(f"{name} has no cache to stream text through", fix="leave out `streaming`")


def _padded(windows: Sequence[TokenWindow], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [windows, tokens + 1], padded on the right, and which targets are scored, bool [windows, tokens]."""
    longest = max(w.reads for w in windows)
    ids = torch.full((len(windows), longest + 1), pad)
    counts = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, w in enumerate(windows):
        ids[row, : len(w.ids)] = torch.tensor(w.ids)
        counts[row, w.first : w.reads] = True
    return ids, counts


def _by_bin(scores: torch.Tensor, begins: int, bins: int) -> torch.Tensor:
    """Sums by bin, float64 [windows, bins, 3], of scores [windows, tokens, 3], of which the first is at position ``begins``."""
    sums = torch.zeros(len(scores), bins, 3, dtype=torch.float64)
    for number, start, end in positions.spans(begins, begins + scores.shape[1]):
        sums[:, number] = scores[:, start - begins : end - begins].double().sum(1).cpu()
    return sums


def compared(logits: torch.Tensor, theirs: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """NLL of the targets, KL(reference ‖ model) and agreement, [..., 3], nats.

    Args:
        logits: of the model, float32 [..., vocabulary].
        theirs: of the reference; without it KL and agreement are 0.
        targets: token ids [...].
    """
    # a long window has gigabytes of logits, and each step below makes as many again
    pieces = -(-logits.numel() // PIECE)
    if pieces > 1 and targets.ndim:
        others = [None] * pieces if theirs is None else theirs.chunk(pieces, -2)
        parts = zip(logits.chunk(pieces, -2), others, targets.chunk(pieces, -1), strict=False)
        return torch.cat([_compared(*part) for part in parts], -2)
    return _compared(logits, theirs, targets)


def _compared(logits: torch.Tensor, theirs: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
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


def logits_of(model: Any, ids: torch.Tensor, last: int | None = None) -> torch.Tensor:
    """Logits of the next token after each of ``ids``, or after the ``last`` of them, float32 [texts, tokens, vocabulary]."""
    # models that can leave out the other logits save most of the memory of a long text
    few = {"logits_to_keep": last} if last is not None and "logits_to_keep" in arguments_of(model) else {}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **few).logits
    return (logits if last is None else logits[:, -last:]).float()
