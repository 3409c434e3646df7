"""Let the blocks of a group share tensors: collect Hessians, choose the groups, solve, and read the solved tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.shared import shared
from compress.passes.base import Context
from compress.passes.blockwise import open_runner
from compress.passes.share.conversion import convert
from compress.passes.share.groups import candidate_groups, check_packages, conversion_of, is_open, shared_parts, unlike
from compress.passes.share.settings import BlockGroups, ShareSettings

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.passes.share.solve import Solver
    from compress.workspace import Workspace

#: Number of calibration samples, the last ones, on which arrangements are compared.
_HELD_OUT = 16


def share_blocks(checkpoint: Checkpoint, settings: ShareSettings, context: Context) -> Checkpoint:
    """Collect Hessians, choose the groups and solve the shared tensors."""
    from compress.blockwise.saved_hessians import SavedHessians
    from compress.passes.share.solve import ShareOptions, Solver

    check_packages(settings)
    spec, parts = checkpoint.spec, shared_parts(checkpoint.spec, settings)
    candidates = candidate_groups(spec, settings, parts)
    paths = model_map(spec).paths
    blocks = sorted({i for groups in candidates.values() for group in groups for i in group})
    matrices = [part for part in parts if len(spec.tensors[paths[blocks[0]] + part].shape) == 2]
    read = SavedHessians(context.workspace.folder("read"), context.device)
    runner = open_runner(checkpoint, [], context, workspace=context.workspace.folder("runner"), with_targets=False)
    wanted = {i: [paths[i] + part for part in matrices] for i in blocks}
    read.collect(
        runner.executor,
        wanted,
        activations=runner.workspace.path,
        progress=context.progress,
        title="collecting Hessians",
        check=True,
    )
    fisher = None
    if settings.init == "fisher" and not context.processes.rank:
        from compress.sensitivity.fisher import fisher_information

        names = [paths[i] + part for i in blocks for part in matrices]
        fisher = fisher_information(
            checkpoint,
            names,
            context.data("calibration"),
            device=context.device,
            seed=context.seed,
            progress=context.progress,
        )
    options = ShareOptions(parts, settings.init, settings.align, settings.rank, fisher)
    solver = Solver(checkpoint, read, options)
    choice = context.workspace.cached("groups", lambda: _chosen(checkpoint, settings, solver, candidates, context))
    groups = choice["groups"]
    context.details["sharing"] = choice
    if not context.processes.rank:
        context.details["sharing"] |= {"tensors": solver.solve(groups, _solved(context, groups))}
    runner.processes.barrier()
    result = _derived(checkpoint, settings, solver, groups, context)
    if (conversion := conversion_of(spec, settings, groups)) is not None:
        return convert(result, conversion, len(groups))
    return result


def _chosen(
    checkpoint: Checkpoint,
    settings: ShareSettings,
    solver: Solver,
    candidates: dict[str, BlockGroups],
    context: Context,
) -> dict[str, Any] | None:
    """The groups, and a row for each arrangement that was tried; None in other processes than the first."""
    from compress.sensitivity.depth import divergence

    if context.processes.rank:
        return None
    if is_open(settings, candidates):
        nearest = solver.nearest(
            list(candidates.values()), lambda i, j: unlike(checkpoint.spec, i, j, solver.options.parts)
        )
        candidates = {**candidates, "nearest": nearest} if settings.arrangement == "best" else {"nearest": nearest}
    rows: list[dict[str, Any]] = []
    data = context.data("calibration")
    for name, groups in candidates.items():
        row: dict[str, Any] = {"arrangement": name, "groups": groups}
        same = next((r for r in rows if r["groups"] == groups), None)
        if len(candidates) > 1 and same is None:
            solver.solve(groups, _solved(context, groups))
            shared_ = _derived(checkpoint, settings, solver, groups, context)
            held = data.last(min(_HELD_OUT, len(data.ids)))
            row["divergence"] = divergence(
                checkpoint,
                shared_,
                held,
                dtype=context.dtype,
                device=context.device,
                work=context.workspace.path,
            )
        rows.append(row | ({"divergence": same["divergence"]} if same else {}))
    best = min(rows, key=lambda row: row.get("divergence", 0.0))
    return {"groups": best["groups"], "arrangement": best["arrangement"], "tried": rows}


def _solved(context: Context, groups: BlockGroups) -> Workspace:
    """Workspace of the tensors that groups of blocks share. Only the first process solves for them."""
    return context.workspace.alone().folder("solved-" + "-".join("_".join(map(str, group)) for group in groups))


def _derived(
    checkpoint: Checkpoint, settings: ShareSettings, solver: Solver, groups: BlockGroups, context: Context
) -> Checkpoint:
    from compress.checkpoint.values import Derived, Value, torch_dtype

    after = shared(checkpoint.spec, groups, solver.options.parts, settings.rank)
    read = solver.read_solved(groups, _solved(context, groups))

    def value(name: str) -> Value:
        data = read(name).to(torch_dtype(after.tensors[name].dtype))
        return Value(data, checkpoint.tensor(name).mask if after.tensors[name].kept is not None else None)

    return Derived(checkpoint, after, value)
