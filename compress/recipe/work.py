"""Work of a run beside its passes: start, reading text, evaluation. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress import passes
from compress.architectures.model_map import model_map
from compress.data.documents import read_documents
from compress.errors import CompressError
from compress.evaluation.tasks import LANGUAGE, OF_PASSES, SPEED_METRICS, TEXT_METRICS, task_of
from compress.passes.work import SampleSize, model_work, prediction_work
from compress.recipe.sizes import text_bytes, text_tokens
from compress.spec.spec import Spec
from compress.work import Rates, Work, seconds_of

if TYPE_CHECKING:
    from compress.recipe.data import EvaluationSection
    from compress.recipe.model import Recipe

#: Seconds of timing prompts and tokens, and processes that it starts.
_LATENCY_SECONDS, _LATENCY_PROCESSES = 10.0, 2


@dataclass(frozen=True)
class WorkBeside:
    """Work of a run beside its passes. ``evaluation``: of all evaluations; None where it is not known."""

    preparation: Work | None = None
    evaluation: Work | None = None

    def seconds(self, rates: Rates | None) -> dict[str, float | None]:
        """The seconds of both."""
        return {"preparation": seconds_of(self.preparation, rates), "evaluation": seconds_of(self.evaluation, rates)}


def work_beside(recipe: Recipe, original: Spec, stages: Sequence[Spec]) -> WorkBeside:
    """Work of a run beside its passes. ``stages``: headers of the result of each stage."""
    return WorkBeside(_preparation(recipe), _evaluation(recipe, original, stages))


def _preparation(recipe: Recipe) -> Work:
    """Work before the first pass: the start, and making tokens of the data sets that passes need."""
    result = Work()
    result.add("start", 0, 1)
    needed = {name for entry in recipe.passes for name in passes.get(entry.name).required_data(entry.settings)}
    sections = [getattr(recipe.data, name) for name in sorted(needed)]
    files = {file for section in sections if section is not None for file in section.files}
    result.add("text", 0, 1, text_bytes(sorted(files)))
    return result


def _evaluation(recipe: Recipe, original: Spec, stages: Sequence[Spec]) -> Work | None:
    """Work of evaluating the original and the result of each stage; None where it is not known.

    Every stage is compared with the original, which reads the same text again.
    """
    result, metrics, section = Work(), set(recipe.metrics), recipe.data.evaluation
    if metrics & SPEED_METRICS:
        result.add("clock", 0, 1, _LATENCY_SECONDS)
        result.add("start", 0, 1, _LATENCY_PROCESSES)
    if "throughput" in metrics:
        result.add("clock", 0, 1, _LATENCY_SECONDS)
    if section is None or not metrics & TEXT_METRICS:
        return result
    of_text = task_of(original.structure.class_name) is LANGUAGE and section.text is None and bool(section.files)
    if not of_text or metrics & set(OF_PASSES) or not all(model_map(spec).known for spec in (original, *stages)):
        return None
    count = _bytes(recipe, section)
    if count is None:
        return None
    result.add("text", 0, 1, count)
    tokens = text_tokens(count, original) * section.window / (section.stride or section.window)
    size = SampleSize(max(1, round(tokens / section.window)), section.window)
    for spec in (original, *stages, *([original] * len(stages))):
        result.add_all(model_work(spec, size))
        result.add_all(prediction_work(spec, size.tokens))
    return result


def _bytes(recipe: Recipe, section: EvaluationSection) -> int | None:
    """Bytes of the text that is evaluated; None where it cannot be read."""
    if section.max_documents is None:
        return text_bytes(section.files)
    try:
        documents = read_documents(section.files, recipe.document_separator, section.field, section.template)
    except CompressError:
        return None
    return sum(len(document.text.encode()) for document in documents[: section.max_documents])
