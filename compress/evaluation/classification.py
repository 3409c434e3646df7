"""Accuracy, F1, agreement and divergence of text classifiers on labelled texts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, DataError
from compress.progress import Progress, SilentProgress
from compress.statistics import macro_f1
from compress.text import Document

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = "compress.classification/1"
#: Tokens of a batch with its padding, and most texts in one.
BATCH_TOKENS, BATCH_TEXTS = 1 << 13, 64


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one text.

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
    """Predictions in the order of the texts. ``labels``: names by id. ``cut``: texts longer than the model reads."""

    documents: tuple[Prediction, ...]
    labels: tuple[str, ...]
    cut: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values, schema ``compress.classification/1``, with the metrics over all texts; NaN stays NaN."""
        rows = [asdict(d) for d in self.documents]
        return {
            "schema": SCHEMA,
            "unit": "example",
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
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    labels: Sequence[str],
    reference: PreTrainedModel | None = None,
    title: str = "evaluate",
    progress: Progress | None = None,
) -> Predictions:
    """Predict every document's label, with log-probabilities in float32.

    Texts and pairs get the tokenizer's special tokens and are cut to what model and tokenizer take; batches hold texts of
    similar length, padded on the right and masked.

    Args:
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
    longest = _longest(model, tokenizer)
    rows = [_encoded(tokenizer, document, None) for document in documents]
    cut = [longest is not None and len(row["input_ids"]) > longest for row in rows]
    rows = [
        _encoded(tokenizer, document, longest) if long else row
        for row, document, long in zip(rows, documents, cut, strict=True)
    ]
    embeddings: Any = model.get_input_embeddings()
    highest, size = max(max(row["input_ids"]) for row in rows), int(embeddings.weight.shape[0])
    if highest >= size:
        raise DataError(f"the tokenizer gives token {highest}, the model knows {size}", fix="use its own tokenizer")
    found: list[Prediction | None] = [None] * len(rows)
    padding = model.config.pad_token_id  # by which some models find where a text ends; without it texts go one by one
    batches = _batches([len(row["input_ids"]) for row in rows], BATCH_TEXTS if padding is not None else 1)
    with torch.inference_mode(), (progress or SilentProgress()).task(title, len(rows), "texts") as task:
        for batch in batches:
            inputs = _padded([rows[i] for i in batch], padding or 0)
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
            task.advance(len(batch), documents[batch[-1]].id)
    return Predictions(tuple(p for p in found if p is not None), tuple(labels), sum(cut))


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens of a text; None where nothing limits them. Positions up to the padding token's are no text's."""
    import torch

    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 1 << 30 else []
    if (positions := getattr(model.config, "max_position_embeddings", None)) is not None:
        limits.append(positions)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(limits, default=None)


def _encoded(tokenizer: PreTrainedTokenizerBase, document: Document, longest: int | None) -> dict[str, list[int]]:
    texts = document.pair or (document.text,)
    how: dict[str, Any] = {} if longest is None else {"truncation": True, "max_length": longest}
    return dict(tokenizer(*texts, verbose=False, **how))


def _batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of texts, longest first, so that memory is at its most in the first batch."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = not batches or len(batches[-1]) >= most
        if full or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _padded(rows: Sequence[dict[str, list[int]]], padding: int) -> dict[str, torch.Tensor]:
    """Tensors [texts, tokens] of every input that the tokenizer gives."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": padding}
    return {
        name: torch.tensor([row[name] + [fill.get(name, 0)] * (longest - len(row[name])) for row in rows])
        for name in rows[0]
    }


def _log_probabilities(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Over labels, float32 [texts, labels], on the CPU."""
    taken = inspect.signature(model.forward).parameters
    logits = model(**{k: v.to(model.device) for k, v in inputs.items() if k in taken}).logits
    log_probabilities: torch.Tensor = logits.float().log_softmax(-1).cpu()
    return log_probabilities
