"""Curvature of the loss by the outputs of a block's matrices, with one block in memory at a time.

Before a run over the blocks, some samples go through the original forwards, block by block; a token is drawn from each
prediction, and the gradient of its log-likelihood goes back the same way. The gradient at the output of every block is kept
in a file. During the run, a block carries it on to the outputs of its matrices: Σ g gᵀ there is K-FAC's factor of the Fisher
information by outputs (Martens and Grosse 2015, arXiv 1503.05671).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from compress.blockwise.activations import Activations, ActivationStream, BlockStreams
from compress.blockwise.block import Block
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.experts import unfused
from compress.blockwise.hessians import counted, tensor_cores
from compress.blockwise.linears import TargetLinear, record_outputs
from compress.blockwise.memory_budget import GRADIENT_TOKENS, LOGITS_PER_CHUNK, curvatures_that_fit
from compress.models.classes import arguments_of
from compress.progress import Progress
from compress.sensitivity.labels import draw
from compress.workspace import Workspace


class Visitor(Protocol):
    """Sees each block on the way forwards, then as gradients go back through it, from the last one on."""

    def ahead(self, index: int) -> AbstractContextManager[None]:
        """Put around the forward pass of all of this process's samples through a loaded block."""
        ...

    def around(self, index: int, module: Any, rows: Sequence[int]) -> AbstractContextManager[None]:
        """Put around the forward and backward pass of those samples through a loaded block."""
        ...

    def finish(self, index: int) -> None:
        """All of this process's samples went through block ``index``."""
        ...


