"""The tokens at which a causal language model's prediction differs most from the original's, with their context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.data.documents import Document
from compress.evaluation.windows import TokenWindow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

#: Tokens that are kept, tokens of their context, and characters of it.
MOST, CONTEXT, CHARACTERS = 12, 24, 80


@dataclass(frozen=True, slots=True)
class _Change:
    """One token: KL(reference ‖ model), its document and index there, and the ids before it.

    ``before``, ``after``: the likeliest id by the reference and by the model, its probability, and that of the true id.
    """

    kl: float
    document: int
    index: int
    context: list[int]
    true: int
    before: tuple[int, float, float]
    after: tuple[int, float, float]


class Changes:
    """Collects those with the largest divergence, batch by batch."""

    def __init__(self) -> None:
        self._kept: list[_Change] = []

    def add(
        self,
        windows: Sequence[TokenWindow],
        ids: torch.Tensor,
        kl: torch.Tensor,
        ours: torch.Tensor,
        theirs: torch.Tensor,
    ) -> None:
        """Look at the scored tokens of a batch.

        Args:
            ids: [windows, tokens + 1]. kl: of each scored target, 0 elsewhere, [windows, tokens].
            ours, theirs: logits of the model and of the reference, [windows, tokens, vocabulary].
        """
        values, places = kl.flatten().topk(min(MOST, kl.numel()))
        least = self._kept[-1].kl if len(self._kept) == MOST else 0.0
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if not least < value < float("inf"):  # False for NaN
                continue
            row, at = divmod(place, kl.shape[1])
            window, true = windows[row], int(ids[row, at + 1])
            index = window.start + at - window.first
            context = ids[row, max(0, at + 1 - CONTEXT) : at + 1].tolist()
            shared = min(ours.shape[-1], theirs.shape[-1])
            before, after = (_likeliest(logits[row, at, :shared], true) for logits in (theirs, ours))
            self._kept.append(_Change(value, window.document, index, context, true, before, after))
        self._kept = sorted(self._kept, key=lambda change: (-change.kl, change.document, change.index))[:MOST]

    def rows(self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """JSON values, the largest divergence first."""

        def side(prediction: tuple[int, float, float]) -> dict[str, Any]:
            likeliest, probability, of_true = prediction
            return {"text": tokenizer.decode([likeliest]), "probability": probability, "of_true": of_true}

        return [
            {
                "document": documents[change.document].id,
                "token": change.index,
                "context": str(tokenizer.decode(change.context))[-CHARACTERS:],
                "text": tokenizer.decode([change.true]),
                "kl": change.kl,
                "before": side(change.before),
                "after": side(change.after),
            }
            for change in self._kept
        ]


def _likeliest(logits: torch.Tensor, true: int) -> tuple[int, float, float]:
    """The likeliest id, its probability, and that of the true id (0 outside the shared vocabulary)."""
    probabilities = logits.softmax(-1)
    best = int(probabilities.argmax())
    return best, float(probabilities[best]), float(probabilities[true]) if true < len(probabilities) else 0.0
