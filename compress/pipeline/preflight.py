"""Checks before any work, from the recipe, headers and names of files; `compress check` runs them too. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import passes
from compress.architectures.model_map import model_map
from compress.checkpoint.files import read_json
from compress.checkpoint.hub import is_hub_id
from compress.checkpoint.sidecars import safe_file
from compress.data.batches import check_positions, used_shape
from compress.data.documents import Document, check_columns, fingerprint
from compress.data.kinds import FIELD_KINDS, holds_ids, kind
from compress.data.rendering import no_template
from compress.data.token_ids import check_shape, ids_in
from compress.errors import CompressError, DataError, PassError, ReportError, ResourceError
from compress.evaluation.tasks import LANGUAGE, OF_PASSES, TEXT_METRICS, check_streaming, task_of
from compress.files import expanded, place
from compress.gates import GateResult, judge
from compress.models.processors import check_has_tokenizer
from compress.pipeline.folder import RunFolder
from compress.pipeline.publish import check_output, check_place
from compress.recipe.gates import positions_of

if TYPE_CHECKING:
    from compress.planning import Plan
    from compress.recipe import Recipe
    from compress.recipe.data import TextFiles
    from compress.spec.spec import Spec

#: Files of more bytes are not opened to see which columns they have.
_LARGE = 1 << 28
#: Files of chat templates, which transformers also takes from tokenizer_config.json.
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_SETS = ("training", "calibration", "evaluation")


def check_folders(recipe: Recipe) -> None:
    """Check that the folders that the run reads exist, and that the output is not one of them, inside one or around one.

    Raises `OutputError` or `PassError`.
    """
    output, model = place(recipe.output), expanded(recipe.reference)
    check_output(output, model if model.exists() else None, RunFolder.of(output).published().get("files"))
    for index, entry in enumerate(recipe.passes):
        for name in passes.get(entry.name).checkpoints(entry.settings):
            if (folder := expanded(name)).exists():
                check_place(output, folder, "teacher")
            elif not is_hub_id(name):
                raise PassError(
                    f"{name}: there is no such folder",
                    where=f"passes.{index}.{entry.name}",
                    key="teacher",
                    fix="a hub id is `name` or `organisation/name`",
                )


def check_plan(recipe: Recipe, plan: Plan) -> None:
    """Check that the plan fits the memory that the recipe allows, and tells what gates on the cache judge.

    Raises:
        ResourceError: it needs more memory. CompressError: the cache is not known at a gate's length.
    """
    if recipe.max_ram is not None and plan.peak_memory > recipe.max_ram:
        raise ResourceError(
            f"the run needs about {plan.peak_memory / 1e9:.2f} GB of memory, "
            f"max_ram allows {recipe.max_ram / 1e9:.2f} GB",
            fix="`compress plan` shows which pass needs it",
        )
    try:
        _cache_rows(recipe, plan)
    except ReportError as error:
        raise CompressError(error.what, where="gates.cache", fix=error.fix) from None


def check_window(recipe: Recipe, spec: Spec) -> None:
    """Check that the model can read windows of the evaluation's length, and streams. Raises `CompressError`."""
    evaluation = recipe.data.evaluation
    if evaluation is None or not TEXT_METRICS & set(recipe.metrics):
        return
    task = task_of(spec.structure.class_name)
    check_streaming(spec.structure.class_name, evaluation.streaming)
    limit = model_map(spec).trained_positions
    if task is LANGUAGE and limit is not None and evaluation.window > limit:
        raise CompressError(
            f"a window of {evaluation.window} tokens is beyond the model's {limit} positions",
            where="data.evaluation",
            fix=f"set window to {limit}",
        )
    if task is not LANGUAGE and (gate := next(iter(positions_of(recipe.gates)), None)) is not None:
        raise CompressError(
            f"only causal language models have a loss by position, and {spec.structure.class_name} is for {task.name}",
            where=f"gates.{gate}",
            fix="leave out `from_position`",
        )
    for name, metric in OF_PASSES.items():
        if name in recipe.metrics and (settings := recipe.settings_of(name)) is not None:
            metric.check(settings, window=evaluation.window, positions=limit)


def hopeless_gates(recipe: Recipe, plan: Plan) -> list[str]:
    """A sentence for each gate on size or parameters that cannot pass; none where the plan is not exact."""
    last = plan.stages[-1].passes[-1]
    if not last.spec.exact:
        return []
    sentences = []
    for name, value, before in (
        ("size", last.size.bytes, plan.original.bytes),
        ("parameters", last.size.parameters, plan.original.parameters),
    ):
        gate = getattr(recipe.gates, name)
        for bound, reached in (("max", value), ("max_ratio", value / max(before, 1))):
            allowed = None if gate is None else getattr(gate, bound)
            if allowed is not None and reached > allowed:
                sentences.append(
                    f"the gate {name}.{bound} will fail: the plan gives {reached:.6g}, it allows {allowed:.6g}"
                )
    for row in _cache_rows(recipe, plan):
        if row.verdict == "fail":
            sentences.append(f"the gate {row.gate} will fail: the plan gives {row.text}")
    return sentences


