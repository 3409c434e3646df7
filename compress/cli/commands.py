"""What the commands do: call the library, print tables or one JSON document."""

from __future__ import annotations

import json as json_module
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.guard import Judged
from compress.errors import EXIT_INCONCLUSIVE, CompressError, ReportError
from compress.escape import in_one_line, printable_json
from compress.files import expanded

if TYPE_CHECKING:
    from compress.progress import Progress
    from compress.recipe import Recipe
    from compress.spec.spec import Structure


@dataclass(frozen=True)
class Code:
    """What to do with code that a checkpoint brings: the options ``--trust-remote-code`` and ``--ignore-auto-map``."""

    trust: bool
    ignore: bool

    def options(self) -> dict[str, bool]:
        """As arguments of the library."""
        return {"trust_remote_code": self.trust, "ignore_auto_map": self.ignore}


def _print_json(data: Mapping[str, Any]) -> None:
    """One strict JSON document on stdout."""
    from compress.report import to_json

    sys.stdout.write(printable_json(to_json(data)) + "\n")


def _say(text: str) -> None:
    """A line on stdout, whose names may hold any character."""
    print(in_one_line(text))


def _progress(quiet: bool) -> Progress:
    from compress.cli.progress import make_progress

    return make_progress(quiet, sys.stderr)


def run(
    path: Path, sets: Sequence[str], *, fresh: bool, publish_anyway: bool, offline: bool, json: bool, quiet: bool
) -> None:
    """``compress run``."""
    from compress.cli import tables
    from compress.pipeline.run import run as run_recipe

    recipe = _load(path, [*sets, "offline=true"] if offline else sets)
    with _located(recipe):
        result = run_recipe(
            recipe, fresh=fresh, publish_anyway=publish_anyway, progress=_progress(quiet), recipe_path=str(path)
        )
    if json:
        _print_json(result.report)
    else:
        if result.nothing_to_do:
            _say(f"nothing to do: {result.checkpoint} holds this recipe's result already (--fresh runs it again)")
        tables.print_report(result.report)
        if not result.published:
            _say(f"not published; the result is in {result.checkpoint} (--publish-anyway puts it in place)")
    raise Judged(result.exit_status)


def check(path: Path, sets: Sequence[str], *, data: bool, resolved: bool, json: bool) -> None:
    """``compress check``: the recipe, folders and columns, and where its model is a folder here the plan too.

    With ``data`` the text is read, and compared with the evaluation's.
    """
    from compress.architectures.model_map import model_map
    from compress.pipeline.preflight import (
        check_folders,
        check_ids,
        check_plan,
        check_sets,
        check_tokenizer,
        check_window,
        hopeless_gates,
    )
    from compress.recipe import resolved as resolve
    from compress.recipe import to_yaml

    recipe = _load(path, sets)
    local = expanded(recipe.model)
    notes: list[str] = []
    structure: Structure | None = None
    with _located(recipe):
        check_folders(recipe)
        check_sets(recipe)
        if local.exists():
            from compress.checkpoint.open import open_headers
            from compress.evaluation.tasks import task_of
            from compress.planning import make_plan

            spec, metadata = open_headers(
                local, trust_remote_code=recipe.trust_remote_code, ignore_auto_map=recipe.ignore_auto_map
            )
            structure, planned = spec.structure, make_plan(recipe, spec, metadata)
            check_plan(recipe, planned)
            notes += [*spec.notes, *hopeless_gates(recipe, planned)]
            recipe = recipe.fitted(task_of(structure.class_name))
            check_window(recipe, spec)
            check_tokenizer(recipe, local)
        check_ids(recipe, model_map(spec).positions if local.exists() else None)
        notes += _read_data(recipe, structure, data)
    if json:
        _print_json({"schema": "compress.check/1", "recipe": resolve(recipe)})
    elif resolved:
        sys.stdout.write(to_yaml(resolve(recipe)))
    else:
        hint = "" if local.exists() else " (its model is no local folder: passes were not tried on it)"
        _say(f"{path}: no mistakes found{hint}")
        for note in notes:
            _say(note)


