"""Metrics of classifiers on labelled texts or images: accuracy, F1, agreement and KL divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.data.documents import Document
from compress.errors import CompressError
from compress.evaluation.examples import Pictures, examples, outputs
from compress.evaluation.metrics import values
from compress.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SCHEMA = "compress.classification/1"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction for one text or image.

    Attributes:
        label: true label. prediction: most likely label.
        nll: negative log-likelihood of the true label, nats.
        kl: KL(reference ‖ model) over labels, nats; None without a reference.
        agree: 1 if the reference has the same most likely label, else 0; None without a reference.
    """

    id: str
    label: int
    prediction: int
    nll: float
    kl: float | None
    agree: int | None


@dataclass(frozen=True)
class Predictions:
    """Predictions in the order of the examples.

    Attributes:
        labels: label names by id.
        cut: number of texts that are longer than the model reads.
        of: kind of the examples.
    """

    documents: tuple[Prediction, ...]
    labels: tuple[str, ...]
    cut: int
    of: Literal["texts", "images"] = "texts"

    def to_dict(self) -> dict[str, Any]:
        """JSON values of schema ``compress.classification/1``, with the metrics over all examples; NaN stays NaN."""
        rows = [asdict(d) for d in self.documents]
        return {
            "schema": SCHEMA,
            "unit": "example",
            "of": self.of,
            "labels": list(self.labels),
            "cut": self.cut,
            "cross_entropy": math.fsum(row["nll"] for row in rows) / len(rows),
            **values("classification", {"unit": "example", "labels": self.labels, "documents": rows}),
            "documents": rows,
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
    """Predictions for all documents, with float32 log-probabilities.

    Texts and pairs get the tokenizer's special tokens and are cut to the length that model and tokenizer accept. Batches have
    texts of similar length, padded on the right and masked. Images are read one batch at a time.

    Args:
        processor: tokenizer of the checkpoint, or its image processor if the documents are images.
        documents: each with a label, an id below ``len(labels)``.
        reference: model to compare with, with the same labels.

    Raises:
        CompressError: model or reference has another number of labels.
        DataError: the tokenizer produces tokens that the model does not know.
    """
    import torch

    for each in (model, reference):
        if each is not None and each.config.num_labels != len(labels):
            raise CompressError(
                f"{type(each).__name__} has {each.config.num_labels} labels, {len(labels)} are expected"
            )
    files = tuple(d.image for d in documents if d.image is not None)
    texts = Pictures(files, processor) if files else examples(model, processor, documents)
    predictions: list[Prediction | None] = [None] * len(documents)
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
                predictions[i] = Prediction(
                    id=documents[i].id,
                    label=int(truth[row]),
                    prediction=int(logp[row].argmax()),
                    nll=float(nll[row]),
                    kl=None if kl is None else float(kl[row]),
                    agree=None if agree is None else int(agree[row]),
                )
    return Predictions(
        tuple(p for p in predictions if p is not None), tuple(labels), texts.cut, "images" if files else "texts"
    )


def _log_probabilities(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the labels, float32 [examples, labels], on the CPU."""
    log_probabilities: torch.Tensor = outputs(model, inputs).logits.float().log_softmax(-1).cpu()
    return log_probabilities
