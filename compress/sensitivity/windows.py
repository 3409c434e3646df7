"""The expected loss of windows: one forward and one backward pass over calibration samples, one block in memory at a time.

While gradients go back through a block, its attention function shows queries, keys and values after rotation. Under each
window the heads' outputs are computed again and multiplied by the gradient at the original's outputs. The mathematics is in
`compress.solvers.windows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from compress.blockwise.executor import BlockExecutor
from compress.errors import PassError
from compress.progress import Progress
from compress.sensitivity.attention import AttentionCall, Sight, observed_attention, under_windows
from compress.sensitivity.output_curvature import Gradients
from compress.solvers import windows as solver
from compress.workspace import Workspace


@dataclass(frozen=True)
class WindowLosses:
    """Losses that windows are expected to cost.

    Attributes:
        joint: loss of each pair of (unit, window), nats per token, float64; see `solver.losses`. Units are blocks, or the KV
            groups of all blocks, in order.
        logits: by block and window, the logit of each head; empty for a window without logits.
        values: by block, what each KV head's sink adds for its share: the mean value of the samples' first tokens.
        noise: variance of each of the joint losses; see `solver.noise`.
    """

    joint: torch.Tensor
    logits: list[list[list[float]]]
    values: list[list[list[float]]]
    noise: torch.Tensor

    def of(self, rows: Sequence[int], windows: int) -> torch.Tensor:
        """The joint losses of some units of so many windows, for a choice among them; see `solver.shrunk`."""
        at = list(rows)
        return solver.shrunk(self.joint[at][:, at], self.noise[at][:, at], windows)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        fields = {"logits": self.logits, "values": self.values}
        return {"joint": self.joint.tolist(), "noise": self.noise.tolist(), **fields}

    @staticmethod
    def from_json(value: dict[str, Any]) -> WindowLosses:
        """From `to_json`."""
        joint, noise = (torch.tensor(value[name], dtype=torch.float64) for name in ("joint", "noise"))
        return WindowLosses(joint, value["logits"], value["values"], noise)


def window_losses(
    executor: BlockExecutor,
    sights: Sequence[Sight],
    *,
    by: Literal["layers", "heads"],
    weights: torch.Tensor | None = None,
    workspace: Workspace,
    progress: Progress,
) -> WindowLosses:
    """Measure each window in each block, or in each KV group, on the first samples (see `Gradients`).

    Args:
        executor: of the original, after `learn_calls`.
        sights: windows; where one has logits, they are searched, and the loss is that under them.
        weights: what a token counts in the losses, [samples, length]; None for 1 each.

    Raises:
        PassError: the model predicts no tokens, its attention cannot be reached, or there are more processes than samples.
    """
    if executor.samples < executor.processes.world:
        raise PassError(f"{executor.samples} calibration samples are fewer than {executor.processes.world} processes")
    visitor = _Visitor(executor, sights, by, weights)
    gradients = Gradients(executor, workspace, progress, visitor)
    visitor.samples = gradients.samples
    gradients.measure()
    if not gradients.known:
        raise PassError("measuring windows needs a model that predicts tokens", key="choose", fix="set `choose: every`")
    return visitor.result()


class _Visitor:
    """Turns the products of heads and gradients, one block at a time, into changes of the log-likelihood by token."""

    samples: int

    def __init__(self, executor: BlockExecutor, sights: Sequence[Sight], by: str, weights: torch.Tensor | None) -> None:
        self._executor, self._sights, self._by, self._weights = executor, sights, by, weights
        self._products: _Products | None = None
        self._changes: dict[int, torch.Tensor] = {}  # by block: [units, windows, tokens]
        self._searched: dict[int, list[list[float]]] = {}
        self._values: dict[int, torch.Tensor] = {}  # by block: [KV heads, width], once it was run forwards

    @contextmanager
    def ahead(self, index: int) -> Iterator[None]:
        calls: list[torch.Tensor] = []
        with observed_attention(lambda call: calls.append(call.value[:, :, 0].double())):
            yield
        if calls:
            total = torch.cat(calls).sum(0)
            self._executor.processes.all_reduce(total)  # each process has samples of its own
            self._values[index] = (total / self.samples).float()

    @contextmanager
    def around(self, index: int, module: Any, rows: Sequence[int]) -> Iterator[None]:
        calls: list[AttentionCall] = []

        def observe(call: AttentionCall) -> None:
            calls.append(call)
            if self._products is None:
                self._products = _Products(self._executor, call, self._sights, self.samples, self._values[index])
            products = self._products
            call.output.register_hook(lambda g: products.add(rows, call, g))  # type: ignore[no-untyped-call]

        with observed_attention(observe):
            yield
        if len(calls) != 1:
            raise PassError(
                f"block {index} does not call its attention once, through transformers' interface: windows cannot be measured",
                key="choose",
                fix="set `choose: every` and `sinks: 0`",
            )

    def finish(self, index: int) -> None:
        assert self._products is not None
        groups = self._products.groups if self._by == "heads" else 1
        changes, searched = [], []
        for sight, products in zip(self._sights, self._products.by_window(), strict=True):
            logits = solver.sink_logits(products, groups) if sight.logits else None
            searched.append([] if logits is None else logits.tolist())
            changes.append(_grouped(products.changes(logits), groups))
        self._changes[index], self._searched[index] = torch.stack(changes, 1), searched
        self._products = None

    def result(self) -> WindowLosses:
        depth = range(self._executor.depth)
        changes = torch.cat([self._changes[i].flatten(0, 1) for i in depth])
        counts = self._counts().flatten().to(changes.device)
        return WindowLosses(
            solver.losses(changes, counts).cpu(),
            [self._searched[i] for i in depth],
            [self._values[i].tolist() for i in depth],
            solver.noise(changes, counts).cpu(),
        )

    def _counts(self) -> torch.Tensor:
        """The weight of each token, float64 [samples, tokens]; zero for padding."""
        mask = self._executor.token_mask(range(self.samples))
        counts = torch.ones(self.samples, self._executor.inputs.length, dtype=torch.float64)
        counts = counts if self._weights is None else self._weights[: self.samples].to(counts)
        return counts if mask is None else counts * mask.to(counts)


def _grouped(changes: torch.Tensor, groups: int) -> torch.Tensor:
    """Sums over the heads of each group, [groups, tokens]."""
    return changes.view(groups, -1, changes.shape[-1]).sum(1)


class _Products:
    """Products with gradients of one block, for all samples; each process fills in its own, and zeros stand elsewhere."""

    def __init__(
        self, executor: BlockExecutor, call: AttentionCall, sights: Sequence[Sight], samples: int, values: torch.Tensor
    ) -> None:
        heads, self.groups, length = call.query.shape[1], call.key.shape[1], call.query.shape[2]
        device, windows = call.query.device, len(sights)
        self._executor, self._sights = executor, sights
        self._values = values.repeat_interleave(heads // self.groups, 0)
        self._full = torch.zeros(heads, samples, length, device=device)
        self._sunk = torch.zeros(heads, samples, length, device=device)
        self._kept = torch.zeros(windows, heads, samples, length, device=device)
        self._mass = torch.zeros(windows, heads, samples, length, device=device)
        self._lost = torch.zeros(2, windows, heads, dtype=torch.float64, device=device)  # sum and count

    def add(self, rows: Sequence[int], call: AttentionCall, gradient: torch.Tensor) -> None:
        """Add samples, given the gradient at the heads' outputs [samples, tokens, heads, width]."""
        g = gradient.detach().float().transpose(1, 2)
        if (mask := self._executor.token_mask(rows)) is not None:
            g = g * mask[:, None, :, None]
        at = list(rows)
        self._full[:, at] = (g * call.output.detach().float().transpose(1, 2)).sum(-1).transpose(0, 1)
        self._sunk[:, at] = (g * self._values[:, None]).sum(-1).transpose(0, 1)
        for queries, results in under_windows(call, self._sights):
            counts = None if mask is None else mask[:, None, queries]
            for number, heads in enumerate(results):
                output, mass = heads.output, heads.mass
                if call.sinks is not None and not self._sights[number].logits:
                    output = output * torch.sigmoid(mass - call.sinks[:, None])[..., None]
                self._kept[number, :, at, queries] = (g[:, :, queries] * output).sum(-1).transpose(0, 1)
                self._mass[number, :, at, queries] = mass.transpose(0, 1)
                dropped = torch.isfinite(heads.lost)
                dropped = dropped if counts is None else dropped & counts
                self._lost[0, number] += torch.where(dropped, heads.lost, 0).double().sum((0, 2))
                self._lost[1, number] += dropped.sum((0, 2))

    def by_window(self) -> Iterator[solver.HeadProducts]:
        """Products for the solver, for each window."""
        self._executor.processes.all_reduce(self._full, self._sunk, self._kept, self._mass, self._lost)
        start = (self._lost[0] / self._lost[1]).float()
        start[self._lost[1] == 0] = -torch.inf
        for number in range(len(self._kept)):
            kept, mass = self._kept[number].flatten(1), self._mass[number].flatten(1)
            yield solver.HeadProducts(self._full.flatten(1), kept, mass, start[number], self._sunk.flatten(1))
