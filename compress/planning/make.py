"""Make the plan of a recipe, and check that its passes can apply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress import passes
from compress.architectures.model_map import model_map
from compress.architectures.unforeseen import refused
from compress.checkpoint.edits import EDIT_KINDS, first_without_twin
from compress.checkpoint.storage.compressed_tensors.loaders import stock_holds
from compress.checkpoint.storage.compressed_tensors.servers import VLLM, refusals
from compress.checkpoint.store import Store, needs_code, with_storage
from compress.errors import PassError, located
from compress.evaluation.tasks import (
    check_images,
    check_metrics,
    check_predicts_text,
    check_sounds,
    check_speed,
    task_of,
)
from compress.memory import compares_logits
from compress.passes.base import EDITS, accepted_values, chosen_by_effort
from compress.planning.plan import Plan, PlannedPass, PlannedStage
from compress.planning.sizes import opened_size, planned_size, size_in_other
from compress.recipe.gates import metric_of
from compress.recipe.sizes import cache_lengths, data_sizes
from compress.recipe.sweep import DIRECTIONS, metric_of_goal
from compress.recipe.work import work_beside
from compress.spec.spec import Edit, Spec
from compress.work import with_writing

if TYPE_CHECKING:
    from compress.passes.base import Pass
    from compress.recipe import PassEntry, Recipe

#: Resident memory of the interpreter with torch and transformers loaded, measured on Linux with the CPU build.
RUNTIME_BYTES = 450 * 10**6


def _check_evaluation(recipe: Recipe, spec: Spec) -> None:
    """Raises `CompressError` where a metric does not fit the model, or no class builds a model that is evaluated."""
    evaluation, name = recipe.data.evaluation, spec.structure.class_name
    places = {f"gates.{gate}": metric for gate in recipe.gates.given() if (metric := metric_of(gate))}
    places |= {f"evaluate.{i}": entry.name for i, entry in enumerate(recipe.evaluate or ())}
    if recipe.sweep is not None:
        goals = [(key, i, goal) for key in DIRECTIONS for i, goal in enumerate(getattr(recipe.sweep, key))]
        places |= {f"sweep.{key}.{i}": metric for key, i, goal in goals if (metric := metric_of_goal(goal))}
    for where, metric in places.items():
        with located(where):
            check_metrics(name, [metric], given=None)
    if evaluation is not None:
        with located("data.evaluation"):
            check_metrics(name, recipe.metrics, given=evaluation.given)
    with located("evaluate.lm_eval"):
        check_predicts_text(name, recipe.metrics)
    check_speed(spec.structure.class_name, spec.structure.config, recipe.metrics)
    if evaluation is not None and recipe.metrics:
        model_map(spec).require_class("leave out `data.evaluation`, or set `evaluate: []`")


def make_plan(recipe: Recipe, spec: Spec, metadata: Mapping[str, str] | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        spec: the headers of its model. metadata: those of the model's weight files, which count as bytes.

    Raises:
        PassError: a pass cannot apply; ``where`` is ``passes.<index>.<name>``.
        DataError: samples are too long for the model.
        CompressError: a metric does not fit the model's task, or speed is measured of a model that reads no single text.
    """
    from compress.data.batches import check_positions

    recipe = recipe.fitted(task_of(spec.structure.class_name))
    _check_evaluation(recipe, spec)
    lengths = cache_lengths(recipe, spec)
    store: Store = recipe.store
    original, sizes = opened_size(spec, recipe.max_shard_size, metadata), data_sizes(recipe, spec)
    current, planned = spec, []
    for index, entry in enumerate(recipe.passes):
        instance = passes.get(entry.name)
        try:
            with refused(current, entry.name):
                following = plan_pass(current, instance, entry.settings, store)
            for name in instance.required_data(entry.settings):
                model_map(current).require_class()
                if (section := getattr(recipe.data, name)) is not None:
                    check_images(spec.structure.class_name, section.folder is not None)
                    if name == "calibration" and (known := model_map(current)).known:
                        check_sounds(spec.structure.class_name, known.record.input, section.sounds is not None)
                    check_positions(section.length, model_map(current).positions, name=name)
                    if section.length is not None:
                        instance.check_samples(entry.settings, name, section.length)
        except PassError as error:
            error.where = error.where or f"passes.{index}.{entry.name}"
            raise
        size = planned_size(following, store, recipe.max_shard_size, metadata)
        planned.append(
            PlannedPass(
                index,
                entry.name,
                entry.settings,
                following,
                size,
                size_in_other(following, store, recipe.max_shard_size, metadata),
                _peak(current, following, entry, recipe.dtype),
                (*instance.plan_notes(current, entry.settings), *chosen_by_effort(instance, entry.settings)),
                with_writing(instance.work(current, entry.settings, sizes), size.bytes),
            )
        )
        current = following
    stages = tuple(
        PlannedStage(number, tuple(group)) for number, group in enumerate(fuse(planned, recipe.evaluate_at), 1)
    )
    peak = max([*(p.peak_memory for p in planned), *_peaks_beside(recipe, spec, planned[-1])])
    beside = work_beside(recipe, spec, [stage.passes[-1].spec for stage in stages])
    return Plan(original, spec, store, stages, peak, lengths, beside)