def planned_gates(recipe: Recipe, plan: Plan) -> list[GateResult]:
    """The gates on size, parameters and cache, judged by the plan; none where it is not exact."""
    if not plan.stages[-1].passes[-1].spec.exact:
        return []
    gates = recipe.gates.model_dump(exclude_none=True)
    return judge({name: gates[name] for name in ("size", "parameters", "cache") if name in gates}, *_sizes(plan))


def _cache_rows(recipe: Recipe, plan: Plan) -> list[GateResult]:
    """The gates on the cache, judged by the plan."""
    return judge({"cache": recipe.gates.model_dump(exclude_none=True).get("cache", ())}, *_sizes(plan))


def _sizes(plan: Plan) -> list[dict[str, Any]]:
    """The sizes of original and result, as reports hold them."""
    return [{"size": asdict(size)} for size in (plan.original, plan.stages[-1].size)]


def check_sets(recipe: Recipe) -> None:
    """Check that every named column exists, and that no pass reads a file of the evaluation. Raises `DataError`."""
    for name in _SETS:
        if (section := getattr(recipe.data, name)) is not None:
            small = [file for file in section.files if kind(file) in FIELD_KINDS and _size(file) <= _LARGE]
            check_columns(small, section.named_columns)
    evaluation = recipe.data.evaluation
    if evaluation is None:
        return
    for name in _SETS[:2]:
        section = getattr(recipe.data, name)
        if section is not None and _read(section) == _read(evaluation):
            for mine, other in _twins(evaluation.files, section.files):
                is_it = "is" if mine == other else f"holds the same as {other}"
                raise DataError(
                    f"{is_it} in data.{name} too: the passes would see the evaluation data",
                    where=f"data.evaluation: {mine}",
                    fix="evaluate on data that no pass reads",
                )


def check_ids(recipe: Recipe, positions: int | None) -> None:
    """Check by file headers that token ids are as many as asked for, and fit ``positions`` and passes. Raises `DataError`."""
    for name in _SETS[:2]:
        section = getattr(recipe.data, name)
        if section is None or not section.files or not holds_ids(file := section.files[0]):
            continue
        shape = ids_in(file, section.field)
        check_shape(shape, file)
        _, length = used_shape(shape, getattr(section, "samples", None), section.length, file)
        check_positions(length, positions, file, name)
        for entry in recipe.passes:
            if name in passes.get(entry.name).required_data(entry.settings):
                passes.get(entry.name).check_samples(entry.settings, name, length)


def check_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Check that a tokenizer exists where the run reads text. Raises `CheckpointError`."""
    needed = set().union(*(passes.get(entry.name).required_data(entry.settings) for entry in recipe.passes))
    if TEXT_METRICS & set(recipe.metrics):
        needed.add("evaluation")
    sections = [getattr(recipe.data, name) for name in needed]
    of_files = any(section is not None and section.files and not holds_ids(section.files[0]) for section in sections)
    if of_files or "lm_eval" in recipe.metrics:
        check_has_tokenizer(folder)


def check_chats(folder: Path, documents: Sequence[Document]) -> None:
    """Check that there is a chat template where the data are chats; whether they fit it is seen later. Raises `DataError`."""
    chat = next((document for document in documents if document.messages is not None), None)
    if chat is None or any(safe_file(folder, name).exists() for name in _TEMPLATES):
        return
    name = "tokenizer_config.json"
    config = read_json(folder, name) if safe_file(folder, name).exists() else {}
    if not (isinstance(config, dict) and config.get("chat_template")):
        raise no_template(chat)


def _read(section: TextFiles) -> tuple[str | None, list[str]]:
    """The template and columns that make the text of a row."""
    return section.template, [column for column, setting in section.named_columns.items() if setting != "label"]


def _twins(files: tuple[str, ...], others: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Pairs of files with the same bytes: the same file, or the same size and SHA-256."""
    for mine in files:
        for other in others:
            if _size(mine) == _size(other) and (
                Path(mine).samefile(other) or fingerprint([mine]) == fingerprint([other])
            ):
                yield mine, other


def _size(file: str) -> int:
    try:
        return Path(file).stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=file) from None
