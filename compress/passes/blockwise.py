"""What passes that work block by block have in common: their sweep, and the memory it will take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import (
    ALLOCATOR_RETAIN,
    FLOAT64_MAX_WIDTH,
    LOGITS_PER_CHUNK,
    STATISTICS_BYTES,
    TOKENS_PER_BATCH,
    curvatures_that_fit,
)
from compress.errors import PassError
from compress.evaluation.tasks import EMBEDDING, task_of
from compress.passes.base import Context
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.blockwise.runner import BlockRunner
    from compress.blockwise.targets import Teacher
    from compress.checkpoint.values import Checkpoint
    from compress.sensitivity.matrices import WeightDeltas
    from compress.workspace import Workspace

#: Small things.
_SLACK = 96 << 20


def open_runner(
    checkpoint: Checkpoint,
    names: Collection[str],
    context: Context,
    *,
    workspace: Workspace,
    with_targets: bool,
    teacher: Teacher | None = None,
) -> BlockRunner:
    """A sweep over the calibration data that may change the tensors ``names``, tuned towards the checkpoint or a teacher."""
    from compress.blockwise.executor import Inputs
    from compress.blockwise.runner import BlockRunner

    batches = context.data("calibration")
    return BlockRunner(
        checkpoint,
        Inputs(batches.values, batches.mask),
        set(names),
        workspace=workspace,
        dtype=context.dtype,
        device=context.device,
        progress=context.progress,
        with_targets=with_targets,
        seed=context.seed,
        teacher=teacher,
    )


def measured_divergences(
    checkpoint: Checkpoint, names: Sequence[str], changes: WeightDeltas, setting: tuple[str, str], context: Context
) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """See `sensitivity.matrices.divergences`, on the calibration data."""
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
    *,
    factors: float,
    copies: int,
    moments: int,
    kept: float,
    by_outputs: bool = False,
) -> int:
    """Bytes resident at the peak of a sweep: embeddings, one block, and the larger of what solving and tuning it take.

    Args:
        names: the tensors it changes. width: bytes of a float of the computation.
        factors: matrices of the size of the largest statistics that the solver holds beside them.
        copies: float32 matrices of the size of the largest weight that it holds.
        moments: float32 copies of the block that tuning holds; 0 without. kept: bytes per weight of what is chosen so far.
        by_outputs: whether curvatures by outputs are held, and gradients measured for them.
    """
    mapped = model_map(spec)
    outside = mapped.outside
    head = width * sum(t.count for t in outside if t.module == mapped.record.head)
    resident = width * sum(t.count for t in outside) - head  # the head is not loaded, but to predict tokens
    vocabulary = max((t.shape[0] for t in outside if t.shape), default=0)
    peak = head + 5 * 4 * LOGITS_PER_CHUNK * vocabulary if by_outputs else 0
    for one in mapped.blocks:
        block = sum(t.count for t in one.stored())
        changed = [x for x in one.linears if x.name in names and x.shared_with is None]
        wide = [x.I for x in changed]
        grams = [size * size * (8 if size <= FLOAT64_MAX_WIDTH else 4) for size in wide]
        largest, matrix = max(grams, default=0), max((x.tensor.count for x in changed), default=0)
        statistics = max(largest, min(sum(grams), STATISTICS_BYTES))
        solving = largest + int(factors * largest) + 4 * copies * matrix
        chosen = int(kept * sum(x.tensor.count for x in changed))
        if by_outputs:
            held = curvatures_that_fit(x.O for x in changed if x.expert is None)
            chosen += 4 * (sum(o * o for o in held) + 4 * max(held, default=0) ** 2)  # and factors of the largest
        peak = max(peak, width * block + chosen + max(statistics, solving, 4 * moments * block))
    broadest = max((max(t.shape) for t in spec.stored() if t.name in names), default=0)
    activations = 4 * 6 * TOKENS_PER_BATCH["cpu"] * broadest  # of one batch
    return resident + peak + ALLOCATOR_RETAIN + _SLACK + activations


def require_head(spec: Spec, asks: str, key: str, instead: str) -> None:
    """Raises `PassError` for a model without a head: its predictions, which ``asks`` wants gradients of, are none."""
    if task_of(spec.structure.class_name) is EMBEDDING:
        raise PassError(f"{asks} needs a model that predicts something", key=key, fix=instead)
