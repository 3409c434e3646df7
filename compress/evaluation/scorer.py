"""Metrics of a model on text or images, by its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.data.default_text import located
from compress.data.documents import Document, read_documents
from compress.data.examples import Labels, read_examples
from compress.data.images import read_images
from compress.errors import DataError
from compress.evaluation.tasks import (
    CLASSIFICATION,
    EMBEDDING,
    IMAGES,
    LANGUAGE,
    MASKED,
    OF_PASSES,
    Task,
    label_id,
    label_ids,
    score,
    task_of,
)
from compress.progress import Progress
from compress.settings import Settings
from compress.spec.spec import Spec, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Most labels that a message lists.
_LABELS_SHOWN = 12


class Texts(Protocol):
    """Selection of evaluation data, as in a recipe's ``data.evaluation`` or on the command line."""

    @property
    def files(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def images(self) -> str | None: ...  # noqa: D102
    @property
    def field(self) -> str: ...  # noqa: D102
    @property
    def template(self) -> str | None: ...  # noqa: D102
    @property
    def columns(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def label(self) -> str | None: ...  # noqa: D102
    @property
    def window(self) -> int: ...  # noqa: D102
    @property
    def stride(self) -> int | None: ...  # noqa: D102
    @property
    def streaming(self) -> bool: ...  # noqa: D102
    @property
    def max_documents(self) -> int | None: ...  # noqa: D102


def read(texts: Texts, separator: str | None, structure: Structure | None) -> list[Document]:
    """All documents of the evaluation data, with label ids if they are labelled. Raises `DataError` with file and row.

    Args:
        structure: of the model, for its labels; plain text does not need it.
    """
    files = [located(file, "evaluation") for file in texts.files]
    if texts.images is None and texts.label is None:
        return read_documents(files, separator, texts.field, texts.template)
    assert structure is not None
    if texts.images is not None:
        return read_images(texts.images, labels_of(structure, "images"))
    assert texts.label is not None
    task = task_of(structure.class_name)
    if task.labels == "scores" and len(texts.columns) < 2:
        raise DataError("scores are of pairs of texts", where=texts.files[0], fix="name two columns with `text`")
    return read_examples(files, texts.columns, labels_of(structure, texts.label))


def load_processor(structure: Structure, folder: Path, *, trust_remote_code: bool) -> Any:
    """Tokenizer of a checkpoint, or the image processor of a model that reads images."""
    from compress.models.processors import load_image_processor, load_tokenizer

    load = load_image_processor if "images" in task_of(structure.class_name).takes else load_tokenizer
    return load(folder, trust_remote_code=trust_remote_code)


def labels_of(structure: Structure, field: str) -> Labels:
    """Reader of the label column ``field`` for a model. Raises `DataError` if its task has no labels."""
    task = task_of(structure.class_name)
    if not task.labels:
        raise DataError(f"`{field}` is to hold labels, and {task.name} has none", fix="leave out `label`")
    return _LABELS[task.labels](field, structure.config)


def _classes(field: str, config: Mapping[str, Any]) -> Labels:
    labels, ids = label_ids(config)
    shown = ", ".join(labels[:_LABELS_SHOWN]) + (", …" if len(labels) > _LABELS_SHOWN else "")
    known = f"there are {shown}, or 0 to {len(labels) - 1}"
    return Labels(field, lambda value: label_id(value, ids), "a label of the model", known)


def _scores(field: str, config: Mapping[str, Any]) -> Labels:
    return Labels(field, score, "a number")


_LABELS: Mapping[str, Callable[[str, Mapping[str, Any]], Labels]] = {"classes": _classes, "scores": _scores}


@dataclass(frozen=True)
class Scorer:
    """Evaluates models on the same documents.

    Attributes:
        structure, folder: of the original; they determine the task, the labels and the pooling of embeddings.
        processor: result of `load_processor`.
        measured: metrics that make forward passes of their own, each with its settings.
    """

    structure: Structure
    folder: Path
    processor: Any
    documents: Sequence[Document]
    texts: Texts
    progress: Progress
    measured: Mapping[str, Settings] = field(default_factory=dict)

    def check(self, spec: Spec) -> None:
        """Check that a checkpoint can read the documents, where they are streamed. Raises `CompressError`."""
        if self.texts.streaming:
            from compress.evaluation.language import check_streams

            check_streams(self.processor, self.documents, spec)

    def __call__(
        self, model: PreTrainedModel, reference: PreTrainedModel | None = None, title: str = "evaluate"
    ) -> dict[str, Any]:
        """Evaluation as JSON values. ``reference``: model to compare with."""
        score = _SCORERS[task_of(self.structure.class_name)]
        evaluation = score(self, model, reference=reference, title=title, progress=self.progress)
        for name, settings in self.measured.items():
            metric = OF_PASSES[name]
            evaluation |= metric.measure(
                model,
                self.processor,
                self.documents,
                settings,
                window=self.texts.window,
                reference=reference,
                progress=self.progress,
            )
            evaluation[name] = metric.value(evaluation)
        return evaluation


def _classified(self: Scorer, model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    from compress.evaluation.classification import classify_documents

    labels, _ = label_ids(self.structure.config)
    return classify_documents(model, self.processor, self.documents, labels=labels, **options).to_dict()


def _language(self: Scorer, model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    from compress.evaluation.language import score_documents

    texts = self.texts
    options |= {"window": texts.window, "stride": texts.stride or texts.window, "streaming": texts.streaming}
    return score_documents(model, self.processor, self.documents, **options).to_dict()


def _masked(self: Scorer, model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    from compress.evaluation.masked import score_masked

    return score_masked(model, self.processor, self.documents, window=self.texts.window, **options)


def _embedded(self: Scorer, model: PreTrainedModel, **options: Any) -> dict[str, Any]:
    from compress.evaluation.embeddings import embed_documents, read_pooling

    return embed_documents(model, self.processor, self.documents, pooling=read_pooling(self.folder), **options)


_SCORERS: Mapping[Task, Callable[..., dict[str, Any]]] = {
    CLASSIFICATION: _classified,
    IMAGES: _classified,
    LANGUAGE: _language,
    MASKED: _masked,
    EMBEDDING: _embedded,
}
