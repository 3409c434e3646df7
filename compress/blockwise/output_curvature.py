"""Which errors at the outputs of a block's matrices matter to the model's prediction, with one block in memory at a time.

Before a sweep, some samples go through the original forwards, block by block, a token is drawn from each prediction, and the
gradient of its log-likelihood goes back the same way; what arrives at the output of every block is kept in a file. In the
sweep, a block carries it on to the outputs of its matrices: Σ g gᵀ there is K-FAC's factor of the Fisher information by
outputs (Martens and Grosse 2015, arXiv 1503.05671).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from compress.blockwise.activations import Activations
from compress.blockwise.linears import record_outputs, unfused
from compress.blockwise.memory_budget import GRADIENT_TOKENS, LOGITS_PER_CHUNK, curvatures_that_fit
from compress.errors import CheckpointError
from compress.models.loading import arguments_of

if TYPE_CHECKING:
    from compress.blockwise.runner import Block, BlockRunner


def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Labels drawn from what logits [N, classes] predict, int64 [N].

    Raises:
        CheckpointError: NaN or infinite logits.
    """
    if not torch.isfinite(logits).all():
        raise CheckpointError("the model predicts NaN or infinite values on a calibration sample")
    return torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]


class Gradients:
    """Gradients at the outputs of every block of a sweep's original, for the first samples.

    Attributes:
        known: whether there are any: the model has a head that predicts tokens. Said by `measure`.
    """

    def __init__(self, runner: BlockRunner, work: Path) -> None:
        self.runner, self.work, self.known = runner, work, False
        length = next(iter(runner.inputs.values.values())).shape[1:].numel()
        self._samples = min(-(-GRADIENT_TOKENS // max(1, length)), runner.inputs.samples)

    def batches(self) -> Iterator[list[int]]:
        """Numbers of this process's samples that have gradients, a batch at a time."""
        return self.runner.batches(self._samples)

    def measure(self) -> None:
        """Go through the model forwards and back; nothing where an earlier run of the sweep has."""
        runner, done = self.runner, self.work / "done"
        model: Any = runner.streamed.model
        self.known = (
            runner.streamed.record.has_head(runner.checkpoint.spec) and model.get_output_embeddings() is not None
        )
        if not self.known or runner.processes.broadcast_object(0, done.exists()):
            return
        shape = tuple(runner.first_hidden([0]).shape[1:])
        inputs = [self._file(f"inputs{i}", shape) for i in range(runner.depth + 1)]
        with runner.progress.task("measuring which outputs matter", 2 * runner.depth, "blocks") as task:
            for rows in self.batches():
                inputs[0].write(rows, runner.first_hidden(rows))
            for index in range(runner.depth):
                with torch.no_grad(), runner.streamed.block(index) as module:
                    for rows in self.batches():
                        hidden = inputs[index].read(rows).to(runner.device)
                        inputs[index + 1].write(rows, runner.through(index, module, rows, hidden))
                task.advance()
            later = self._file(f"{runner.depth - 1}", shape)
            with runner.streamed.head():
                for rows in self.batches():
                    for row in rows:
                        later.write([row], self._at_the_end(row, inputs[-1].read([row]).to(runner.device)))
            task.advance()
            for index in reversed(range(1, runner.depth)):
                earlier = self._file(f"{index - 1}", shape)
                with runner.streamed.block(index) as module:
                    for rows in self.batches():
                        hidden = inputs[index].read(rows).to(runner.device).requires_grad_()
                        with torch.enable_grad():
                            output = runner.through(index, module, rows, hidden)
                        (found,) = torch.autograd.grad(output, hidden, later.read(rows).to(output))
                        earlier.write(rows, found)
                later.sync()
                later.close()
                _drop(inputs.pop())
                later = earlier
                task.advance()
        later.sync()
        later.close()
        for file in inputs:
            _drop(file)
        runner.processes.barrier()
        if not runner.processes.rank:
            done.touch()
        runner.processes.barrier()

    def _file(self, name: str, shape: Sequence[int]) -> Activations:
        return Activations(self.work / f"{name}.act", self._samples, shape, self.runner.dtype)

    def _at_the_end(self, row: int, hidden: torch.Tensor) -> torch.Tensor:
        """Gradient at the last block's output of one sample, of tokens drawn from what it predicts."""
        runner, mask = self.runner, self.runner.mask([row])
        hidden.requires_grad_()
        generator = torch.Generator(runner.device).manual_seed(runner.seed * 1_000_003 + row)
        length = hidden.shape[1]
        some = "logits_to_keep" in arguments_of(runner.streamed.model)
        step = LOGITS_PER_CHUNK if some else length
        for start in range(0, length, step):
            positions = torch.arange(start, min(start + step, length), device=runner.device)
            with torch.enable_grad():
                logits = runner.predict([row], hidden, {"logits_to_keep": positions} if some else {})[0].float()
                losses = cross_entropy(logits, draw(logits, generator), reduction="none")
                (losses if mask is None else losses[mask[0, positions]]).sum().backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        return hidden.grad

    def by_outputs(self, block: Block) -> dict[str, torch.Tensor]:
        """Σ g gᵀ over tokens, float32 [O, O], at the outputs of sites of a block that is still as it came.

        Of those that every token passes once (no experts), from the narrowest on as many as `curvatures_that_fit` says.
        """
        if not self.known or block.originals is None:
            return {}
        linears = sorted((s for s in block.linears if s.owner is None), key=lambda s: len(s.weight))
        wanted = linears[: len(curvatures_that_fit([len(s.weight) for s in linears]))]
        if not wanted:
            return {}
        sums = {s.name: torch.zeros(len(s.weight), len(s.weight), device=s.weight.device) for s in wanted}
        gradients = self._file(f"{block.index}", block.originals.shape)
        for rows in self.batches():
            mask = self.runner.mask(rows)
            hidden = block.originals.read(rows).to(self.runner.device).requires_grad_()
            with torch.enable_grad(), unfused(block.swaps), record_outputs(wanted) as outputs:
                whole = block.forward(rows, hidden)
            parts = {n: found[0] for n, found in outputs.items() if len(found) == 1}
            upstream = gradients.read(rows).to(whole)
            found = torch.autograd.grad(whole, list(parts.values()), upstream, allow_unused=True)
            for name, gradient in zip(parts, found, strict=True):
                if gradient is not None:
                    g = gradient.reshape(-1, gradient.shape[-1]).float()
                    g = g if mask is None else g[mask.flatten()]
                    sums[name].addmm_(g.T, g)
        gradients.close()
        self.runner.processes.all_reduce(*sums.values())
        return {name: total for name, total in sums.items() if float(total.diagonal().sum()) > 0}


def _drop(file: Activations) -> None:
    file.close()
    file.path.unlink(missing_ok=True)  # other processes have it open, for rows of their own