def _peaks_beside(recipe: Recipe, spec: Spec, last: PlannedPass) -> Iterator[int]:
    """Resident bytes of evaluation, and of the check of the result's logits, where they take place."""
    parameters = last.spec.parameters
    if recipe.data.evaluation is not None and recipe.metrics:
        width = {"float32": 4, "bfloat16": 2, "float16": 2}[recipe.dtype]
        yield RUNTIME_BYTES + (spec.parameters + parameters) * width
    if compares_logits(parameters, recipe.max_ram):  # one model at a time, in float32, and its file mapped
        yield RUNTIME_BYTES + 4 * parameters + last.size.bytes


def plan_pass(spec: Spec, instance: Pass[Any], settings: Any, store: Store) -> Spec:
    """The spec of the checkpoint that a pass will write in a store. Raises `PassError` where the pass cannot apply."""
    _check_readable(spec, instance)
    following = instance.plan(spec, settings)
    if store == "compact" and (spec.structure.runtime, following.structure.runtime) == ("transformers", "vllm"):
        raise PassError("vLLM opens no compact checkpoint", key="runtime", fix="leave it out, or use `store: stock`")
    _check_storable(following, store)
    return following


def _check_readable(spec: Spec, instance: Pass[Any]) -> None:
    """Check that the pass can work on weights stored so. Raises `PassError`."""
    if "integer" not in instance.accepts and (name := next((t.name for t in spec.stored() if t.quant_format), None)):
        raise PassError(
            f"{instance.name} accepts {accepted_values(instance)} weights, and {name} is quantised",
            fix="start from the unquantised checkpoint, or make it dense with `compress unpack`",
        )
    if edit := next((e for e in spec.structure.edits if EDIT_KINDS[e.kind].storage not in instance.accepts), None):
        raise PassError(
            f"{instance.name} cannot change this checkpoint: {edit.module} {_words(edit)}",
            fix="start from the checkpoint before that"
            + ("" if first_without_twin(spec) else ", or make it dense with `compress unpack`"),
        )
    if small := next((t for t in spec.stored() if t.quant_format is None and t.dtype.startswith("F8")), None):
        raise PassError(
            f"{small.name} holds 8-bit floats ({small.dtype}), and neither scales nor a config give their values",
            fix="start from the unquantised checkpoint, or from one whose config.json has its quantization_config",
        )


def _words(edit: Edit) -> str:
    """Words for what an edited module is or has, after its name."""
    kind = EDIT_KINDS[edit.kind]
    return kind.alone[0] or EDITS[kind.storage]


