"""What was written, judged by transformers in a process that has never imported this package."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.families import stock
from benchmarks.families.pico import Pico

#: Largest difference of outputs, relative to the larger of 1 and the largest value.
TOLERANCE = 1e-4
#: A lossy pass changes outputs by more than this, relative to the largest value.
CHANGE = 1e-7
#: Classes give larger values to tokens that they rule out.
MASKED = 1e30


class Wrong(Exception):
    """A result that transformers does not confirm."""


class Stock:
    """A process that answers requests; it is started when first asked, and again after it died or did not answer.

    Args:
        script: what it runs. python: the interpreter.
    """

    #: Seconds to wait for an answer.
    patience = 120

    def __init__(self, script: str = stock.__file__, python: str = sys.executable) -> None:
        self._command = [python, "-I", script]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> tuple[TextIO, TextIO]:
        """Start the process if there is none; where requests are written, and answers read."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None  # noqa: PT018
        return requests, answers  # type: ignore[return-value]

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; its ``error`` says what transformers raised."""
        requests, answers = self.start()
        try:
            print(json.dumps(request), file=requests, flush=True)
            if select.select([answers], [], [], self.patience)[0] and (line := answers.readline()):
                answer: dict[str, Any] = json.loads(line)
                return answer
        except BrokenPipeError:
            pass
        except BaseException:  # an answer that nobody has read would be taken for the next
            self.close()
            raise
        self.close()
        return {"error": "the process died or did not answer", "at": ""}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Judge:
    """Compares what this package loads with what transformers loads. Methods raise `Wrong`.

    Args:
        place: folder for files between the processes.
    """

    def __init__(self, process: Stock, place: Path) -> None:
        self._process = process
        self._place = place

    def original(self, pico: Pico) -> None:
        """Have transformers reload the pico checkpoint, which outputs are compared with; `Wrong` where it cannot itself."""
        answer = self._outputs(pico.folder, pico, self._place / "original.pt", twice=True)
        if not bool(torch.load(self._place / "original.pt").isfinite().all()):
            raise Wrong("outputs are not finite")
        if answer["random"]:
            raise Wrong("outputs are random")

    def written(self, folder: Path, pico: Pico, *, lossy: bool) -> None:
        """Judge a written checkpoint: keys, outputs of both loaders, and that they differ from the original's if ``lossy``."""
        import compress

        model = compress.load(folder, attention=None)
        ours = stock.computed(model, torch.load(pico.inputs))
        self._outputs(folder, pico, self._place / "outputs.pt")
        theirs = torch.load(self._place / "outputs.pt")
        if ours.shape != theirs.shape:
            raise Wrong(f"outputs of shape {tuple(ours.shape)} here, {tuple(theirs.shape)} by transformers")
        if not bool(ours.isfinite().all()):
            raise Wrong("outputs are not finite")
        if (difference := _difference(ours, theirs)) > TOLERANCE:
            raise Wrong(f"outputs differ from those of the stock reload by {difference:.2g}")
        original = torch.load(self._place / "original.pt")
        if lossy and original.shape == ours.shape and _difference(original, ours) <= CHANGE:
            raise Wrong("nothing has changed")

    def perplexity(self, pico: Pico, nats: float, tokens: int) -> None:
        """Judge the sum of negative log-likelihoods of the text, and the number of tokens."""
        answer = self._process.ask(task="perplexity", text=str(pico.text), **_request(pico.folder, pico))
        _check(answer)
        if answer["tokens"] != tokens or abs(answer["nats"] - nats) > 1e-3 * abs(answer["nats"]):
            raise Wrong(
                f"{nats:.4f} nats of {tokens} tokens, {answer['nats']:.4f} of {answer['tokens']} by transformers"
            )

    def _outputs(self, folder: Path, pico: Pico, to: Path, **options: Any) -> dict[str, Any]:
        """Have transformers write its outputs to a file; its answer."""
        to.unlink(missing_ok=True)
        request = {**_request(folder, pico), "inputs": str(pico.inputs), "outputs": str(to), **options}
        answer = self._process.ask(task="outputs", **request)
        _check(answer)
        return answer


def _request(folder: Path, pico: Pico) -> dict[str, Any]:
    return {"folder": str(folder), "class": pico.class_name}


def _check(answer: dict[str, Any]) -> None:
    if "error" in answer:
        raise Wrong(f"the stock reload failed: {answer['error']} ({Path(answer['at']).name})")
    if answer["keys"]:
        kind, names = next(iter(answer["keys"].items()))
        raise Wrong(f"{len(names)} {kind.replace('_', ' ')} for transformers, such as {names[0]}")


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    masked = a.abs() > MASKED
    if not torch.equal(masked, b.abs() > MASKED):
        return float("inf")
    a, b = a[~masked], b[~masked]
    return float((a - b).abs().max()) / max(1.0, float(a.abs().max())) if a.numel() else 0.0
