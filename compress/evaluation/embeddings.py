"""Metrics of sentence embeddings: similarity to the original's, and rank correlation of cosines with scores of pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.sidecars import safe_file
from compress.data.documents import Document
from compress.errors import CheckpointError, CompressError
from compress.evaluation.examples import examples, outputs
from compress.evaluation.metrics import values
from compress.progress import Progress, SilentProgress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = "compress.embeddings/1"


@dataclass(frozen=True, slots=True)
class Pooling:
    """Pooling of token vectors: results of all ``modes``, concatenated. ``length``: most tokens of a text."""

    modes: tuple[str, ...] = ("mean_tokens",)
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """Result for one text or pair of texts.

    Attributes:
        similarity: cosine to the reference's embedding, for a pair the mean of both; None without a reference.
        cosine: between the two texts of a pair; None for a single text.
        score: label of the pair; None for a single text.
    """

    id: str
    similarity: float | None
    cosine: float | None
    score: float | None


def embed_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    pooling: Pooling,
    reference: PreTrainedModel | None = None,
    title: str = "evaluate",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Embed every text by itself, also the texts of a pair, in float32.

    Returns:
        JSON values of schema ``compress.embeddings/1``: rows of `Embedded`, their mean similarity, and with scores Spearman's
        rank correlation of cosines and scores.

    Raises:
        CompressError: the model has no token vectors, or the reference's have another width.
        DataError: the tokenizer produces tokens that the model does not know.
    """
    progress = progress or SilentProgress()
    alone = [
        Document(document.id, text) if document.pair else document
        for document in documents
        for text in (document.pair or (document.text,))
    ]
    texts = examples(model, tokenizer, alone, pooling.length)
    cosines: list[float | None] = [None] * len(alone)
    vectors: list[torch.Tensor | None] = [None] * len(alone)
    with texts.each(progress, title) as batches:
        for batch, inputs in batches:
            mine = _embeddings(model, inputs, pooling)
            near = None
            if reference is not None:
                theirs = _embeddings(reference, inputs, pooling)
                if theirs.shape != mine.shape:
                    raise CompressError(
                        f"the embeddings have width {mine.shape[1]}, the original's {theirs.shape[1]}",
                        fix="leave out `similarity`; `spearman` works, on labelled pairs",
                    )
                near = (mine * theirs).sum(1).tolist()
            for row, i in enumerate(batch):
                cosines[i] = None if near is None else near[row]
                vectors[i] = mine[row] if documents[0].pair else None
    rows = [asdict(row) for row in _rows(documents, cosines, vectors)]
    return {
        "schema": SCHEMA,
        "unit": "example",
        "pooling": list(pooling.modes),
        "cut": texts.cut,
        **values("embeddings", {"unit": "example", "documents": rows}),
        "documents": rows,
    }


def _rows(
    documents: Sequence[Document], cosines: Sequence[float | None], vectors: Sequence[torch.Tensor | None]
) -> list[Embedded]:
    """A row per document; ``cosines`` (to the reference) and ``vectors`` have an entry for each text, two for a pair."""
    rows: list[Embedded] = []
    for number, document in enumerate(documents):
        step = 2 if document.pair else 1
        own = [c for c in cosines[step * number : step * (number + 1)] if c is not None]
        cosine = None
        if document.pair:
            first, second = vectors[2 * number], vectors[2 * number + 1]
            assert first is not None
            assert second is not None
            cosine = float((first * second).sum())
        rows.append(Embedded(document.id, sum(own) / step if own else None, cosine, document.label))
    return rows


def _embeddings(model: Any, inputs: dict[str, torch.Tensor], pooling: Pooling) -> torch.Tensor:
    """Unit vectors [texts, width], float32, on the CPU."""
    states = getattr(outputs(model, inputs), "last_hidden_state", None)
    if states is None:
        raise CompressError(f"sentence embeddings need a base model, this is {type(model).__name__}")
    return pooled(states.float().cpu(), inputs["attention_mask"].bool(), pooling)


def pooled(states: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Unit vectors [texts, width] of states [texts, tokens, D], pooled where ``mask`` [texts, tokens] is true."""
    import torch

    vectors = torch.cat([_POOLS[mode](states, mask) for mode in pooling.modes], 1)
    return torch.nn.functional.normalize(vectors, dim=1)


def _mean(states_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return (states_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)


def _mean_sqrt(states_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return (states_BTD * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True).sqrt()


def _max(states_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return states_BTD.masked_fill(~mask_BT[..., None], -math.inf).amax(1)


def _first(states_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return states_BTD[:, 0]


def _last(states_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    return states_BTD[range(len(mask_BT)), mask_BT.sum(1) - 1]


#: Poolings of sentence-transformers, in the order in which it puts several side by side (Reimers and Gurevych 2019,
#: arXiv 1908.10084; ``1_Pooling/config.json``).
_POOLS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls_token": _first,
    "max_tokens": _max,
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "lasttoken": _last,
}
#: Modules of sentence-transformers that are supported; Normalize does not change cosines.
_MODULES = ("Transformer", "Pooling", "Normalize")


def read_pooling(folder: Path) -> Pooling:
    """Pooling of a checkpoint's sentence-transformers files; the mean over tokens without such files.

    Raises:
        CheckpointError: the files are damaged, or ask for an unsupported pooling or module.
    """
    for module in _json(safe_file(folder, "modules.json"), list):
        if isinstance(module, dict) and (name := str(module.get("type")).rpartition(".")[2]) not in _MODULES:
            raise CheckpointError(
                f"has a module {name}, which is not supported and changes the embeddings",
                where=f"{folder}/modules.json",
                fix=f"supported are {', '.join(_MODULES)}",
            )
    length = _json(safe_file(folder, "sentence_bert_config.json"), dict).get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError("has no usable `max_seq_length`", where=f"{folder}/sentence_bert_config.json")
    said = _json(path := safe_file(folder, "1_Pooling/config.json"), dict)
    asked = [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on]
    wrong = [mode for mode in asked if mode not in _POOLS]
    if wrong or (said and not asked):
        what = f"the pooling {wrong[0]}" if wrong else "no known pooling"
        raise CheckpointError(f"asks for {what}", where=str(path), fix=f"there are {', '.join(_POOLS)}")
    modes = tuple(mode for mode in _POOLS if mode in asked)
    return Pooling(modes or Pooling().modes, length)


def _json(path: Path, kind: type) -> Any:
    """JSON value of a file, which must have that type; an empty one without a file. Raises `CheckpointError`."""
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {error}", where=str(path)) from None
    if not isinstance(value, kind):
        raise CheckpointError(f"is not {'an object' if kind is dict else 'a list'}", where=str(path))
    return value
