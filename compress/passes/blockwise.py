"""Helpers of passes that work block by block: open a block runner, and refuse what it does not run."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from compress.architectures.codebooks import rows_per_sample
from compress.errors import PassError
from compress.evaluation.tasks import EMBEDDING, is_seq2seq, task_of
from compress.passes.base import Context
from compress.spec.classes import CAUSAL_LM
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.blockwise.runner import BlockRunner
    from compress.blockwise.targets import Teacher
    from compress.checkpoint.values import Checkpoint
    from compress.workspace import Workspace


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


def trains_predictions(spec: Spec, target: str) -> bool:
    """Whether the last block is reconstructed towards predictions: of a model that predicts the next token of one text."""
    causal = (spec.structure.class_name or "").endswith(CAUSAL_LM.suffixes) and not is_seq2seq(spec.structure)
    return target == "predictions" and causal


def require_head(spec: Spec, asks: str, key: str, instead: str) -> None:
    """Raise `PassError` for a model without a head, since the setting ``asks`` needs gradients of predictions."""
    if task_of(spec.structure.class_name) is EMBEDDING:
        raise PassError(f"{asks} needs a model that predicts something", key=key, fix=instead)
