"""Helpers of passes that work block by block: open a block runner, measure divergences, and plan the memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from compress.architectures.codebooks import rows_per_sample
from compress.architectures.matrices import ModelBlock
from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import (
    ALLOCATOR_RETAIN,
    FLOAT64_MAX_WIDTH,
    LOGITS_PER_CHUNK,
    SAVED_BYTES,
    STATES_BYTES,
    STATISTICS_BYTES,
    TOKENS_PER_BATCH,
    curvatures_that_fit,
)
from compress.errors import PassError
from compress.evaluation.tasks import EMBEDDING, is_seq2seq, task_of
from compress.passes.base import Context
from compress.solvers.memory import SolverMemory, outputs_at_once
from compress.spec.classes import CAUSAL_LM
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.blockwise.runner import BlockRunner
    from compress.blockwise.targets import Teacher
    from compress.checkpoint.values import Checkpoint
    from compress.sensitivity.matrices import WeightDeltas
    from compress.workspace import Workspace

#: Float32 copies of a block that reconstruction holds beside its weights: two moments, if it trains all floats of the block,
#: or the gradients, where it trains only scales of codes.
RECONSTRUCTION_COPIES = {"floats": 2, "scales": 1}
#: Float32 copies of one tensor that a step computes: its gradient, and what the optimiser and the projection make on the way.
_STEP_COPIES = 3
#: The process with torch and this package, about 250 MiB, and everything else that is not counted.
_SLACK = 320 << 20


def open_runner(
    checkpoint: Checkpoint,
    names: Collection[str],
    context: Context,
    *,
    workspace: Workspace,
    with_targets: bool,
    teacher: Teacher | None = None,
    leave: Collection[str] = (),
) -> BlockRunner:
    """Return a block runner over the calibration data that may change the tensors ``names``.

    Args:
        with_targets: the runner also computes the outputs of the original blocks.
        teacher: the model that gives these outputs; None for the checkpoint itself.
        leave: tensors that may stay where calibration does not reach, see `BlockRunner`; the pass treats them itself.
    """
    from compress.blockwise.inputs import Inputs
    from compress.blockwise.runner import BlockRunner
    from compress.models.classes import check_arguments

    batches = context.data("calibration")
    runner = BlockRunner(
        checkpoint,
        Inputs(batches.values, batches.mask, batches.target_mask, rows_per_sample(checkpoint.spec, len(batches.ids))),
        set(names),
        workspace=workspace,
        dtype=context.dtype,
        device=context.device,
        progress=context.progress,
        with_targets=with_targets,
        seed=context.seed,
        teacher=teacher,
        leave=leave,
        max_vram=context.max_vram,
    )
    if batches.given is not None:
        check_arguments(batches.given, runner.streamed.model)
    return runner


def require_run(checkpoint: Checkpoint, blocks: Collection[int], context: Context) -> None:
    """Raise `PassError` for blocks, chosen by calibration data, that the model does not run on these."""
    from compress.blockwise.calls import NOT_RUN
    from compress.blockwise.executor import BlockExecutor
    from compress.blockwise.inputs import Inputs
    from compress.blockwise.self_check import blocks_left_out

    batches = context.data("calibration")
    inputs = Inputs(
        batches.values, batches.mask, batches.target_mask, rows_per_sample(checkpoint.spec, len(batches.ids))
    )
    executor = BlockExecutor(checkpoint, inputs, dtype=context.dtype, device=context.device)
    if absent := sorted(blocks_left_out(executor) & {*blocks}):
        raise PassError(
            f"block {absent[0]} would go first, as it {NOT_RUN}",
            key="layers",
            fix=f"name the blocks to remove, as in layers: [{absent[0]}]",
        )


def measured_divergences(
    checkpoint: Checkpoint, names: Sequence[str], changes: WeightDeltas, setting: tuple[str, str], context: Context
) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """Return `sensitivity.matrices.divergences` on the calibration data."""
    from compress.sensitivity.matrices import divergences

    return divergences(
        checkpoint,
        names,
        changes,
        context.data("calibration"),
        setting=setting,
        device=context.device,
        seed=context.seed,
        progress=context.progress,
    )


def runner_memory(
    spec: Spec,
    names: Collection[str],
    width: int,
    solver: SolverMemory,
    *,
    reconstruction: Literal["floats", "scales"] | None = None,
    output_curvature: bool = False,
) -> int:
    """Return the bytes resident at the peak of a block runner: embeddings, one block, and solving or reconstruction.

    Args:
        names: tensors that the runner changes.
        width: bytes of a float of the computation.
        solver: memory of the solver of these tensors.
        reconstruction: what block reconstruction trains, see `RECONSTRUCTION_COPIES`; None without reconstruction.
        output_curvature: curvatures [O, O] are held, and gradients are measured for them.
    """
    mapped = model_map(spec)
    outside = sum(t.count for t in mapped.outside)
    head = sum(t.count for t in mapped.outside if t.module == mapped.record.head)
    table = spec.tensors[mapped.embedding].count if mapped.embedding is not None else 0
    resident = width * (outside - head - table)  # only predictions of tokens load the head; tables are in a file
    vocabulary = max((t.shape[0] for t in mapped.outside if t.shape), default=0)
    predicting = width * max(head, table) + 5 * 4 * LOGITS_PER_CHUNK * vocabulary if output_curvature else 0
    peak = max(predicting, (width + 4) * table)  # the table is converted once
    linears = (linear for name in names if (linear := mapped.linears.get(name)) is not None)
    broadest = max((max(x.O, x.I, *x.tensor.shape) for x in linears), default=0)
    activations = 4 * 6 * TOKENS_PER_BATCH["cpu"] * broadest  # of one batch
    for one in mapped.blocks:
        block = sum(t.count for t in one.stored())
        changed = [x for x in one.linears if x.name in names and x.shared_with is None]
        grams = [_gram_bytes(x.I) for x in changed]
        statistics = max(max(grams, default=0), min(sum(grams), STATISTICS_BYTES)) + activations
        held = curvatures_that_fit(x.O for x in changed if x.expert is None) if output_curvature else []
        measuring = 4 * sum(o * o for o in held) + 2 * activations
        solving = max((_solving(x.O, x.I, solver, held) for x in changed), default=0)
        tuning = 0
        if reconstruction is not None:
            copies = 4 * RECONSTRUCTION_COPIES[reconstruction] * block
            tuning = copies + 4 * _STEP_COPIES * _largest_parameter(one) + SAVED_BYTES + activations
        kept = int(solver.kept * sum(x.tensor.count for x in changed))
        peak = max(peak, width * block + kept + max(statistics, measuring, solving, tuning))
    return resident + peak + ALLOCATOR_RETAIN + _SLACK


def _gram_bytes(width: int) -> int:
    return width * width * (8 if width <= FLOAT64_MAX_WIDTH else 4)


def _solving(outputs: int, inputs: int, solver: SolverMemory, held: Collection[int]) -> int:
    """Bytes at the peak of solving for one matrix; ``held``: sizes of output curvatures, which have copies in a part's size."""
    curvature = outputs**2 + 4 * outputs_at_once(outputs, inputs) ** 2 if outputs in held else 0
    return solver.peak(_gram_bytes(inputs), outputs, inputs) + 4 * curvature


