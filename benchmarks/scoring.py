"""Held-out scores of a checkpoint beside its dense model, the same in every benchmark.

Each text is read as one stream and cut into windows of 256 tokens; float32 weights and arithmetic. The second text is of
another kind than what a benchmark calibrates with: code beside prose, prose beside code.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WINDOW, WINDOWS = 256, 400
#: Windows at a time: logits of a batch are its tokens × vocabulary × 4 bytes, and there are several of them.
BATCH = 4
#: The first of these that does not lie beside a held-out text is the second text.
SECOND = (ROOT / "benchmarks/third/test.txt", ROOT / "examples/text/test.txt")
COLUMNS = ["ΔNLL", "KL", "bits per byte", "ΔNLL, second text", "KL, second text"]


@dataclass(frozen=True)
class TextScore:
    """Scores of one text.

    losses: mean negative log-likelihood per token of each window, nats, float64 [windows].
    divergences: mean Kullback-Leibler divergence from the dense model's distribution of each window, nats per token, float64.
    agreement: share of tokens whose likeliest prediction is the dense model's.
    """

    losses: Any
    divergences: Any
    agreement: float

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, nats."""
        return float(self.losses.mean())

    @property
    def kl(self) -> float:
        """Mean divergence per token, nats."""
        return float(self.divergences.mean())


class HeldOut:
    """Held-out texts of a dense model, which scores other checkpoints of its tokenizer beside it.

    The dense model reads the texts once. What its output embeddings read is kept, [windows, 255, width] float32 for each
    text, so that a divergence costs one product with them.
    """

    def __init__(
        self, model: str, files: Sequence[str], *, second: str | Path | None = None, windows: int = WINDOWS
    ) -> None:
        import torch

        from compress.models.loading import load_model

        self.files = [Path(file) for file in files]
        self.second = Path(second) if second else _second(self.files)
        self.windows = windows
        self._texts = [token_windows(model, file, windows) for file in [*self.files, self.second]]
        dense = load_model(model, dtype="float32")
        self._head = dense.get_output_embeddings()
        self._states: list[Any] = []
        self.dense = []
        with torch.inference_mode(), _inputs_of(self._head) as read:
            for ids, _ in self._texts:
                losses, states = [], []
                for batch in ids.split(BATCH):
                    logits = dense(batch, use_cache=False).logits[:, :-1].float()
                    losses.append(_losses(logits, batch))
                    states.append(read.pop()[:, :-1])
                    if not self._states and len(states) == 1 and not torch.allclose(self._head(states[0]), logits):
                        raise ValueError(f"{model}: logits are more than a product with the output embeddings")
                self._states.append(torch.cat(states))
                self.dense.append(TextScore(torch.cat(losses), torch.zeros(len(ids)), 1.0))

    def score(self, checkpoint: Any) -> list[TextScore]:
        """Scores of each held-out text, then of the second; the checkpoint is a folder or a loaded float32 model."""

        from compress.models.loading import load_model

        model = load_model(checkpoint, dtype="float32") if isinstance(checkpoint, str | Path) else checkpoint
        return [self._score(model, ids, states) for (ids, _), states in zip(self._texts, self._states, strict=True)]

    def rise(self, scores: Sequence[TextScore]) -> float:
        """Rise of the loss over the dense model's, nats per token: the mean over the held-out texts."""
        return self.loss(scores) - self.loss(self.dense)

    def second_rise(self, scores: Sequence[TextScore]) -> float:
        """Rise of the loss on the second text, nats per token."""
        return scores[-1].loss - self.dense[-1].loss

    def loss(self, scores: Sequence[TextScore]) -> float:
        """Mean loss over the held-out texts, nats per token."""
        return statistics.mean(s.loss for s in scores[:-1])

    def cells(self, draws: Sequence[Sequence[TextScore]]) -> list[str]:
        """Entries of a row of ``COLUMNS``, one figure for each draw of the calibration."""
        return [
            " / ".join(f"{self.rise(scores):+.4f}" for scores in draws),
            " / ".join(f"{self.kl(scores):.4f}" for scores in draws),
            " / ".join(f"{self.bits_per_byte(scores):.4f}" for scores in draws),
            " / ".join(f"{self.second_rise(scores):+.4f}" for scores in draws),
            " / ".join(f"{scores[-1].kl:.4f}" for scores in draws),
        ]

    def figures(self, scores: Sequence[TextScore]) -> dict[str, float]:
        """The entries of `cells` for one draw, as numbers."""
        numbers = {
            "rise": self.rise(scores),
            "kl": self.kl(scores),
            "kl_error": self.kl_error(scores),
            "bits_per_byte": self.bits_per_byte(scores),
            "second_rise": self.second_rise(scores),
            "second_kl": scores[-1].kl,
        }
        return {name: round(number, 5) for name, number in numbers.items()}

    def kl(self, scores: Sequence[TextScore]) -> float:
        """Mean divergence over the held-out texts."""
        return statistics.mean(s.kl for s in scores[:-1])

    def kl_error(self, scores: Sequence[TextScore]) -> float:
        """Half the 95 % interval of `kl`: windows of a text are drawn independently."""
        variances = [float(s.divergences.var()) / len(s.divergences) for s in scores[:-1]]
        return 1.96 * math.sqrt(sum(variances)) / len(variances)

    def bits_per_byte(self, scores: Sequence[TextScore]) -> float:
        """Mean over the held-out texts."""
        rates = (tokens for _, tokens in self._texts[:-1])
        return statistics.mean(s.loss * rate / math.log(2) for s, rate in zip(scores[:-1], rates, strict=True))

    def note(self) -> str:
        """What the columns mean, with the dense model's figures."""
        names = ", ".join(file.name for file in self.files)
        return (
            f"Held out: {names}; at most {self.windows} windows of {WINDOW} tokens of each text. ΔNLL is in nats per token "
            f"over the dense model's {self.loss(self.dense):.4f}, on the second text, {_shown(self.second)}, over "
            f"{self.dense[-1].loss:.4f}. KL from the dense model is in nats per token. Dense bits per byte: "
            f"{self.bits_per_byte(self.dense):.4f}."
        )

    def _score(self, model: Any, ids: Any, states: Any) -> TextScore:
        import torch

        losses, divergences, same = [], [], 0
        with torch.inference_mode():
            for batch, inputs in zip(ids.split(BATCH), states.split(BATCH), strict=True):
                logits = model(batch, use_cache=False).logits[:, :-1].float()
                losses.append(_losses(logits, batch))
                theirs = self._head(inputs).float()
                same += int((theirs.argmax(-1) == logits.argmax(-1)).sum())
                theirs, mine = theirs.log_softmax(-1), logits.log_softmax(-1)
                each = torch.nn.functional.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1)
                divergences.append(each.double().mean(-1))
        return TextScore(torch.cat(losses), torch.cat(divergences), same / ids[:, 1:].numel())


