"""How much each block changes its input, measured on calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress import architectures
from compress.loading import load_checkpoint
from compress.solvers.block_influence import influence

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.open import Checkpoint
    from compress.progress import Progress

_TOKENS_PER_BATCH = 4096


def block_influence(
    checkpoint: Checkpoint, ids: torch.Tensor, *, dtype: str, device: str, progress: Progress
) -> list[float]:
    """Block influence (ShortGPT, arXiv 2403.03853) of every block: mean over tokens of 1 - cos(input, output).

    Args:
        ids: token ids of the calibration text, int64 [samples, length].
    """
    import torch

    record = architectures.of(checkpoint.spec.structure.config)
    model = load_checkpoint(checkpoint, dtype=dtype, device=device)
    blocks = find_blocks(model, record)
    totals = [[0.0, 0.0] for _ in blocks]
    handles = [
        block.register_forward_hook(_recorder(total), with_kwargs=True)
        for block, total in zip(blocks, totals, strict=True)
    ]
    batches: Any = torch.split(ids, max(1, _TOKENS_PER_BATCH // ids.shape[1]))
    try:
        with torch.inference_mode(), progress.task("block influence", len(batches), "batches") as task:
            for batch in batches:
                model.base_model(input_ids=batch.to(model.device))
                task.advance()
    finally:
        for handle in handles:
            handle.remove()
    return [total / count for total, count in totals]


def find_blocks(model: Any, record: architectures.Architecture) -> Any:
    """The list of blocks of a transformers model."""
    names = {name for name, _ in model.named_modules()}
    path = f"{record.prefix}.{record.blocks}"
    if path not in names:  # a base model has no prefix of its own, but parts of it may remain (OPT's decoder)
        path = next(p for p in (path.partition(".")[2], record.blocks) if p in names)
    return model.get_submodule(path)


def _recorder(total: list[float]) -> Any:
    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        changed, count = influence(before, after)
        total[0] += changed
        total[1] += count

    return record
