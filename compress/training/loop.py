"""The training loop: micro-batches, clipping, masks, weight averages, validation, resume. One process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.distributed import ProcessGroup
from compress.errors import PassError
from compress.progress import Progress
from compress.training.data import Samples
from compress.training.objective import Batch, Objective
from compress.training.optimize import Update, optimizers, set_rate
from compress.training.sharding import is_sharded, norm_of, release
from compress.training.state import RunState, UnusableState, optimizer_tensors
from compress.training.teachers import TeacherSignal

#: Steps between checks that the loss is finite.
_CHECK = 10


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training.

    Attributes:
        steps: optimizer steps.
        batch: samples per step.
        micro: samples per forward pass and process; None for all of the step.
        clip: largest norm of the gradient; None for no limit.
        autocast: ``bfloat16`` or ``float16`` for matrix products.
        average: decay of a moving average of the weights, which is kept instead of them; None for none.
        every: steps between validations; the state is saved there.
        patience: validations without progress before training stops; None to go on.
    """

    steps: int
    batch: int
    update: Update
    micro: int | None = None
    clip: float | None = 1.0
    autocast: str | None = None
    average: float | None = None
    every: int = 50
    patience: int | None = None
    seed: int = 0


@dataclass
class History:
    """Measurements of a training. ``held_out``: rows of step and loss; ``train``: also each loss alone."""

    held_out: list[dict[str, float]] = field(default_factory=list)
    train: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    stopped: str | None = None
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


