"""Accuracy, F1, agreement and divergence of classifiers on labelled texts or images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.data.text import Document
from compress.errors import CompressError
from compress.evaluation.examples import Pictures, examples, outputs
from compress.progress import Progress, SilentProgress
from compress.statistics import macro_f1

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SCHEMA = "compress.classification/1"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one text or image.

    Attributes:
        label: its true label. prediction: the likeliest one. nll: negative log-likelihood of the true one, nats.
        kl: divergence of the reference from the model over labels, KL(reference ‖ model), nats; None without a reference.
        agree: 1 where the reference's likeliest label is the same, else 0; None without a reference.
    """

    id: str
    label: int
    prediction: int
    nll: float
    kl: float | None
    agree: int | None


@dataclass(frozen=True)
class Predictions:
    """Predictions in the order of the texts or images (``of``).

    ``labels``: names by id. ``cut``: texts longer than the model reads.
    """

    documents: tuple[Prediction, ...]
    labels: tuple[str, ...]
    cut: int
    of: Literal["texts", "images"] = "texts"

    def to_dict(self) -> dict[str, Any]:
        """JSON values, schema ``compress.classification/1``, with the metrics over all texts; NaN stays NaN."""
        rows = [asdict(d) for d in self.documents]
        return {
            "schema": SCHEMA,
            "unit": "example",
            "of": self.of,
            "labels": list(self.labels),
            "cut": self.cut,
            **metrics(rows, len(self.labels)),
            "documents": rows,
        }


def metrics(rows: Sequence[dict[str, Any]], labels: int) -> dict[str, Any]:
    """Metrics of `Prediction` rows: accuracy, macro F1, mean cross-entropy, mean divergence, share of agreement."""
    paired = all(row["kl"] is not None for row in rows)
    return {
        "accuracy": sum(row["prediction"] == row["label"] for row in rows) / len(rows),
        "f1": macro_f1(rows, labels),
        "cross_entropy": math.fsum(row["nll"] for row in rows) / len(rows),
        "kl": math.fsum(row["kl"] for row in rows) / len(rows) if paired else None,
        "agreement": sum(row["agree"] for row in rows) / len(rows) if paired else None,
    }


def classify_documents(
    model: PreTrainedModel,
    processor: Any,
    documents: Sequence[Document],
    *,
    labels: Sequence[str],
    reference: PreTrainedModel | None = None,
    title: str = "evaluate",
    progress: Progress | None = None,
) -> Predictions:
    """Predict every document's label, with log-probabilities in float32.

    Texts and pairs get the tokenizer's special tokens and are cut to what model and tokenizer take; batches hold texts of
    similar length, padded on the right and masked. Images are read a batch at a time.

    Args:
        processor: the checkpoint's tokenizer, or its image processor where the documents are images.
        documents: each with a label, an id below ``len(labels)``.
        reference: the model to compare with; of the same labels.

    Raises:
        CompressError: the model's outputs are not the labels, or the reference has others.
        DataError: the tokenizer gives tokens that the model does not know.
    """
    import torch

    for each in (model, reference):
        if each is not None and each.config.num_labels != len(labels):
            raise CompressError(
                f"{type(each).__name__} has {each.config.num_labels} labels, {len(labels)} are expected"
            )
    files = tuple(d.image for d in documents if d.image is not None)
    texts = Pictures(files, processor) if files else examples(model, processor, documents)
    found: list[Prediction | None] = [None] * len(documents)
    with texts.each(progress or SilentProgress(), title) as batches:
        for batch, inputs in batches:
            logp = _log_probabilities(model, inputs)
            truth = torch.tensor([documents[i].label for i in batch])
            nll = -logp.gather(1, truth[:, None])[:, 0]
            kl = agree = None
            if reference is not None:
                theirs = _log_probabilities(reference, inputs)
                kl = torch.where(theirs == -torch.inf, 0, theirs.exp() * (theirs - logp)).sum(1)
                agree = logp.argmax(1) == theirs.argmax(1)
            for row, i in enumerate(batch):
                found[i] = Prediction(
                    id=documents[i].id,
                    label=int(truth[row]),
                    prediction=int(logp[row].argmax()),
                    nll=float(nll[row]),
                    kl=None if kl is None else float(kl[row]),
                    agree=None if agree is None else int(agree[row]),
                )
    return Predictions(
        tuple(p for p in found if p is not None), tuple(labels), texts.cut, "images" if files else "texts"
    )


def _log_probabilities(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Over labels, float32 [texts, labels], on the CPU."""
    log_probabilities: torch.Tensor = outputs(model, inputs).logits.float().log_softmax(-1).cpu()
    return log_probabilities
