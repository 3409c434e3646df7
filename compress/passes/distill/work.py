"""Work of `distill`, from headers: forward and backward passes, steps, validations. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.evaluation.tasks import LANGUAGE, task_of
from compress.passes.distill.plan import evaluate_every, losses
from compress.passes.work import BACK_WITH_WEIGHTS, SampleSize, model_work, prediction_work
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.passes.distill.settings import DistillSettings

#: Products of Muon's five steps of Newton and Schulz, each with the smaller side of a matrix.
_MUON_PRODUCTS = 15
#: Bytes of a parameter in the states that a validation saves: the best weights, and those with two moments.
_SAVED = {"adamw": 16, "muon": 12, "adafactor": 8}
#: Bytes written by the rate of `disk`, which also reads them again.
_WRITTEN = 0.5
#: Passes over the gradients of a step: their norm, and the factor that clips them.
_CLIPPED = 2.0


def distill_work(student: Spec, teacher: Spec, settings: DistillSettings, size: SampleSize | None) -> Work | None:
    """Return the work of a training; None for other tasks than language models, other teachers, and narrow floats.

    Args:
        teacher: the original. size: of the training data.
    """
    original = [t.checkpoint for t in settings.teacher] == ["original"]
    known = model_map(student).known and task_of(student.structure.class_name) is LANGUAGE
    if size is None or not known or settings.autocast is not None or (settings.needs_teacher() and not original):
        return None
    steps = _steps(settings, size)
    trained = SampleSize(steps * settings.batch_size, size.length)
    every = evaluate_every(settings, steps)
    looks = 1 + -(-steps // every)
    held = SampleSize(settings.validation_samples * looks, size.length)
    again = 1 if settings.gradient_checkpointing else 0
    result = Work()
    for spec, back, kept in ((student, BACK_WITH_WEIGHTS, again), (teacher, 0.0, 0)):
        if spec is teacher and not settings.needs_teacher():
            break
        result.add_all(model_work(spec, trained, 1 + back + kept))
        result.add_all(model_work(spec, held))
        if set(losses(student, settings)) & {"kl", "reverse_kl", "skewed_kl", "js", "labels"}:
            result.add_all(prediction_work(spec, trained.tokens, back))
            result.add_all(prediction_work(spec, held.tokens))
    result.add_all(_updates(student, settings, steps))
    result.add("disk", 0, 1, _WRITTEN * looks * _SAVED[settings.optimizer] * student.parameters)
    return result


def _steps(settings: DistillSettings, size: SampleSize) -> int:
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        return max(1, round(settings.tokens / (size.length * settings.batch_size)))
    samples = max(1, size.samples - settings.validation_samples)
    return max(1, round((settings.epochs or 1.0) * samples / settings.batch_size))


def _updates(spec: Spec, settings: DistillSettings, steps: int) -> Work:
    """Work of the optimizer's steps."""
    result, mapped = Work(), model_map(spec)
    result.add("values", 0, 1, _CLIPPED * steps * spec.parameters)
    result.add("adamw", 0, 1, steps * spec.parameters)
    if settings.optimizer == "muon":
        for x in mapped.linears.values():
            if x.block is not None and x.shared_with is None:
                small, large = sorted((x.O, x.I))
                result.add("product", small, large, steps * _MUON_PRODUCTS * small)
    return result
