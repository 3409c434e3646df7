"""Text metrics of a model, by its task: which documents it is measured on, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from compress.evaluation.tasks import Task, label_id, label_ids
from compress.progress import Progress
from compress.text import Document, read_documents, read_labelled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Labels that a message lists.
_LABELS_SHOWN = 12


class Texts(Protocol):
    """What says which texts to read; `recipe.model.Evaluation` does, and `assess.Assessment`."""

    @property
    def files(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def field(self) -> str: ...  # noqa: D102
    @property
    def columns(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def label(self) -> str | None: ...  # noqa: D102
    @property
    def window(self) -> int: ...  # noqa: D102
    @property
    def stride(self) -> int | None: ...  # noqa: D102
    @property
    def max_documents(self) -> int | None: ...  # noqa: D102


def read(texts: Texts, separator: str | None, config: Mapping[str, Any]) -> list[Document]:
    """All documents of the evaluation files; labelled ones with the ids that the model's config gives to labels.

    Raises `DataError` with file and row.
    """
    if texts.label is None:
        return read_documents(texts.files, separator, texts.field)
    labels, ids = label_ids(config)
    shown = ", ".join(labels[:_LABELS_SHOWN]) + (", …" if len(labels) > _LABELS_SHOWN else "")
    known = f"there are {shown}, or 0 to {len(labels) - 1}"
    return read_labelled(texts.files, texts.columns, texts.label, lambda value: label_id(value, ids), known)


@dataclass(frozen=True)
class Scorer:
    """Measures models on the same documents. ``config``: of the original, which names the labels."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    documents: Sequence[Document]
    texts: Texts
    config: Mapping[str, Any]
    progress: Progress

    def __call__(
        self, model: PreTrainedModel, reference: PreTrainedModel | None = None, title: str = "evaluate"
    ) -> dict[str, Any]:
        """The evaluation as JSON values; ``reference`` is the model to compare with."""
        how: dict[str, Any] = {"reference": reference, "title": title, "progress": self.progress}
        if self.task.labelled:
            from compress.evaluation.classification import classify_documents

            labels, _ = label_ids(self.config)
            return classify_documents(model, self.tokenizer, self.documents, labels=labels, **how).to_dict()
        from compress.evaluation.language import score_documents

        how |= {"window": self.texts.window, "stride": self.texts.stride or self.texts.window}
        return score_documents(model, self.tokenizer, self.documents, **how).to_dict()
