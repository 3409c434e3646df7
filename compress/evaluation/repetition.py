"""Loss of a causal language model on a passage that it has read before, at a distance.

The evaluation text is one stream of tokens. A sample is a passage, the text that follows it, and the passage again: the model
reads d tokens of the stream and then the first of them once more. A head that sees d tokens back finds what came next there
(induction: arXiv 2209.11895); windows lose it, at little cost to the loss on other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.data.documents import Document
from compress.errors import DataError
from compress.evaluation.examples import check_tokens
from compress.evaluation.language import BATCH_VALUES, check_model, encoded_documents
from compress.evaluation.repetition_settings import RepetitionSettings
from compress.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Passages:
    """Passages of a stream of tokens, each with the text that follows it.

    Attributes:
        lead: tokens before every sample: the beginning of text, if the tokenizer has one.
        starts: index in the stream at which each passage begins. length: tokens of each.
    """

    stream: list[int]
    lead: list[int]
    starts: tuple[int, ...]
    length: int
    distances: tuple[int, ...]

    def sample(self, number: int, distance: int) -> list[int]:
        """The passage, other text, and from ``distance`` on the passage again; at 0 the passage alone."""
        start = self.starts[number]
        return [*self.lead, *self.stream[start : start + distance], *self.stream[start : start + self.length]]


def passages(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], settings: RepetitionSettings, window: int
) -> Passages:
    """The passages of an evaluation, spread evenly over the text without overlap, the same ones for every distance.

    Raises:
        DataError: the text is too short.
    """
    length, distances = settings.fitted(window)
    begin = tokenizer.bos_token_id
    stream = [token for ids in encoded_documents(tokenizer, documents, None)[0] for token in ids]
    needed = distances[-1] + (settings.samples - 1) * length
    if len(stream) < needed:
        raise DataError(
            f"the evaluation text has {len(stream):,} tokens, and {settings.samples} passages of {length} that come again "
            f"after {distances[-1]:,} need {needed:,}",
            fix="give more text, or set fewer `samples` or shorter `distances`",
        )
    step = (len(stream) - distances[-1]) // max(settings.samples - 1, 1)
    starts = tuple(number * step for number in range(settings.samples))
    return Passages(stream, [] if begin is None else [begin], starts, length, distances)


def measure_repetition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    settings: RepetitionSettings,
    *,
    window: int,
    reference: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loss on each repeated passage, but for its first token, which nothing announces.

    Args:
        window: of the evaluation, for the distances where the settings name none.
        reference: model to compare with; without it KL and agreement are None.

    Returns:
        JSON values: ``passage`` (tokens), ``seen_once`` (nats per token on the same tokens the first time), and for each
        distance ``nats_per_token``, ``kl`` and ``agreement`` (means per token) and ``samples`` (sums of each).

    Raises:
        CompressError: the model is not a causal language model, or has too few positions.
        DataError: the text is too short.
    """
    import torch

    drawn = passages(tokenizer, documents, settings, window)
    check_model(model, drawn.distances[-1] + drawn.length)
    check_tokens(model, max(drawn.stream))
    with (
        torch.inference_mode(),
        (progress or SilentProgress()).task("repetition", len(drawn.distances) * len(drawn.starts), "samples") as task,
    ):
        once, rows = _scored(model, None, drawn, 0)[:, 0].sum().item(), []
        for distance in drawn.distances:
            rows.append(
                _row(distance, _scored(model, reference, drawn, distance), drawn.length - 1, reference is not None)
            )
            task.advance(len(drawn.starts), f"distance {distance:,}")
    return {
        "passage": drawn.length,
        "seen_once": once / len(drawn.starts) / (drawn.length - 1),
        "distances": rows,
    }


def _row(distance: int, scores: torch.Tensor, tokens: int, paired: bool) -> dict[str, Any]:
    """Means and samples of a distance. ``scores``: sums of NLL, KL and agreement, [samples, 3]; ``tokens``: of a sample."""
    nll, kl, agree = (scores.mean(0) / tokens).tolist()
    samples = [
        {"tokens": tokens, "nll": row[0], "kl": row[1] if paired else None, "agree": int(row[2]) if paired else None}
        for row in scores.tolist()
    ]
    means = {"kl": kl, "agreement": agree} if paired else dict.fromkeys(("kl", "agreement"))
    return {"distance": distance, "nats_per_token": nll, **means, "samples": samples}


def _scored(model: PreTrainedModel, reference: PreTrainedModel | None, drawn: Passages, distance: int) -> torch.Tensor:
    """Sums of NLL, KL and agreement over the last tokens of each sample, all of the passage but its first, [samples, 3]."""
    import torch

    from compress.evaluation.scoring import compared, logits_of

    embeddings: Any = model.get_input_embeddings()
    most = max(1, BATCH_VALUES // ((distance + drawn.length) * int(embeddings.weight.shape[0])))
    last, sums = drawn.length - 1, []
    for at in range(0, len(drawn.starts), most):
        numbers = range(at, min(at + most, len(drawn.starts)))
        ids = torch.tensor([drawn.sample(number, distance) for number in numbers], device=model.device)
        theirs = None if reference is None else logits_of(reference, ids[:, :-1], last)
        scores = compared(logits_of(model, ids[:, :-1], last), theirs, ids[:, -last:])
        sums.append(scores.double().sum(1).cpu())
    return torch.cat(sums)
