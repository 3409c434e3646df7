"""Texts that a model reads whole: tokenised, in padded batches of similar length. Images in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.checkpoint.edits.linformer import PROJECTIONS
from compress.data.documents import Document
from compress.data.images import accepted, pixels
from compress.data.rendering import encoded
from compress.errors import DataError
from compress.models.classes import arguments_of
from compress.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Most tokens of a batch, padding included, and most texts of a batch.
BATCH_TOKENS, BATCH_TEXTS = 1 << 13, 64
#: Images of a batch.
BATCH_IMAGES = 32


@dataclass(frozen=True)
class Examples:
    """Tokenised texts.

    Attributes:
        rows: inputs of the model by name, for each text.
        cut: number of texts that are longer than the model reads.
        padding: id of the padding token; None if the model has none.
    """

    rows: tuple[dict[str, list[int]], ...]
    cut: int
    padding: int | None

    def batches(self, tokens: int = BATCH_TOKENS) -> list[list[int]]:
        """Indices of texts by batch, longest first, so the first batch needs the most memory. ``tokens``: most per batch."""
        # some models find the end of a text by the padding token; without one, texts go one by one
        most = BATCH_TEXTS if self.padding is not None else 1
        lengths = [len(row["input_ids"]) for row in self.rows]
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            full = not batches or len(batches[-1]) >= most
            if full or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > tokens:
                batches.append([])
            batches[-1].append(i)
        return batches

    def inputs(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """Input tensors [texts, tokens] by name."""
        import torch

        rows = [self.rows[i] for i in batch]
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.padding or 0}
        return {
            name: torch.tensor([row[name] + [fill.get(name, 0)] * (longest - len(row[name])) for row in rows])
            for name in rows[0]
        }

    @contextmanager
    def each(
        self, progress: Progress, title: str, tokens: int = BATCH_TOKENS
    ) -> Iterator[Iterator[tuple[list[int], dict[str, torch.Tensor]]]]:
        """Every batch with its inputs, under inference mode."""
        with _each(self.batches(tokens), self.inputs, progress, title, "texts") as batches:
            yield batches


@dataclass(frozen=True)
class Pictures:
    """Images, read from disk one batch at a time. ``processor``: image processor of the checkpoint."""

    files: tuple[str, ...]
    processor: Any
    cut: int = 0

    def inputs(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """Pixels [images, channels, height, width]."""
        return {"pixel_values": pixels([self.files[i] for i in batch], self.processor)}

    @contextmanager
    def each(self, progress: Progress, title: str) -> Iterator[Iterator[tuple[list[int], dict[str, torch.Tensor]]]]:
        """Every batch with its inputs, under inference mode."""
        count = len(self.files)
        batches = [list(range(i, min(i + BATCH_IMAGES, count))) for i in range(0, count, BATCH_IMAGES)]
        with _each(batches, self.inputs, progress, title, "images") as batches_read:
            yield batches_read


@contextmanager
def _each(
    batches: Sequence[list[int]],
    inputs: Callable[[Sequence[int]], dict[str, torch.Tensor]],
    progress: Progress,
    title: str,
    unit: str,
) -> Iterator[Iterator[tuple[list[int], dict[str, torch.Tensor]]]]:
    import torch

    def run() -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        for batch in batches:
            yield batch, inputs(batch)
            task.advance(len(batch))

    with torch.inference_mode(), progress.task(title, sum(map(len, batches)), unit) as task:
        yield run()


def examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    longest: int | None = None,
) -> Examples:
    """Tokenised documents with special tokens, cut to what model and tokenizer accept and to ``longest`` tokens.

    Raises:
        DataError: the tokenizer produces no tokens, or tokens that the model does not know.
    """
    limit = min((n for n in (longest, longest_text(model, tokenizer)) if n is not None), default=None)
    rows = [encoded(document, tokenizer) for document in documents]
    cut = [limit is not None and len(row["input_ids"]) > limit for row in rows]
    rows = [
        encoded(document, tokenizer, limit) if long else row
        for row, document, long in zip(rows, documents, cut, strict=True)
    ]
    if empty := next((document for row, document in zip(rows, documents, strict=True) if not row["input_ids"]), None):
        raise DataError("the tokenizer produces no token for it", where=empty.id)
    check_tokens(model, max(max(row["input_ids"]) for row in rows))
    return Examples(tuple(rows), sum(cut), model.config.pad_token_id)


def check_tokens(model: PreTrainedModel, highest: int) -> None:
    """Raise `DataError` if the model does not know token ids up to ``highest``."""
    embeddings: Any = model.get_input_embeddings()
    if highest >= (size := int(embeddings.weight.shape[0])):
        raise DataError(f"the tokenizer gives token {highest}, the model knows {size}", fix="use its own tokenizer")


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens of a text; None without a limit. Positions up to that of the padding token cannot be used, nor
    those beyond projections along the text."""
    import torch

    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < 1 << 30 else []
    if (positions := getattr(model.config, "max_position_embeddings", None)) is not None:
        limits.append(positions)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        if (projection := getattr(module, PROJECTIONS[0], None)) is not None:
            limits.append(projection.shape[1])
    return min(limits, default=None)


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """Output of the model for the inputs that its forward accepts."""
    taken = arguments_of(model)
    there = {name: value.to(model.device) for name, value in inputs.items() if name in taken}
    with accepted(inputs):
        return model(**{n: value.to(model.dtype) if value.is_floating_point() else value for n, value in there.items()})