class Trainer:
    """One training.

    Args:
        objective: holds the student, already sharded if there are several processes.
        masks: by parameter name of the student, bool; False entries stay 0.
        log: called with step and values, for other logs.
    """

    def __init__(
        self,
        objective: Objective,
        teacher_signal: TeacherSignal,
        samples: Samples,
        options: TrainingOptions,
        *,
        device: str,
        progress: Progress,
        state: RunState,
        masks: Mapping[str, Tensor] | None = None,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.objective, self.teacher_signal, self.samples, self.options = objective, teacher_signal, samples, options
        self.device, self.progress, self.state, self.log = device, progress, state, log
        self.processes: ProcessGroup = state.workspace.processes
        student = objective.student
        named = dict(student.named_parameters())
        self.masks = [(named[name], mask) for name, mask in (masks or {}).items()]
        looked_up = [m for m in student.modules() if isinstance(m, torch.nn.Embedding)]
        head = student.get_output_embeddings()
        heads = head if isinstance(head, torch.nn.ModuleList) else [head]  # MusicGen has one for each codebook
        tables = [end.weight for end in (*looked_up, *heads) if end is not None]
        self.optimizers = optimizers(objective, tables, options.update)
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {}
        if options.average is not None:
            self.averages = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.order = samples.order(options.batch, options.seed)
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=options.autocast == "float16")
        self.history = History()

    def run(self) -> History:
        """Train, and leave the best weights in the student.

        Raises:
            PassError: the loss is not finite.
            UnusableState: a state on disk is damaged. The weights are undefined then; training can begin anew.
        """
        options, start = self.options, 0
        if (saved := self.state.find()) is not None:
            start = self._resume(saved)
            self.progress.message(f"training continues from step {start}")
        else:
            self._validate(0)
        self.objective.train()
        sums = torch.zeros(1 + len(self.objective.terms.names), device=self.device)
        since, begun = 0, time.perf_counter()
        seconds = self.history.seconds
        with self.progress.task("training", options.steps - start, "steps") as task:
            for step in range(start, options.steps):
                if self.history.stopped is not None:
                    break
                sums += self._step(step)
                since += 1
                if (step + 1) % _CHECK == 0 or (step + 1) % options.every == 0 or step + 1 == options.steps:
                    self.history.seconds = seconds + time.perf_counter() - begun
                    note = self._note(step + 1, sums / since)
                    sums.zero_()
                    since = 0
                else:
                    note = ""
                if (step + 1) % options.every == 0 or step + 1 == options.steps:
                    self._validate(step + 1)
                task.advance(1, note)
        self.state.workspace.processes.barrier()
        self._take_best()
        self.objective.eval()
        return self.history

    def _step(self, step: int) -> Tensor:
        """One optimizer step. Returns the losses of its samples over all processes, as `Objective` does."""
        options, world, rank = self.options, self.processes.world, self.processes.rank
        taken = self.order.step(step)
        set_rate(self.optimizers, options.update.rate * options.update.factor(step, options.steps))
        torch.manual_seed(((options.seed * 1_000_003 + step) * 1_009 + rank) % (1 << 63))
        total: Tensor | None = None
        scale = float(self.scaler.get_scale()) if self.scaler.is_enabled() else 1.0
        for batch in self._batches(taken):
            with self._autocast():
                values = self.objective(batch, self.teacher_signal(batch), scale)
            # sharded gradients are means over processes, and each process has its share of the step
            self.scaler.scale(values[0] * (world if is_sharded(self.objective) else 1)).backward()
            total = values.detach() if total is None else total + values.detach()
        assert total is not None
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self._mask_gradients()
        if options.clip is not None or self.scaler.is_enabled():
            norm = norm_of(list(self.parameters.values()))
        if options.clip is not None:
            factor = (options.clip / (norm + 1e-6)).clamp(max=1.0)
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        # after an overflow no optimizer may step; the scaler alone would skip only the one that holds the gradient
        if not self.scaler.is_enabled() or bool(norm.isfinite()):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._mask_weights()
        if options.average is not None:
            for name, parameter in self.parameters.items():
                self.averages[name].lerp_(parameter.detach(), 1 - options.average)
        self.history.tokens += batch.tokens
        self.history.steps = step + 1
        self.processes.all_reduce(total)
        return total

    def _batches(self, taken: Sequence[tuple[int, int]]) -> Iterator[Batch]:
        """Batches of this process's part of the samples. Every process gets the same number of batches."""
        counts = self.samples.counts(taken)
        world = self.processes.world
        mine, share = taken[self.processes.rank :: world], -(-len(taken) // world)
        micro = self.options.micro or -(-self.options.batch // world)
        for begin in range(0, share, micro):
            size = min(micro, share - begin)
            yield self.samples.batch(mine[begin : begin + size], counts, self.device, size)

    def _autocast(self) -> Any:
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.options.autocast))

    @torch.no_grad()
    def _mask_gradients(self) -> None:
        for parameter, mask in self.masks:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def _mask_weights(self) -> None:
        for parameter, mask in self.masks:
            parameter.mul_(mask)

    def _note(self, step: int, means: Tensor) -> str:
        """Record the mean losses of the last steps; return them as text. Raises `PassError` if one is not finite."""
        values = means.tolist()
        if not all(map(math.isfinite, values)):
            raise self._diverged(values[0], step)
        row = {"step": step, "loss": values[0], **dict(zip(self.objective.terms.names, values[1:], strict=True))}
        self.history.train.append(row)
        if self.log is not None:
            self.log(step, {k: v for k, v in row.items() if k != "step"})
        speed = self.history.tokens / max(self.history.seconds, 1e-9)
        return f"loss {values[0]:.4f} · {speed:,.0f} tokens/s"

    def _diverged(self, loss: float, step: int) -> PassError:
        if not self.history.held_out:
            return PassError(f"the loss is {loss} before any training: the student or a teacher is broken")
        return PassError(
            f"training diverged: the loss is {loss} at step {step}, and was {self.history.held_out[-1]['loss']:.4g} at step "
            f"{self.history.held_out[-1]['step']:.0f}",
            key="learning_rate",
            fix="lower `learning_rate`",
        )

    def _validate(self, step: int) -> None:
        """Measure the held-out loss, save the weights if they are the best, and save the state."""
        loss = self.held_out_loss()
        held = self.history.held_out
        if not math.isfinite(loss):
            raise self._diverged(loss, step)
        lowest = min((row["loss"] for row in held), default=math.inf)
        held.append({"step": step, "loss": loss})
        if self.log is not None:
            self.log(step, {"held_out": loss})
        if loss < lowest:
            self.history.best_step = step
            self.state.save(f"best-{step}", self._weights())
        patience = self.options.patience
        if patience is not None and step - self.history.best_step >= patience * self.options.every:
            self.history.stopped = f"no progress on held-out samples since step {self.history.best_step}"
        progress = {"step": step, "history": vars(self.history), "scaler": self.scaler.state_dict()}
        self.state.save(f"step-{step}", self._tensors(), progress)
        self.state.keep([f"step-{step}", f"best-{self.history.best_step}"])

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Validation loss of the weights that would be saved."""
        training = self.objective.training
        self.objective.eval()
        swapped = self._swap()
        total = torch.zeros((), device=self.device)
        for batch in self._batches(self.samples.held):
            with self._autocast():
                total += self.objective(batch, self.teacher_signal(batch))[0]
        release(self.objective)
        self._swap(swapped)
        self.objective.train(training)
        self.processes.all_reduce(total)
        return float(total)

    def _swap(self, kept: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Replace weights by their averages and return the weights; or restore ``kept`` weights."""
        source = self.averages if kept is None else kept
        before = {name: self.parameters[name].detach().clone() for name in source} if kept is None else {}
        with torch.no_grad():
            for name, value in source.items():
                self.parameters[name].copy_(value)
        if kept is None:
            self._mask_weights()
        return before

    def _weights(self) -> dict[str, Tensor]:
        """The weights that would be saved, of student and projections."""
        return dict(self.averages) if self.averages else {n: p.detach() for n, p in self.parameters.items()}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {n: p.detach() for n, p in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.averages.items()}
        return tensors | optimizer_tensors(self.optimizers)

    def _resume(self, saved: Mapping[str, Any]) -> int:
        self.state.load(str(saved["state"]), self._tensors())
        try:
            self.history = History(**saved["history"])
            self.scaler.load_state_dict(dict(saved["scaler"]))
            return int(saved["step"])
        except (TypeError, KeyError, ValueError, RuntimeError) as error:  # of another version
            raise UnusableState(str(saved["state"])) from error

    def _take_best(self) -> None:
        """Load the best weights into the student."""
        weights = {n: p.detach() for n, p in self.parameters.items()}
        self.state.load(f"best-{self.history.best_step}", weights)
        self._mask_weights()
