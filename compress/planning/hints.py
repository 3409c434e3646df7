"""Hints: what a plan shows that a recipe could do better, from headers alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from compress import passes
from compress.architectures.model_map import model_map
from compress.checkpoint.storage.compressed_tensors.servers import SERVERS, refusals
from compress.checkpoint.store import Store
from compress.errors import CompressError
from compress.evaluation.tasks import is_seq2seq, task_of
from compress.formatting import format_bytes
from compress.passes.cast.settings import CastSettings
from compress.planning.make import plan_pass
from compress.planning.plan import Plan, PlannedPass
from compress.planning.sizes import planned_size
from compress.spec.spec import FLOAT_DTYPES, Runtime, Tensor

if TYPE_CHECKING:
    from compress.recipe import Recipe

#: Share of the result from which tables, or floats, are worth a hint, and by which a store must differ.
_TABLES, _FLOATS, _STORES = 0.3, 0.5, 0.15


def hints(recipe: Recipe, plan: Plan) -> list[str]:
    """A sentence for each thing that a recipe could do better: tables, floats, groups, store, servers, evaluation, gates."""
    tables = list(_tables(recipe, plan))
    others = [*_groups(plan), *_stores(plan), *_servers(plan), *_measured(recipe, plan)]
    return [*tables, *([] if tables else _floats(plan)), *others]


def _last(plan: Plan) -> PlannedPass:
    return plan.stages[-1].passes[-1]


def _tables(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """Tables of tokens that are a large part of the result, with what codes for them would leave."""
    last = _last(plan)
    tables = [t for t in model_map(last.spec).tables if t.quant_format is None]
    size = sum(tensor.dense_bytes for tensor in tables)
    if not tables or size < _TABLES * last.size.bytes or not isinstance(last.settings, CastSettings):
        return
    if not last.settings.coded:
        return
    names = " and ".join(tensor.module for tensor in tables)
    text = f"{format_bytes(size)} of {format_bytes(last.size.bytes)} is {names} ({_words(tables)})"
    ways: list[tuple[str, Store, Runtime, str]] = [("int8", "compact", "transformers", "`store: compact`")]
    if plan.store == "stock" and model_map(last.spec).has_head:
        ways.append(("int4", "stock", "vllm", "`runtime: vllm`"))
    if any(tensor.dtype == "F32" for tensor in tables):
        ways.append(("bf16", plan.store, last.settings.runtime, f"`store: {plan.store}`"))
    tried = []
    for format_, store, runtime, words in ways:
        bytes_ = _with_override(recipe, plan, tables, format_, store, runtime)
        if bytes_ is not None and bytes_ < last.size.bytes:
            override = ", ".join(f"{tensor.module}: {format_}" for tensor in tables)
            tried.append(f"`overrides: {{{override}}}` with {words} leaves {format_bytes(bytes_)}")
    if tried:
        yield f"{text}: {'; '.join(tried)}"


def _with_override(
    recipe: Recipe, plan: Plan, tables: Sequence[Tensor], format_: str, store: Store, runtime: Runtime
) -> int | None:
    """Bytes of the result if the last cast gave the tables that format, in a store; None where it does not work."""
    planned = [p for stage in plan.stages for p in stage.passes]
    before = planned[-2].spec if len(planned) > 1 else plan.original_spec
    settings, instance = planned[-1].settings, passes.get("cast")
    update = {"runtime": runtime, "overrides": {**{tensor.module: format_ for tensor in tables}, **settings.overrides}}
    given = [name for name in ("training", "calibration", "evaluation") if getattr(recipe.data, name) is not None]
    unset = {"fused_experts": None, "convolutions": None} if store != plan.store else {}
    try:
        settings = instance.completed(settings.model_copy(update=update | unset), given, store)
        return planned_size(plan_pass(before, instance, settings, store), store, recipe.max_shard_size).bytes
    except CompressError:
        return None


def _floats(plan: Plan) -> Iterator[str]:
    """32-bit floats that are most of the result."""
    last = _last(plan)
    wide = sum(t.dense_bytes for t in last.spec.stored() if t.dtype == "F32" and t.quant_format is None)
    if wide >= _FLOATS * last.size.bytes:
        yield (
            f"{format_bytes(wide)} of {format_bytes(last.size.bytes)} is 32-bit floats: "
            "`- cast: {weights: bf16}` halves them"
        )


def _groups(plan: Plan) -> Iterator[str]:
    """Neurons that a pass removes, where the groups of a later cast divided the widths before it and do not after it."""
    planned = [p for stage in plan.stages for p in stage.passes]
    specs = [plan.original_spec, *(p.spec for p in planned)]
    for cast in planned:
        settings = cast.settings
        if not isinstance(settings, CastSettings) or settings.weights is None or settings.group_size is not None:
            continue
        group = settings.quant_format(settings.weights).group
        for cut in planned[: cast.index]:
            if not group or not getattr(cut.settings, "mlp", None):
                continue
            before, after = (
                {one.I for one in model_map(spec).linears.values()} for spec in specs[cut.index : cut.index + 2]
            )
            broken = sorted(width for width in after - before if width % group)
            if broken and not any(width % group for width in before - after):
                yield (
                    f"`multiple_of: {group}` in passes.{cut.index}.{cut.name} keeps groups of {group}, which do not divide "
                    f"the {broken[0]:,} inputs that it leaves"
                )


def _stores(plan: Plan) -> Iterator[str]:
    """The other store, where it is much smaller, or where it costs nothing and every loader reads it."""
    last = _last(plan)
    if last.other_store is None:
        return
    ours, other = last.size.bytes, last.other_store.bytes
    if plan.store == "stock" and other < (1 - _STORES) * ours:
        yield f"`store: compact` leaves {format_bytes(other)}; its result brings its own modelling file"
    if plan.store == "compact" and other <= ours:
        yield "`store: stock` takes no more bytes, and every loader reads it"


def _servers(plan: Plan) -> Iterator[str]:
    """Servers that do not open the result, if it has codes that stock loaders read."""
    last = _last(plan)
    if plan.store == "stock" and any(tensor.quant_format is not None for tensor in last.spec.stored()):
        for server in SERVERS:
            if reasons := refusals(last.spec, server):
                yield f"{server.name} does not open the result: {'; '.join(reasons)}"


def _measured(recipe: Recipe, plan: Plan) -> Iterator[str]:
    """Evaluation and gates that are not there."""
    structure = plan.original_spec.structure
    task = task_of(structure.class_name)
    known = (structure.class_name or "").endswith(task.suffixes) and not is_seq2seq(structure)
    if recipe.data.evaluation is None and known and "text" in task.takes:
        yield "nothing is measured: add `data: {evaluation: default}`, or text of your own"
    elif recipe.data.evaluation is not None and not recipe.gates.given():
        yield "no gates: the result is published whatever it loses"


def _words(tables: Sequence[Tensor]) -> str:
    """Dtypes of tensors, such as ``float32``."""
    return ", ".join(dict.fromkeys(FLOAT_DTYPES[tensor.dtype] for tensor in tables))
