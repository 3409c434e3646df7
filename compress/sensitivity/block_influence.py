"""How much each block changes its input, measured on calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.models.blocks import find_blocks
from compress.models.loading import load_checkpoint
from compress.solvers.block_influence import influence

if TYPE_CHECKING:
    from compress.checkpoint.open import Checkpoint
    from compress.data.batches import Batches
    from compress.progress import Progress

_TOKENS_PER_BATCH = 4096


def block_influence(
    checkpoint: Checkpoint, samples: Batches, *, dtype: str, device: str, progress: Progress
) -> list[float]:
    """Block influence (ShortGPT, arXiv 2403.03853) of every block: mean over tokens of 1 - cos(input, output).

    Args:
        samples: the calibration text; padding is masked and does not count.
    """
    import torch

    record = model_map(checkpoint.spec).record
    model = load_checkpoint(checkpoint, dtype=dtype, device=device)
    blocks = find_blocks(model, record)
    totals = [[0.0, 0.0] for _ in blocks]
    mask: list[Any] = [None]  # of the batch under way
    handles = [
        block.register_forward_hook(_recorder(total, mask), with_kwargs=True)
        for block, total in zip(blocks, totals, strict=True)
    ]
    batches = samples.parts(_TOKENS_PER_BATCH)
    try:
        with torch.inference_mode(), progress.task("block influence", len(batches), "batches") as task:
            for part in batches:
                mask[0] = None if part.mask is None else part.mask.to(model.device)
                model.base_model(**part.inputs(model.device))
                task.advance()
    finally:
        for handle in handles:
            handle.remove()
    return [total / count for total, count in totals]


def _recorder(total: list[float], mask: list[Any]) -> Any:
    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        changed, count = influence(before, after, mask[0])
        total[0] += changed
        total[1] += count

    return record