def _largest_parameter(block: ModelBlock) -> int:
    """Number of weights of a block's largest parameter; experts may be in one."""
    experts = sum(x.tensor.count for x in block.linears if x.expert is not None)
    return max(experts, max((t.count for t in block.stored()), default=0))


def trials_memory(spec: Spec, width: int) -> int:
    """Return the bytes resident at the peak while sets of blocks are left out on trial, see `sensitivity.depth`.

    Embeddings, the head, one block, hidden states before and behind it, and the logits of some tokens.

    Args:
        width: bytes of a float of the computation.
    """
    mapped = model_map(spec)
    outside = sum(t.count for t in mapped.outside)
    block = max(sum(t.count for t in one.stored()) for one in mapped.blocks)
    vocabulary = max((t.shape[0] for t in mapped.outside if t.shape), default=0)
    broadest = max((max(t.shape, default=1) for one in mapped.blocks for t in one.stored()), default=0)
    logits = 5 * 4 * LOGITS_PER_CHUNK * vocabulary
    activations = 4 * 6 * TOKENS_PER_BATCH["cpu"] * broadest
    return width * (outside + block) + 2 * STATES_BYTES + logits + activations + ALLOCATOR_RETAIN + _SLACK


def trains_predictions(spec: Spec, target: str) -> bool:
    """Whether the last block is reconstructed towards predictions: of a model that predicts the next token of one text."""
    causal = (spec.structure.class_name or "").endswith(CAUSAL_LM.suffixes) and not is_seq2seq(spec.structure)
    return target == "predictions" and causal


def require_head(spec: Spec, asks: str, key: str, instead: str) -> None:
    """Raise `PassError` for a model without a head, since the setting ``asks`` needs gradients of predictions."""
    if task_of(spec.structure.class_name) is EMBEDDING:
        raise PassError(f"{asks} needs a model that predicts something", key=key, fix=instead)