def _read_data(recipe: Recipe, structure: Structure | None, everything: bool) -> list[str]:
    """Read labelled texts and images, and with ``everything`` all text; sentences on what was compared.

    Raises `DataError` for a label that is none of the model, or for text that evaluation and passes share.
    """
    from compress.data.kinds import holds_ids
    from compress.pipeline.datasets import DataSets
    from compress.pipeline.preflight import check_chats

    data, evaluation = DataSets(recipe, expanded(recipe.model), structure), recipe.data.evaluation
    if structure is not None and evaluation is not None and evaluation.given != "text":
        data.documents("evaluation")
    if not everything:
        return []
    if structure is None and recipe.data.needs_model:
        return ["data: not read, as labels and images are told by the model, which is no local folder"]
    compared = data.check_disjoint(ids=False)
    for name in ("training", "calibration", "evaluation"):
        if (files := data.files(name)) and not holds_ids(files[0]):
            documents = data.documents(name)
            if structure is not None:
                check_chats(data.folder, documents)
    said = [f"data: {len(data.documents('evaluation')):,} documents of evaluation"] if evaluation is not None else []
    said += [f"{len(data.documents(name)):,} of {name}, none shared" for name in compared]
    return [", ".join(said)] if said else ["data: nothing to compare"]


def plan(path: Path, sets: Sequence[str], *, offline: bool, json: bool) -> None:
    """``compress plan``."""
    from compress.checkpoint.open import open_headers
    from compress.cli import tables
    from compress.planning import make_plan

    recipe = _load(path, [*sets, "offline=true"] if offline else sets)
    with _located(recipe):
        spec, metadata = open_headers(
            recipe.model,
            trust_remote_code=recipe.trust_remote_code,
            ignore_auto_map=recipe.ignore_auto_map,
            offline=recipe.offline,
        )
        planned = make_plan(recipe, spec, metadata).to_dict()
    planned["disk_free"] = shutil.disk_usage(_existing(Path(recipe.output))).free
    if json:
        _print_json(planned)
    else:
        tables.print_plan(planned)


def inspect(checkpoint: str, *, tensors: bool, zeros: bool, code: Code, offline: bool, json: bool) -> None:
    """``compress inspect``."""
    from compress.cli import tables
    from compress.inspection import inspect as inspect_checkpoint

    data = inspect_checkpoint(checkpoint, zeros=zeros, **code.options(), offline=offline)
    if json:
        _print_json(data)
    else:
        tables.print_inspection(data, tensors=tensors or zeros)


def diff(a: str, b: str, *, values: bool, code: Code, json: bool) -> None:
    """``compress diff``."""
    from compress.cli import tables
    from compress.inspection import diff as diff_checkpoints

    data = diff_checkpoints(a, b, values=values, **code.options())
    if json:
        _print_json(data)
    else:
        tables.print_diff(data)


def passes_(name: str | None, *, json: bool) -> None:
    """``compress passes [NAME]``."""
    from compress.cli import tables
    from compress.passes.describe import describe, describe_all

    data = describe_all() if name is None else describe(name)
    if json:
        _print_json(data)
    elif name is None:
        tables.print_passes(data["passes"])
    else:
        tables.print_pass(data)


def schema(*, report: bool) -> None:
    """``compress schema``."""
    if report:
        from compress.report import report_schema

        data = report_schema()
    else:
        from compress.recipe import recipe_schema

        data = recipe_schema()
    sys.stdout.write(json_module.dumps(data, indent=2, ensure_ascii=False) + "\n")


def unpack(checkpoint: str, output: Path, *, max_shard_size: str, code: Code, quiet: bool) -> None:
    """``compress unpack``."""
    from compress import api

    how: dict[str, Any] = {"max_shard_size": max_shard_size, "progress": _progress(quiet), **code.options()}
    _say(f"wrote {api.unpack(checkpoint, output, **how)}")


def runs(folder: Path, *, json: bool) -> None:
    """``compress runs``."""
    from compress.cli import tables
    from compress.pipeline.housekeeping import list_runs

    if not folder.is_dir():
        raise CompressError("there is no such folder", where=str(folder))
    data = list_runs(folder)
    if json:
        _print_json({"schema": "compress.runs/1", "runs": data})
    else:
        tables.print_runs(data)