def options(parser: argparse.ArgumentParser) -> None:
    """Add --heldout, --second and --windows."""
    parser.add_argument("--heldout", nargs="+", default=[str(ROOT / "examples/text/test.txt")])
    parser.add_argument("--second", help="text of another kind, scored too; by default shipped code or prose")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of each text, at most")


def held_out(args: argparse.Namespace) -> HeldOut:
    """The texts that the options name, with MODEL as the dense model; prints its loss."""
    result = HeldOut(args.model, args.heldout, second=args.second, windows=args.windows)
    print(f"dense: {result.loss(result.dense):.5f}", flush=True)
    return result


def token_windows(model: str, file: str | Path, windows: int = WINDOWS) -> tuple[Any, float]:
    """Windows of a text, int64 [windows, 256], and its tokens per byte."""
    import torch

    from compress.models.processors import load_tokenizer

    tokenizer = load_tokenizer(model)
    text = Path(file).read_text(encoding="utf-8")[: windows * WINDOW * 12]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = min(len(ids) // WINDOW, windows)
    if not count:
        raise ValueError(f"{file}: shorter than {WINDOW} tokens")
    ids = ids[: count * WINDOW]
    read = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return ids.view(count, WINDOW), len(ids) / len(read.encode())


def mean_loss(folder: str | Path, texts: Sequence[Any]) -> float:
    """Mean over texts, int64 [windows, 256] each, of a checkpoint's loss per token, nats; for models without a dense one."""
    import torch

    from compress.models.loading import load_model

    model = load_model(folder, dtype="float32")
    with torch.inference_mode():
        return statistics.mean(
            float(
                torch.cat(
                    [_losses(model(b, use_cache=False).logits[:, :-1].float(), b) for b in ids.split(BATCH)]
                ).mean()
            )
            for ids in texts
        )


def calibration(train: str, samples: int) -> dict[str, Any]:
    """What `compress.apply` is told of its data: windows of a text file, or token ids (``file.safetensors:name``)."""
    file, _, name = train.partition(".safetensors:")
    data: Any = [train]
    if name:
        from safetensors.torch import load_file

        data = load_file(f"{file}.safetensors")[name][:samples].long()
    separator = "<|doc|>" if train.endswith(".txt") else None
    return {"data": data, "samples": samples, "length": WINDOW, "document_separator": separator}


def calibration_samples(model: str, train: str, samples: int) -> Any:
    """The calibration samples, `Batches`, that `compress.apply` draws from `calibration` with its default seed."""
    import torch

    from compress.data.batches import Batches
    from compress.data.documents import read_documents
    from compress.data.sampling import sample_windows
    from compress.models.processors import load_tokenizer

    asked = calibration(train, samples)
    if isinstance(asked["data"], torch.Tensor):
        return Batches(asked["data"])
    documents = read_documents(asked["data"], asked["document_separator"], "text", None)
    return sample_windows(load_tokenizer(model), documents, samples, WINDOW, 0)


def _second(files: Sequence[Path]) -> Path:
    folders = {file.resolve().parent for file in files}
    return next(file for file in SECOND if file.parent not in folders)


def _shown(file: Path) -> str:
    """A file's name with its folder: every second name is test.txt."""
    return f"{file.resolve().parent.name}/{file.name}"


def _losses(logits: Any, ids: Any) -> Any:
    """Mean negative log-likelihood of each window, float64 [windows]."""
    import torch

    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return each.double().mean(1)


@contextmanager
def _inputs_of(module: Any) -> Iterator[list[Any]]:
    """Collects what a module reads."""
    read: list[Any] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        yield read
    finally:
        handle.remove()
