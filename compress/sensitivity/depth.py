"""Which blocks a model can best do without, by the change in its output on calibration data. The whole model is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures.model_map import model_map
from compress.models.blocks import find_blocks
from compress.models.loading import load_for_samples
from compress.sensitivity.samples import Sample, SampleLoop

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.data.batches import Batches
    from compress.progress import Progress

#: Samples that candidates are compared on, and tokens at a time: logits over a large vocabulary are wide.
SAMPLES = 32
_TOKENS_PER_BATCH = 1024


def greedy_depth(
    checkpoint: Checkpoint, samples: Batches, count: int, *, dtype: str, device: str, progress: Progress
) -> tuple[list[int], list[dict[int, float]]]:
    """Indices of ``count`` blocks to remove, chosen greedily by the change in the outputs.

    The change is the mean KL divergence per token, in nats, of the original's predictions from the smaller model's; for a
    model without logits the squared error of its last hidden states over their variance.

    Returns:
        The blocks in order of removal, and for each step the change by candidate.
    """
    record = model_map(checkpoint.spec).record
    model: Any = load_for_samples(checkpoint, dtype=dtype, device=device)
    blocks = find_blocks(model, record)
    loop = SampleLoop(samples.first(SAMPLES), model.device, tokens=_TOKENS_PER_BATCH)
    logits = model.base_model is not model
    gone: list[int] = []
    steps: list[dict[int, float]] = []
    total = sum(len(blocks) - i for i in range(count)) * len(loop)
    with torch.inference_mode(), progress.task("trying without each block", total, "batches") as task:
        for _ in range(count):
            candidates = [i for i in range(len(blocks)) if i not in gone]
            sums = dict.fromkeys(candidates, 0.0)
            tokens = 0
            for sample in loop:
                reference = _outputs(model, sample)
                tokens += len(reference)
                for i in candidates:
                    with without(blocks, [*gone, i]):
                        sums[i] += _difference(reference, _outputs(model, sample), logits)
                    task.advance()
            steps.append({i: value / tokens for i, value in sums.items()})
            gone.append(min(candidates, key=lambda i: (sums[i], i)))
    return gone, steps


def divergence(before: Checkpoint, after: Checkpoint, samples: Batches, *, dtype: str, device: str) -> float:
    """Change of the outputs from one checkpoint to another, as in `greedy_depth`. Both models are in memory."""
    models: list[Any] = [load_for_samples(c, dtype=dtype, device=device) for c in (before, after)]
    logits = models[0].base_model is not models[0]
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for sample in SampleLoop(samples, device, tokens=_TOKENS_PER_BATCH):
            reference, changed = (_outputs(model, sample) for model in models)
            total += _difference(reference, changed, logits)
            tokens += len(reference)
    return total / tokens


def _outputs(model: Any, sample: Sample) -> torch.Tensor:
    """Logits, or hidden states, of the tokens that count, [tokens, …]; of a classifier one row per sample."""
    output: torch.Tensor = model(**sample.inputs)[0].float()
    return output if output.ndim == 2 else sample.counted(output.flatten(0, 1))


def _difference(before: torch.Tensor, after: torch.Tensor, logits: bool) -> float:
    """Summed over rows."""
    if logits:
        return float(
            torch.nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
        )
    return float((after - before).square().mean(-1).sum() / before.var())


@contextmanager
def without(blocks: Any, numbers: Sequence[int]) -> Iterator[None]:
    """Within, those blocks return their input; where a block returns a tuple, it still does."""
    for number in numbers:
        real = blocks[number].forward
        blocks[number].forward = _bypass(real)
    try:
        yield
    finally:
        for number in numbers:
            del blocks[number].forward


def _bypass(real: Any) -> Any:
    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(hidden_states, *args, **kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    return forward