def clean(run_folder: Path, *, everything: bool, dry_run: bool) -> None:
    """``compress clean``."""
    from compress.pipeline.housekeeping import clean as clean_run
    from compress.settings import format_bytes

    removed, freed = clean_run(run_folder, everything=everything, dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    _say(f"{verb} {', '.join(removed) or 'nothing'}; {format_bytes(freed)}")


def evaluate(
    checkpoint: str,
    data: Sequence[str],
    *,
    baseline: str | None,
    metrics: Sequence[str],
    separator: str | None,
    field: str,
    template: str | None,
    text: Sequence[str],
    label: str | None,
    window: int,
    stride: int | None,
    max_documents: int | None,
    device: str,
    dtype: str,
    quantized_kv_cache: bool,
    confidence: float,
    code: Code,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """``compress eval``."""
    from compress.cli import tables
    from compress.pipeline.baseline import EvaluationSettings
    from compress.pipeline.evaluate import evaluate as evaluate_checkpoint

    images = data[0] if len(data) == 1 and Path(data[0]).is_dir() else None
    document = evaluate_checkpoint(
        checkpoint,
        EvaluationSettings(
            files=() if images else tuple(data),
            images=images,
            separator=separator,
            field=field,
            template=template,
            text=tuple(text) or None,
            label=label,
            window=window,
            stride=stride,
            max_documents=max_documents,
            metrics=tuple(metrics) or None,
            device=device,
            dtype=dtype,
            quantized_kv_cache=quantized_kv_cache,
        ),
        baseline=baseline,
        confidence=confidence,
        **code.options(),
        offline=offline,
        progress=_progress(quiet),
    )
    if json:
        _print_json(document)
    else:
        tables.print_assessment(document)


def gate(
    subject: str,
    *,
    baseline: str | None,
    recipe: Path | None,
    gates: Sequence[str],
    confidence: float | None,
    junit: Path | None,
    code: Code,
    offline: bool,
    json: bool,
    quiet: bool,
) -> None:
    """``compress gate``."""
    from compress import gates as gating
    from compress import report as reports
    from compress.cli import tables
    from compress.pipeline.evaluate import judge_checkpoint
    from compress.recipe import read_gates
    from compress.recipe import resolved as resolve

    loaded = _load(recipe, []) if recipe is not None else None
    idle = False
    wanted = read_gates(resolve(loaded)["gates"] if loaded is not None else {}, gates)
    if Path(subject).is_dir() or Path(subject).suffix != ".json":
        if baseline is None:
            raise ReportError("a checkpoint is judged against a baseline", fix="give --baseline, or name a report.json")
        if not wanted:
            raise ReportError("there is no gate to judge", fix="give --recipe or --gate")
        results, settings = judge_checkpoint(
            subject,
            baseline,
            wanted,
            recipe=loaded,
            confidence=confidence,
            **code.options(),
            offline=offline,
            progress=_progress(quiet),
        )
        report = None
    else:
        if baseline is not None:
            raise ReportError("a report holds its own baseline", fix="leave out --baseline")
        report = reports.load(Path(subject))
        resolved = report["recipe"]["resolved"]
        wanted = wanted or read_gates(resolved.get("gates") or {})
        idle = (
            not wanted and report["status"] == "inconclusive"
        )  # a training did not help, and no gate says if that matters
        if not wanted and not idle:
            raise ReportError(
                "neither the report nor the command line has a gate", where=subject, fix="give --recipe or --gate"
            )
        settings = {
            "confidence": confidence if confidence is not None else resolved.get("confidence", 0.95),
            "bootstrap": resolved.get("bootstrap", 10000),
            "seed": resolved.get("seed", 0),
        }
        reports.check_statistics(subject, settings)
        with reports.judged(subject):
            results = gating.judge(wanted, report["original"], report["result"], **settings)
    status, exit_status = ("inconclusive", EXIT_INCONCLUSIVE) if idle else gating.verdict(results)
    rows = [r.to_dict() for r in results]
    if junit is not None:
        base = report or {"result": {"size": {}}, "original": {"checkpoint": baseline, "size": {}}, "stages": []}
        junit.write_text(
            reports.render_junit({**base, "gates": rows, "status": status, "output": subject}), encoding="utf-8"
        )
    if json:
        _print_json(
            {
                "schema": "compress.verdict/1",
                "subject": subject,
                "status": status,
                "exit_status": exit_status,
                "gates": rows,
                **settings,
            }
        )
    else:
        tables.print_gates(rows, status)
    raise Judged(exit_status)


def _load(path: Path, sets: Sequence[str]) -> Recipe:
    from compress.recipe import load_recipe

    return load_recipe(path, sets)


class _located:
    """Errors of passes are shown at the line of the recipe that asks for them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from compress.errors import PassError, RecipeError
        from compress.recipe import locate

        if not isinstance(error, PassError) or not (error.where or "").startswith("passes."):
            return
        _, index, name = (error.where or "").split(".", 2)
        path = ("passes", int(index), name, error.key) if error.key else ("passes", int(index), name)
        where, error.where = error.where, None
        if text := locate(self.recipe.source, path, error):
            raise RecipeError([text]) from error
        error.where = where


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
