"""Memory of passes that read calibration data, from headers alone. No torch here."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from compress.architectures.matrices import ModelBlock
from compress.architectures.model_map import model_map
from compress.blockwise.memory_budget import (
    ALLOCATOR_RETAIN,
    FLOAT64_MAX_WIDTH,
    LOGITS_PER_CHUNK,
    PROBE_BYTES,
    SAVED_BYTES,
    STATES_BYTES,
    STATISTICS_BYTES,
    TOKENS_PER_BATCH,
    curvatures_that_fit,
)
from compress.solvers.memory import NO_SOLVER, SolverMemory, outputs_at_once
from compress.spec.spec import Spec

#: Float32 copies of the trained share of a block that reconstruction holds beside its weights: two moments of floats and of
#: factors; scales are few.
RECONSTRUCTION_COPIES = {"floats": 2.0, "factors": 2.0, "scales": 0.1}
#: Float32 copies of one tensor that a step computes: its gradient, and what the optimiser and the projection make on the way.
_STEP_COPIES = 3
#: Everything that is not counted.
_SLACK = 96 << 20


def runner_memory(
    spec: Spec,
    names: Collection[str],
    width: int,
    solver: SolverMemory,
    *,
    reconstruction: Literal["floats", "factors", "scales"] | None = None,
    trained: float = 1,
    output_curvature: bool = False,
    gradients: bool = False,
    teacher: Spec | None = None,
) -> int:
    """Return the bytes resident at the peak of a block runner: embeddings, one block, and solving or reconstruction.

    Args:
        names: tensors that the runner changes.
        width: bytes of a float of the computation.
        solver: memory of the solver of these tensors.
        reconstruction: what block reconstruction trains, see `RECONSTRUCTION_COPIES`; None without reconstruction.
        trained: numbers that it trains for each weight of the block, where these are factors.
        output_curvature: curvatures [O, O] are held, and gradients are measured for them.
        gradients: gradients go through each block, forwards and backwards.
        teacher: the original, whose blocks are loaded beside the changed ones before these are solved; None where it has the
            same blocks.
    """
    mapped = model_map(spec)
    outside = sum(t.count for t in mapped.outside)
    head = sum(t.count for t in mapped.outside if t.module == mapped.record.head)
    table = spec.tensors[mapped.embedding].count if mapped.embedding is not None else 0
    resident = width * (outside - head - table)  # only predictions of tokens load the head; tables are in a file
    vocabulary = max((t.shape[0] for t in mapped.outside if t.shape), default=0)
    predicting = (
        width * max(head, table) + 5 * 4 * LOGITS_PER_CHUNK * vocabulary if output_curvature or gradients else 0
    )
    peak = max(predicting, (width + 4) * table)  # the table is converted once
    linears = (linear for name in names if (linear := mapped.linears.get(name)) is not None)
    broadest = max((max(x.O, x.I, *x.tensor.shape) for x in linears), default=0)
    activations = 4 * 6 * TOKENS_PER_BATCH["cpu"] * broadest  # of one batch
    beside = 0 if teacher is None else width * largest_block(teacher)
    for one in mapped.blocks:
        block = sum(t.count for t in one.stored())
        changed = [x for x in one.linears if x.name in names and x.shared_with is None]
        grams = [gram_bytes(x.I) for x in changed]
        statistics = max(max(grams, default=0), min(sum(grams), STATISTICS_BYTES)) + activations
        held = curvatures_that_fit(x.O for x in changed if x.expert is None) if output_curvature else []
        measuring = 4 * sum(o * o for o in held) + 2 * activations * (output_curvature or gradients)
        solving = max((_solving(x.O, x.I, solver, held) for x in changed), default=0)
        tuning = 0
        if reconstruction is not None:
            copies = int(4 * RECONSTRUCTION_COPIES[reconstruction] * trained * block)
            step = 1 + trained if reconstruction == "factors" else _STEP_COPIES
            tuning = copies + int(4 * step * _largest_parameter(one)) + SAVED_BYTES + activations
        kept = int(solver.kept * sum(x.tensor.count for x in changed))
        peak = max(peak, width * block + kept + max(statistics, measuring, solving, tuning))
        peak = max(peak, width * block + beside + activations)
    return resident + peak + ALLOCATOR_RETAIN + _SLACK


def largest_block(spec: Spec) -> int:
    """Number of weights of the largest block."""
    return max(sum(t.count for t in one.stored()) for one in model_map(spec).blocks)


def gram_bytes(width: int) -> int:
    """Bytes of the Hessian of so many inputs."""
    return width * width * (8 if width <= FLOAT64_MAX_WIDTH else 4)


def _solving(outputs: int, inputs: int, solver: SolverMemory, held: Collection[int]) -> int:
    """Bytes at the peak of solving for one matrix; ``held``: sizes of output curvatures, which have copies in a part's size."""
    curvature = outputs**2 + 4 * outputs_at_once(outputs, inputs) ** 2 if outputs in held else 0
    return solver.peak(gram_bytes(inputs), outputs, inputs) + 4 * curvature


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
    block = largest_block(spec)
    vocabulary = max((t.shape[0] for t in mapped.outside if t.shape), default=0)
    broadest = max((max(t.shape, default=1) for one in mapped.blocks for t in one.stored()), default=0)
    logits = 5 * 4 * LOGITS_PER_CHUNK * vocabulary
    activations = 4 * 6 * TOKENS_PER_BATCH["cpu"] * broadest
    return width * (outside + block) + 2 * STATES_BYTES + logits + activations + ALLOCATOR_RETAIN + _SLACK


def by_blocks(spec: Spec, names: Collection[str] = ()) -> bool:
    """Whether divergences are measured with one block in memory; otherwise the whole model is.

    Args:
        names: the matrices that change.
    """
    mapped = model_map(spec)
    shared = {t.alias_of for t in spec.tensors.values()}
    return (
        mapped.record.source == "written"
        and not mapped.record.stacks
        and all(mapped.block_of(n) is not None and n not in shared and not mapped.linears[n].kernel for n in names)
    )


def divergence_memory(spec: Spec, names: Collection[str], width: int, solver: SolverMemory, probes: int) -> int:
    """Bytes for measuring divergences: the block runner's and some probes; or the whole model and all probes.

    Args:
        width: bytes of a float of the computation. solver: memory of the solver that makes the probes. probes: changes of each
            matrix, in bfloat16.
    """
    if not by_blocks(spec, names):
        return 4 * spec.parameters + 2 * probes * sum(spec.tensors[name].count for name in names)
    largest = max((spec.tensors[name].count for name in names), default=0)
    held = 2 * probes * largest + PROBE_BYTES
    return held + runner_memory(spec, names, width, solver, gradients=True)


def comparison_memory(before: Spec, after: Spec, width: int) -> int:
    """Bytes for comparing the predictions of two models: of a block, or of both heads; of both models where they run whole.

    Args:
        width: bytes of a float of the computation.
    """
    if not (by_blocks(before) and by_blocks(after)):
        return width * (before.parameters + after.parameters)
    heads = predicting = 0
    for mapped in (model_map(before), model_map(after)):
        heads += sum(t.count for t in mapped.outside if t.module == mapped.record.head) or max(
            (t.count for t in mapped.outside), default=0
        )
        predicting += 5 * 4 * LOGITS_PER_CHUNK * max((t.shape[0] for t in mapped.outside if t.shape), default=0)
    one = max(runner_memory(spec, [], width, NO_SOLVER) for spec in (before, after))
    return max(one, width * heads + predicting + ALLOCATOR_RETAIN + _SLACK)