def _check_storable(following: Spec, store: Store) -> None:
    """Check that the store can hold the planned checkpoint. Raises `PassError`."""
    if store == "stock" and (edit := next(iter(following.structure.edits), None)):
        raise PassError(
            f"stock classes cannot express that {edit.module} {_words(edit)}",
            fix="use `store: compact`"
            + (
                f", or {EDIT_KINDS[odd.kind].alone[1]}"
                if (odd := first_without_twin(following))
                else "; `compress unpack` makes a dense stock checkpoint of the result"
            ),
        )
    if store == "stock" and following.structure.runtime == "vllm" and (reasons := refusals(following, VLLM)):
        raise PassError(f"{VLLM.name} does not open it: {'; '.join(reasons)}", fix="use `store: compact`")
    holds = stock_holds(following)
    if store == "stock" and (tensor := next((t for t in following.stored() if not holds(t)), None)):
        assert tensor.quant_format is not None
        raise PassError(
            f"stock loaders do not read {tensor.quant_format.format} codes of {tensor.name}" + _experts(following),
            fix=f"use `store: compact`{_for_vllm(following)}"
            + ("" if tensor.quant_format.symmetric else ", or codes without zero points"),
        )
    if following.structure.config.get("auto_map") and needs_code(with_storage(following, store)):
        raise PassError(
            "compact checkpoints stand for a class of transformers, and this one brings code of its own (`auto_map`)",
            fix="use `store: stock`, or set `ignore_auto_map: true` where transformers has the model type",
        )
    rounded = {
        "kv_cache": following.structure.kv_cache is not None,
        "activations": any(
            t.quant_format is not None and t.quant_format.activations is not None for t in following.stored()
        ),
    }
    if (key := next((k for k, asked in rounded.items() if asked), None)) and needs_code(with_storage(following, store)):
        raise PassError(
            f"`{key}` belongs in the config of compressed-tensors, which compact checkpoints do not have",
            key=key,
            fix="use `store: stock`, or leave it out",
        )


def _for_vllm(spec: Spec) -> str:
    """The setting that writes the codes for vLLM, as a part of a fix; empty where it refuses them too."""
    served = replace(spec, structure=replace(spec.structure, runtime="vllm"))
    holds = stock_holds(served)
    return ", or `runtime: vllm` in `cast`" if all(holds(t) for t in served.stored()) else ""


def _experts(spec: Spec) -> str:
    """The limits of stock loaders for experts, as a part of an error; empty for a model without experts."""
    if not model_map(spec).has_experts:
        return ""
    return (
        ": they read experts only if all have one format, without zero points, of packed integers, fp8 by channel or mxfp4, "
        "and without static scales of inputs"
    )


def fuse(planned: Sequence[PlannedPass], evaluate_at: str) -> list[list[PlannedPass]]:
    """The passes of each stage: one each, or with ``evaluate_at: end`` neighbouring tensor-by-tensor passes together."""
    groups: list[list[PlannedPass]] = []
    for item in planned:
        if groups and evaluate_at == "end" and _streams(item) and _streams(groups[-1][-1]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _streams(item: PlannedPass) -> bool:
    return bool(passes.get(item.name).mode_for(item.settings) == "stream")


def _peak(before: Spec, after: Spec, entry: PassEntry, dtype: str) -> int:
    """Resident bytes at the peak of a pass: its own figure, else a few tensors, and the model where it reads data."""
    instance, width = passes.get(entry.name), {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    largest = max(t.dense_bytes for t in before.stored())
    # input, result, a scratch copy and the tensor being written; where weights are masked, magnitudes as 8-byte keys
    masks = max((8 * t.count for t in after.stored() if t.kept is not None), default=0)
    stream = 4 * largest + 2 * masks
    own = instance.memory(before, entry.settings, width)
    if own is not None:
        return RUNTIME_BYTES + max(own, stream)
    model = 2 * width * before.parameters if instance.required_data(entry.settings) else 0
    return RUNTIME_BYTES + stream + model
