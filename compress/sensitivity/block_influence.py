"""Block influence: how much each block changes its input, measured on calibration data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures.model_map import model_map
from compress.models.blocks import find_blocks
from compress.models.loading import load_checkpoint
from compress.sensitivity.samples import SampleLoop

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.data.batches import Batches
    from compress.progress import Progress

_TOKENS_PER_BATCH = 4096


def influence(before: torch.Tensor, after: torch.Tensor, weights: torch.Tensor | None = None) -> tuple[float, float]:
    """Return the sum over tokens of 1 - cos(before, after), and the number of tokens.

    Args:
        before, after: hidden states at a block's input and output, [..., hidden], any float dtype; cosines are in float32.
        weights: 1 for tokens that count, 0 for padding, [...]; None if all count.
    """
    cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).double()
    if weights is None:
        return float((1 - cosine).sum()), float(cosine.numel())
    return float(((1 - cosine) * weights).sum()), float(weights.sum())


def angular_distance(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Angles between hidden states over π by token that counts, 0 to 1 (Gromov et al., arXiv 2403.17887, equation 7).

    The paper takes the last token of each sample. Infinite where the widths differ.

    Args:
        before, after: [samples, tokens, hidden]. mask: which tokens count, bool [samples, tokens]; None for all.
    """
    if before.shape != after.shape:
        return torch.tensor([math.inf])
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    angles = cosine.clamp(-1, 1).arccos() / math.pi
    return angles.flatten() if mask is None or mask.shape != angles.shape else angles[mask]


def block_influence(
    checkpoint: Checkpoint, samples: Batches, *, dtype: str, device: str, progress: Progress
) -> list[float]:
    """Block influence of every block: mean over tokens of 1 - cos(input, output).

    Args:
        samples: the calibration text; padding is masked and does not count.

    Source: ShortGPT (arXiv 2403.03853), equation 1.
    """
    record = model_map(checkpoint.spec).record
    model: Any = load_checkpoint(checkpoint, dtype=dtype, device=device)
    blocks = find_blocks(model, record)
    loop = SampleLoop(samples, model.device, tokens=_TOKENS_PER_BATCH)
    totals = [[0.0, 0.0] for _ in blocks]
    handles = [
        block.register_forward_hook(_recorder(total, loop), with_kwargs=True)
        for block, total in zip(blocks, totals, strict=True)
    ]
    try:
        with torch.inference_mode():
            for sample in loop.with_progress(progress, "block influence", "batches"):
                model.base_model(**sample.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [total / count if count else 0.0 for total, count in totals]  # none where a block is not run


def _recorder(total: list[float], loop: SampleLoop) -> Any:
    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, (tuple, list)) else output
        mask = loop.current.mask
        changed, count = influence(before, after, None if mask is None else _laid_out(mask, before.shape[:-1]))
        total[0] += changed
        total[1] += count

    return record


def _laid_out(mask: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A mask [samples, length] for hidden states [samples, longer] or [longer, samples], which a class may fill up behind."""
    if shape[0] != len(mask) and shape[1] == len(mask):
        return _laid_out(mask, torch.Size((shape[1], shape[0]))).T
    return torch.nn.functional.pad(mask, (0, max(0, shape[1] - mask.shape[1])))