class Gradients:
    """Gradients at the outputs of every block of the original, for the first samples.

    Args:
        visitor: sees every block at work, also the first; gradients are then not kept, and a killed run starts again.
        tokens: gradients of as many are measured, rounded up to whole samples.

    Attributes:
        first: number of the first block that has gradients; those of an encoder in front of a decoder have none.
        known: whether there are any, which needs a head that predicts tokens; set by `measure`.
        samples: number of the first samples that are used.
    """

    def __init__(
        self,
        executor: BlockExecutor,
        workspace: Workspace,
        progress: Progress,
        visitor: Visitor | None = None,
        *,
        tokens: int = GRADIENT_TOKENS,
    ) -> None:
        self.executor, self.workspace, self.progress, self.known = executor, workspace, progress, False
        self._visitor, self._view = visitor, executor
        self.first = executor.streamed.lists[-1].first
        self.samples = min(-(-tokens // max(1, executor.inputs.length)), executor.samples)

    def measure(self) -> None:
        """Run the model forwards and backwards, unless an earlier run has."""
        executor = self.executor
        self._view = executor.beside()  # blocks change later, and with them what a decoder's read of the encoder
        model: Any = executor.streamed.model
        has_head = executor.streamed.record.has_head(executor.checkpoint.spec)
        self.known = has_head and model.get_output_embeddings() is not None
        visited = self._visitor is not None
        if not self.known or (not visited and self.workspace.done("gradients")):
            return
        depth, begin = executor.depth, self.first
        inputs = executor.open_stream(self.workspace.path, "inputs", first=self.samples, files=depth + 1)
        with self.progress.task("measuring which outputs matter", 2 * depth - begin + visited, "blocks") as task:
            for index in range(depth):
                self._ahead(index, inputs)
                task.advance()
            gradients = self._open(inputs.before(begin).shape)
            self._at_the_end(inputs.after(depth - 1), gradients.before(depth - 1))
            task.advance()
            inputs.release_after(depth - 1)
            for index in reversed(range(begin if visited else begin + 1, depth)):
                self._one_block_back(index, inputs.before(index), gradients)
                inputs.release_before(index)
                task.advance()
        if not visited:
            gradients.before(begin).sync()
        gradients.close()
        inputs.release_before(begin)
        for one in executor.streamed.lists[:-1]:
            inputs.release_after(one.end - 1)
        if not visited:
            self.workspace.finish("gradients")

    def _ahead(self, index: int, inputs: BlockStreams) -> None:
        """Write the outputs of a block of the original."""
        view, visitor = self._view, self._visitor
        if view.is_first(index):
            view.enter(index, inputs, self.samples)
        before, around = inputs.before(index), visitor.ahead(index) if visitor else nullcontext()
        with view.streamed.block(index) as module, around, self._tiles(before):
            view.write_outputs(index, module, before, inputs.after(index), first=self.samples)
        if index < self.first:
            inputs.release_before(index)

    def _tiles(self, states: Activations) -> AbstractContextManager[None]:
        """Products may round to bfloat16: labels that are drawn are far noisier."""
        return tensor_cores(torch.empty(0, states.shape[-1], device=self.executor.device), tiles=True)

    def _open(self, shape: Sequence[int]) -> ActivationStream:
        """Files of the gradients at each block's output, by the block's number."""
        executor = self.executor
        shapes = [tuple(shape)] * executor.depth
        return ActivationStream(self.workspace.path, "", self.samples, shapes, executor.dtype, files=executor.depth)

    def _at_the_end(self, hidden: Activations, gradients: Activations) -> None:
        """Write the gradients at the last block's output."""
        with self.executor.streamed.head(), self._tiles(hidden):
            for rows in self.executor.batches(self.samples):
                for row in rows:
                    gradients.write([row], self._of_sample(row, hidden.read([row]).to(self.executor.device)))

    def _one_block_back(self, index: int, inputs: Activations, gradients: ActivationStream) -> None:
        """Write the gradients at a block's input, which are those at the output of the block before it."""
        executor, later, visitor = self._view, gradients.before(index), self._visitor
        with executor.streamed.block(index) as module, self._tiles(inputs):
            for rows in executor.batches(self.samples):
                hidden = inputs.read(rows).to(executor.device).requires_grad_()
                with visitor.around(index, module, rows) if visitor else nullcontext():
                    with torch.enable_grad():
                        output = executor.forward(index, module, rows, hidden)
                    (gradient,) = torch.autograd.grad(output, hidden, later.read(rows).to(output))
                if index > self.first:
                    gradients.before(index - 1).write(rows, gradient)
        if visitor:
            visitor.finish(index)
        later.sync()
        gradients.release(index, delete=visitor is not None)

    def _of_sample(self, row: int, hidden: torch.Tensor) -> torch.Tensor:
        """Gradient at the last block's output of one sample, of tokens drawn from the model's predictions."""
        executor = self._view
        mask = executor.token_mask([row], executor.depth - 1)
        hidden.requires_grad_()
        generator = torch.Generator(executor.device).manual_seed(executor.seed * 1_000_003 + row)
        length = hidden.shape[1]
        # a class may read tokens of its own in front of the text, and predict none of these
        some = "logits_to_keep" in arguments_of(executor.streamed.model) and length == executor.inputs.length
        step = LOGITS_PER_CHUNK if some else length
        for start in range(0, length, step):
            positions = torch.arange(start, min(start + step, length), device=executor.device)
            with torch.enable_grad():
                logits = executor.logits([row], hidden, {"logits_to_keep": positions} if some else {})[0].float()
                losses = cross_entropy(logits, draw(logits, generator), reduction="none")
                kept = losses if mask is None else losses[mask[0, positions[: len(losses)]]]
                kept.sum().backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        return hidden.grad

    def at(
        self, block: Block, linears: Sequence[TargetLinear], states: Activations
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Yield numbers of samples, and the gradients at the outputs of linears of a block by name, float32 [T, O].

        Of tokens that count, and of linears that are called once; another linear has none. Before each yield the block runs
        forwards once, on those samples, so hooks on its modules see their inputs.

        Args:
            states: hidden states in front of the block; with the original's, the gradients are exact.
        """
        stream = self._open(states.shape)
        upstream = stream.before(block.index)
        for rows in self.executor.batches(self.samples):
            masks = block.token_masks(rows)
            hidden = states.read(rows).to(self.executor.device).requires_grad_()
            with torch.enable_grad(), unfused(block.swaps), record_outputs(linears) as outputs:
                forward = block.forward_original if states is block.originals else block.forward
                output = forward(rows, hidden)
            once = {name: calls[0] for name, calls in outputs.items() if len(calls) == 1 and calls[0].requires_grad}
            gradients: Sequence[torch.Tensor | None] = ()
            if once:
                gradients = torch.autograd.grad(
                    output, list(once.values()), upstream.read(rows).to(output), allow_unused=True
                )
            result, by_name = {}, {linear.name: linear for linear in linears}
            for name, gradient in zip(once, gradients, strict=True):
                if gradient is not None:
                    result[name] = counted(by_name[name].rows(gradient).float(), masks)
            yield rows, result
        stream.close()

    def replay(self, block: Block) -> Iterator[list[int]]:
        """Run the block forwards and backwards on its inputs, and yield numbers of samples after each batch of them.

        Hooks on its modules see inputs, and gradients at the nodes that made their outputs. Padding has none.
        """
        stream = self._open(block.inputs.shape)
        upstream = stream.before(block.index)
        for rows in self.executor.batches(self.samples):
            hidden = block.read_inputs(rows).requires_grad_()
            with torch.enable_grad(), unfused(block.swaps), self._tiles(block.inputs):
                output = block.forward(rows, hidden)
                torch.autograd.grad(output, hidden, upstream.read(rows).to(output))
            yield rows
        stream.close()

    def by_outputs(self, block: Block) -> dict[str, torch.Tensor]:
        """Σ g gᵀ over tokens, float32 [O, O], at the outputs of a block's linears, by name; the block must be unchanged.

        Only of linears that every token passes once (no experts); from the narrowest on as many as `curvatures_that_fit`.
        """
        if not self.known or block.originals is None or block.index < self.first:
            return {}
        everywhere = (s for s in block.linears if s.owner is None and not s.routed and not s.kernel)
        linears = sorted(everywhere, key=lambda s: len(s.weight))
        wanted = linears[: len(curvatures_that_fit([len(s.weight) for s in linears]))]
        if not wanted:
            return {}
        sums = {s.name: torch.zeros(len(s.weight), len(s.weight), device=s.weight.device) for s in wanted}
        for _, gradients in self.at(block, wanted, block.originals):
            for name, g in gradients.items():
                if g.shape[1] == len(sums[name]):  # a layer may give each group of inputs some of its outputs
                    sums[name].addmm_(g.T, g)
        self.executor.processes.all_reduce(*sums.values())
        return {name: total for name, total in sums.items() if float(total.diagonal().sum()) > 0}
