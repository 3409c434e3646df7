"""Logits of sinks, refined together by gradient steps towards the original's predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import LOGITS_PER_CHUNK
from compress.passes.base import Context
from compress.passes.local_attention.choose import Windows
from compress.passes.local_attention.divergence import samples
from compress.passes.local_attention.settings import LocalAttentionSettings

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.sensitivity.samples import Sample
    from compress.training.features import FeatureModel

#: Adam's first step, in nats; it falls linearly to zero.
_RATE = 0.3
#: A logit below this takes next to nothing from a softmax. Those that are off start here, so that they can come back.
_OFF = -12.0
#: Sinks below this after training are off.
_LEAST = -9.0


def refined(
    original: Checkpoint, changed: Checkpoint, chosen: Windows, settings: LocalAttentionSettings, context: Context
) -> Windows:
    """The windows with other logits: ``sink_steps`` steps of Adam on the KL divergence of one calibration sample each.

    Both models are in memory, in float32. A killed run starts these steps again.

    Args:
        changed: the original with those windows, in a class with sinks.
    """
    import torch

    def compute() -> dict[str, list[float]]:
        logits = _train(original, changed, chosen, settings, context)
        return {str(block): row for block, row in logits.items()}

    rows = context.workspace.cached("refined_sinks", compute)
    sinks = {int(block): torch.tensor(row) for block, row in rows.items()}
    return replace(chosen, sinks=sinks)


def _train(
    original: Checkpoint, changed: Checkpoint, chosen: Windows, settings: LocalAttentionSettings, context: Context
) -> dict[int, list[float]]:
    import torch

    from compress.architectures.conversions.windows import NO_SINK
    from compress.evaluation.tasks import task_of
    from compress.models.loading import load_checkpoint
    from compress.sensitivity.samples import SampleLoop
    from compress.training.features import FeatureModel

    task = task_of(original.spec.structure.class_name)
    teacher, student = (
        FeatureModel(load_checkpoint(c, dtype="float32", device=context.device).requires_grad_(False), task)
        for c in (original, changed)
    )
    paths = model_map(changed.spec).paths
    parameters = {block: student.model.get_parameter(f"{paths[block]}self_attn.sinks") for block in chosen.sinks}
    for block, parameter in parameters.items():
        parameter.data = chosen.sinks[block].to(parameter).clamp(min=_OFF)
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters.values(), lr=_RATE, betas=(0.9, 0.95))
    loop, step = SampleLoop(_mixed(settings, context), context.device), 0
    with context.progress.task("refining sinks", settings.sink_steps, "steps") as task_bar:
        while step < settings.sink_steps:
            for sample in loop:
                if step == settings.sink_steps:
                    break
                optimizer.param_groups[0]["lr"] = _RATE * (1 - step / settings.sink_steps)
                optimizer.zero_grad()
                divergence = _backward(teacher, student, sample)
                optimizer.step()
                step += 1
                task_bar.advance(note=f"{divergence:.4f}")
    return {b: p.detach().masked_fill(p < _LEAST, NO_SINK).tolist() for b, p in parameters.items()}


def _mixed(settings: LocalAttentionSettings, context: Context) -> Any:
    """The calibration samples in an order drawn by seed."""
    import random

    batches = samples(settings, context)
    order = list(range(len(batches.ids)))
    random.Random(context.seed).shuffle(order)
    return batches.at(order)


def _backward(teacher: FeatureModel, student: FeatureModel, sample: Sample) -> float:
    """Add the gradients of the mean KL divergence over a sample's tokens, and return it. Logits exist a few at a time."""
    import torch

    with torch.no_grad():
        before = sample.counted(teacher.run(sample.inputs).last.flatten(0, 1))
    with torch.enable_grad():
        output = student.run(sample.inputs).last
        after = sample.counted(output.flatten(0, 1))
    hidden, total = after.detach().requires_grad_(), 0.0
    for start in range(0, len(hidden), LOGITS_PER_CHUNK):
        part = slice(start, start + LOGITS_PER_CHUNK)
        with torch.no_grad():
            wanted = teacher.logits(before[part]).float().log_softmax(-1)
        with torch.enable_grad():
            reached = student.logits(hidden[part]).float().log_softmax(-1)
            loss = torch.nn.functional.kl_div(reached, wanted, reduction="sum", log_target=True) / len(hidden)
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    after.backward(hidden.grad)  # type: ignore[no-untyped-call]
    return total
