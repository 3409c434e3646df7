"""Which blocks a model can do best without, by what their removal costs on calibration data. The whole model is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.models.blocks import find_blocks
from compress.models.loading import load_checkpoint

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.open import Checkpoint
    from compress.data.batches import Batches
    from compress.progress import Progress

#: Samples that candidates are compared on, and tokens at a time: logits over a large vocabulary are wide.
SAMPLES = 32
_TOKENS_PER_BATCH = 1024


def greedy_depth(
    checkpoint: Checkpoint, samples: Batches, count: int, *, dtype: str, device: str, progress: Progress
) -> tuple[list[int], list[dict[int, float]]]:
    """Numbers of ``count`` blocks to remove, one after another that without which the model's outputs differ least.

    The difference is the mean KL divergence per token, in nats, of the original's predictions from the smaller model's; for a
    model without logits the squared error of its last hidden states over their variance.

    Returns:
        The blocks in order of removal, and for each step the difference by candidate.
    """
    import torch

    record = model_map(checkpoint.spec).record
    model = load_checkpoint(checkpoint, dtype=dtype, device=device)
    blocks = find_blocks(model, record)
    batches = samples.first(SAMPLES).parts(_TOKENS_PER_BATCH)
    logits = model.base_model is not model
    gone: list[int] = []
    steps: list[dict[int, float]] = []
    total = sum(len(blocks) - i for i in range(count)) * len(batches)
    with torch.inference_mode(), progress.task("trying without each block", total, "batches") as task:
        for _ in range(count):
            candidates = [i for i in range(len(blocks)) if i not in gone]
            sums = dict.fromkeys(candidates, 0.0)
            tokens = 0
            for part in batches:
                inputs, counted = part.inputs(model.device), part.mask
                reference = _outputs(model, inputs, counted)
                tokens += len(reference)
                for i in candidates:
                    with without(blocks, [*gone, i]):
                        sums[i] += _difference(reference, _outputs(model, inputs, counted), logits)
                    task.advance()
            steps.append({i: value / tokens for i, value in sums.items()})
            gone.append(min(candidates, key=lambda i: (sums[i], i)))
    return gone, steps


def divergence(before: Checkpoint, after: Checkpoint, samples: Batches, *, dtype: str, device: str) -> float:
    """Difference of two checkpoints' outputs on those samples, as in `greedy_depth`. Both models are in memory."""
    import torch

    models = [load_checkpoint(c, dtype=dtype, device=device) for c in (before, after)]
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for part in samples.parts(_TOKENS_PER_BATCH):
            inputs = part.inputs(device)
            reference, found = (_outputs(model, inputs, part.mask) for model in models)
            total += _difference(reference, found, models[0].base_model is not models[0])
            tokens += len(reference)
    return total / tokens


def _outputs(model: Any, inputs: dict[str, torch.Tensor], counted: torch.Tensor | None) -> torch.Tensor:
    """Logits, or hidden states, of the tokens that count, [tokens, …]; of a classifier one row per sample."""
    output = model(**inputs)[0].float()
    if output.ndim == 2:
        return output  # type: ignore[no-any-return]
    return output.flatten(0, 1) if counted is None else output[counted.to(output.device)]  # type: ignore[no-any-return]


def _difference(before: torch.Tensor, after: torch.Tensor, logits: bool) -> float:
    """Summed over rows."""
    import torch

    if logits:
        return float(
            torch.nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
        )
    return float((after - before).square().mean(-1).sum() / before.var())


@contextmanager
def without(blocks: Any, numbers: Sequence[int]) -> Iterator[None]:
    """Within, those blocks hand on what they read; where a block returns a tuple, it still does."""
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
