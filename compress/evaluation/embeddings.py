"""Sentence embeddings: how near they stay to the original's, and how well the cosines of pairs follow their scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.sidecars import safe_file
from compress.data.text import Document
from compress.errors import CheckpointError, CompressError
from compress.evaluation.examples import examples, outputs
from compress.progress import Progress, SilentProgress
from compress.statistics import rank_correlation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = "compress.embeddings/1"


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the vectors of a text's tokens become one: each of ``modes``, side by side. ``length``: most tokens of a text."""

    modes: tuple[str, ...] = ("mean_tokens",)
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a model makes of one text, or pair of texts.

    Attributes:
        similarity: cosine to the reference's embedding, of a pair the mean of both; None without a reference.
        cosine: of the two texts of a pair. score: what the pair's label says. Both None for one text.
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
    """Embed every text by itself, the texts of a pair too, in float32.

    Returns:
        JSON values, schema ``compress.embeddings/1``: rows of `Embedded`, the mean of their similarities, and with scores the
        rank correlation (Spearman) of cosines and scores.

    Raises:
        CompressError: the model gives no vectors of tokens, or the reference's are of another width.
        DataError: the tokenizer gives tokens that the model does not know.
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
                        f"the embeddings have {mine.shape[1]} numbers, the original's {theirs.shape[1]}",
                        fix="leave out `similarity`; spearman needs labelled pairs alone",
                    )
                near = (mine * theirs).sum(1).tolist()
            for row, i in enumerate(batch):
                cosines[i] = None if near is None else near[row]
                vectors[i] = mine[row] if documents[0].pair else None
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
    near_all = [row.similarity for row in rows if row.similarity is not None]
    scored = [(row.cosine, row.score) for row in rows if row.cosine is not None and row.score is not None]
    return {
        "schema": SCHEMA,
        "unit": "example",
        "pooling": list(pooling.modes),
        "cut": texts.cut,
        "similarity": math.fsum(near_all) / len(rows) if near_all else None,
        "spearman": rank_correlation(*zip(*scored, strict=True)) if scored else None,
        "documents": [asdict(row) for row in rows],
    }


def _embeddings(model: Any, inputs: dict[str, torch.Tensor], pooling: Pooling) -> torch.Tensor:
    """Unit vectors [texts, width], float32, on the CPU."""
    states = getattr(outputs(model, inputs), "last_hidden_state", None)
    if states is None:
        raise CompressError(f"sentence embeddings need a base model, this is {type(model).__name__}")
    return pooled(states.float().cpu(), inputs["attention_mask"].bool(), pooling)


def pooled(states: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Unit vectors [texts, width] of states [texts, tokens, D] where ``mask`` [texts, tokens] is true."""
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
#: Modules of sentence-transformers that are applied here; cosines take no notice of Normalize.
_MODULES = ("Transformer", "Pooling", "Normalize")


def read_pooling(folder: Path) -> Pooling:
    """What the sentence-transformers files of a checkpoint say; the mean over tokens where there are none.

    Raises:
        CheckpointError: they cannot be read, or ask for what is not offered.
    """
    for module in _json(safe_file(folder, "modules.json"), list):
        if isinstance(module, dict) and (name := str(module.get("type")).rpartition(".")[2]) not in _MODULES:
            raise CheckpointError(
                f"has a module {name}, without which its embeddings are others",
                where=f"{folder}/modules.json",
                fix=f"those that are applied are {', '.join(_MODULES)}",
            )
    length = _json(safe_file(folder, "sentence_bert_config.json"), dict).get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError("has no usable `max_seq_length`", where=f"{folder}/sentence_bert_config.json")
    said = _json(path := safe_file(folder, "1_Pooling/config.json"), dict)
    asked = [key.removeprefix("pooling_mode_") for key, on in said.items() if key.startswith("pooling_mode_") and on]
    wrong = [mode for mode in asked if mode not in _POOLS]
    if wrong or (said and not asked):
        what = f"the pooling {wrong[0]}" if wrong else "no pooling that is known"
        raise CheckpointError(f"asks for {what}", where=str(path), fix=f"there are {', '.join(_POOLS)}")
    modes = tuple(mode for mode in _POOLS if mode in asked)
    return Pooling(modes or Pooling().modes, length)


def _json(path: Path, kind: type) -> Any:
    """The JSON value of a file, which must be of that kind; an empty one where there is no file."""
    if not path.is_file():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"is no JSON: {error}", where=str(path)) from None
    if not isinstance(value, kind):
        raise CheckpointError(f"is no {'object' if kind is dict else 'list'}", where=str(path))
    return value
