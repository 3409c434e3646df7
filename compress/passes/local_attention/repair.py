"""Repair of a model with windows, by the original's predictions: the logits of its sinks alone, or its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.errors import DataError
from compress.passes.base import Context
from compress.passes.distill.distill import ACTIVATION_TOKENS, GRADIENT_BYTES, STATE_BYTES, Distill
from compress.passes.distill.settings import DistillSettings
from compress.passes.local_attention.choose import Windows
from compress.passes.local_attention.divergence import samples
from compress.passes.local_attention.refine import refined
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.passes.local_attention.stock import with_windows
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint

#: Samples of a step, at most.
_BATCH = 4
#: Samples per held-out sample; these decide whether the trained weights stay.
_HELD_OUT = 16
#: Peak learning rate. Weights are near the best already: steps must be small, and their sum does the rest.
_RATE = 1e-4
#: Times that the held-out loss is measured, and the state saved.
_LOOKS = 8
#: Windows in a sample, for the memory of activations; their length is not known where memory is planned.
_WINDOWS = 5


def repaired(
    original: Checkpoint, changed: Checkpoint, chosen: Windows, settings: LocalAttentionSettings, context: Context
) -> Checkpoint:
    """The changed checkpoint with sinks refined and weights tuned, as far as the settings ask for it."""
    if settings.sink_steps:
        chosen = refined(original, changed, chosen, settings, context)
        changed = with_windows(original, settings, chosen)
    return _tuned(original, changed, settings, context) if settings.tune_epochs else changed


def training(settings: LocalAttentionSettings, count: int, processes: int = 1) -> DistillSettings:
    """The training of ``tune_epochs`` on so many samples, two or more, by so many processes."""
    held = max(1, count // _HELD_OUT)
    batch = max(1, min(max(_BATCH, processes), count - held))
    steps = max(1, round(settings.tune_epochs * (count - held) / batch))
    return DistillSettings(
        steps=steps,
        batch_size=batch,
        micro_batch_size=1,
        learning_rate=_RATE,
        schedule="linear",
        validation_samples=held,
        evaluate_every=max(1, steps // _LOOKS),
    )


def tuning_memory(spec: Spec, settings: LocalAttentionSettings, width: int) -> int:
    """Bytes resident at the peak of ``tune_epochs``: the trained model, its optimizer, the original, activations of a sample.

    Args:
        spec: the model with windows. width: bytes of a float of the original.
    """
    size = -(-_WINDOWS * max(settings.window) // ACTIVATION_TOKENS)
    whole = Distill().memory(spec, DistillSettings(batch_size=size, micro_batch_size=size), width)
    matrices = _matrices(spec)
    frozen = sum(t.count for t in spec.weights() if len(t.shape) > 1 and t.module not in matrices)
    return whole - (GRADIENT_BYTES + STATE_BYTES["adamw"]) * frozen


def _matrices(spec: Spec) -> set[str]:
    """Modules of the file with the matrices of attention."""
    return {x.module for x in model_map(spec).linears.values() if x.role == "attention"}


def _tuned(original: Checkpoint, changed: Checkpoint, settings: LocalAttentionSettings, context: Context) -> Checkpoint:
    """The changed checkpoint, trained to predict what the original does on the calibration samples with their repeats.

    Trained are the matrices of attention and all vectors: norms, biases, logits of sinks. The weights with the lowest loss on
    held-out samples stay; where none is lower, those that were.

    Raises:
        DataError: there is but one sample, so none could be held out.
    """
    from compress.passes.distill.train import distill

    batches = samples(settings, context)
    if len(batches.ids) < 2:
        raise DataError("one sample is too few: one is held out", where="data.calibration", fix="give two or more")
    place = context.workspace.folder("tune")
    inside = replace(context, original=original, data=lambda name: batches, workspace=place)
    mapped = model_map(changed.spec)
    trained = {f"{mapped.in_memory(module)}.weight" for module in _matrices(changed.spec)}
    asked = training(settings, len(batches.ids), context.processes.world)
    return distill(changed, asked, inside, lambda name, value: value.ndim == 1 or name in trained)
