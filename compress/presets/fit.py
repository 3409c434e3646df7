"""Drafts ▶ a recipe that the checkpoint takes: data, gates, and the plan that says so."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import passes
from compress.errors import CompressError
from compress.evaluation.tasks import is_seq2seq
from compress.formatting import format_bytes
from compress.pipeline.preflight import check_tokenizer, check_window
from compress.planning import Plan, make_plan
from compress.presets.drafts import Draft, Loss
from compress.presets.facts import Facts, separator_of
from compress.recipe import Recipe, recipe_from_mapping
from compress.recipe.entries import parse_pass

#: Metric that a gate is on ▶ its bound, and what is allowed by loss.
_ALLOWED: dict[str, tuple[str, dict[Loss, str | float]]] = {
    "bits_per_byte": ("max_increase", {"least": "0.5%", "little": "1%", "some": "4%", "much": "15%"}),
    "perplexity": ("max_increase", {"least": "1%", "little": "3%", "some": "15%", "much": "60%"}),
    "similarity": ("min", {"least": 0.999, "little": 0.99, "some": 0.95, "much": 0.85}),
}
#: Samples of calibration: windows of a stream, and documents, of which there may be few.
_SAMPLES, _ALONE = 128, 64


@dataclass(frozen=True)
class Fitted:
    """A recipe for a checkpoint, with its plan.

    Attributes:
        mapping: the keys of the recipe. recipe: the same, checked.
    """

    facts: Facts
    draft: Draft
    mapping: dict[str, Any]
    recipe: Recipe
    plan: Plan


def fit(facts: Facts, drafts: Iterable[Draft], output: str, max_bytes: int | None = None) -> Fitted:
    """The first draft that the checkpoint takes, and whose result has at most ``max_bytes``.

    Raises:
        CompressError: it takes none of them; the words are those of the first refusal.
    """
    refused: list[CompressError] = []
    smallest = math.inf
    for draft in drafts:
        try:
            fitted = _planned(facts, draft, output, max_bytes)
        except CompressError as error:
            refused.append(error)
            continue
        size = fitted.plan.stages[-1].size.bytes
        if max_bytes is None or size <= max_bytes:
            return fitted
        smallest = min(smallest, size)
    if math.isfinite(smallest):
        fix = "allow more, or remove blocks and neurons first: `prune_structured: {max_bytes: …}`"
        raise CompressError(f"codes leave {format_bytes(smallest)} at least", where="--max-bytes", fix=fix)
    first = refused[0]
    raise CompressError(f"{facts.class_name} does not take it: {first.what}", where=facts.model, fix=first.fix)


def _planned(facts: Facts, draft: Draft, output: str, max_bytes: int | None) -> Fitted:
    mapping = mapping_of(facts, draft, output)
    recipe = recipe_from_mapping(mapping)
    plan = make_plan(recipe, facts.spec, facts.metadata)
    size, original = plan.stages[-1].size.bytes, plan.original.bytes
    slack = 1 if plan.stages[-1].passes[-1].spec.exact else 1.02
    gates: dict[str, Any] = {}
    if max_bytes is not None:
        gates["size"] = {"max": max_bytes}
    elif size < original:
        gates["size"] = {"max_ratio": math.ceil(100 * slack * size / original) / 100}
    mapping["gates"] = gates | mapping.get("gates", {})
    if not mapping["gates"]:
        del mapping["gates"]
    recipe = recipe_from_mapping(mapping)
    check_window(recipe.fitted(facts.task) if facts.task else recipe, facts.spec)
    if facts.folder is not None:
        check_tokenizer(recipe, facts.folder)
    return Fitted(facts, draft, mapping, recipe, plan)


def mapping_of(facts: Facts, draft: Draft, output: str) -> dict[str, Any]:
    """The keys of a recipe with the passes of a draft, the data that they need, and a gate on the metric of the task."""
    needed: set[str] = set()
    for entry in map(parse_pass, draft.passes):
        needed |= passes.get(entry.name).required_data(entry.settings)
    data: dict[str, Any] = {}
    for name in ("training", "calibration"):
        if name in needed:
            data[name] = {"files": [facts.text["calibration"]], "length": facts.length}
    if "calibration" in data:
        # encoders read one text at a time
        alone = not facts.decodes and not is_seq2seq(facts.spec.structure)
        data["calibration"] |= {"samples": _ALONE, "mode": "padded"} if alone else {"samples": _SAMPLES}
    result: dict[str, Any] = {"model": facts.model, "output": output, **facts.options}
    if draft.store != "stock":
        result["store"] = draft.store
    if facts.evaluated:
        data["evaluation"] = {"files": [facts.text["evaluation"]]}
        if facts.length != 256:
            data["evaluation"]["window"] = facts.length
    separators = {separator_of(file) for section in data.values() for file in section["files"] if Path(file).is_file()}
    if separator := next(filter(None, separators), None):
        result["document_separator"] = separator
    if data:
        result["data"] = data
    result["passes"] = [dict(entry) for entry in draft.passes]
    if facts.evaluated and facts.task is not None:
        metric = facts.task.default[0]
        if draft.measured:
            result["evaluate"] = [*facts.task.default, *draft.measured]
        bound, allowed = _ALLOWED[metric]
        result["gates"] = {metric: {bound: allowed[draft.loss]}}
    return result
