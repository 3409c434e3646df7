"""Importance of units by the gradients of the model's loss on calibration data. The whole model is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures.groups import PrunableGroup
from compress.architectures.model_map import ModelMap, model_map
from compress.blockwise.experts import Experts
from compress.errors import PassError
from compress.models.blocks import find_blocks
from compress.models.loading import load_for_samples
from compress.sensitivity.samples import SampleLoop, token_losses

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.data.batches import Batches
    from compress.progress import Progress


def taylor_scores(
    checkpoint: Checkpoint,
    units: Sequence[PrunableGroup],
    samples: Batches,
    *,
    dtype: str,
    device: str,
    seed: int,
    progress: Progress,
) -> dict[str, list[float]]:
    """Importance of every unit, by the name of the module that reads it: Σ over samples of (Σ gradient x weight)².

    The inner sum runs over the weights that read the unit. It is the derivative of the sample's loss by a factor on the unit's
    output, so its square is, to first order, the change of the loss without the unit. The loss is that of the next token;
    masked models and classifiers use labels drawn from their own prediction.

    Raises:
        PassError: the model predicts nothing, or lacks a unit's weights.

    Source: Molchanov et al. 2019 (arXiv 1906.10771), equation 8, in groups.
    """
    mapped = model_map(checkpoint.spec)
    model: Any = load_for_samples(checkpoint, dtype=dtype, device=device).requires_grad_(False)
    if model.base_model is model:
        raise PassError(
            "importance: taylor needs a model that predicts something", key="importance", fix="set `importance: obs`"
        )
    readers = [_Reader(model, mapped, one) for one in units]
    generator = torch.Generator(device).manual_seed(seed)
    for sample in SampleLoop(samples, model.device).with_progress(progress, "measuring gradients"):
        losses = token_losses(model, sample, generator, next_token=mapped.record.causal)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for reader in readers:
            reader.add()
        model.zero_grad(set_to_none=True)
    return {reader.units.name: reader.total.tolist() for reader in readers}


class _Reader:
    """Weights that read some units, and the sum so far [units], float64."""

    def __init__(self, model: Any, mapped: ModelMap, units: PrunableGroup) -> None:
        self.units, self.expert = units, None
        linear = mapped.linears[f"{units.name}.weight"]
        self.transposed = linear.transposed
        assert linear.block is not None
        modules = dict(find_blocks(model, mapped.record)[linear.block].named_modules())
        fused = next((m for m in modules.values() if Experts.fits(m)), None)
        if linear.part in modules:
            self.parameter: Any = getattr(modules[linear.part], "weight", None)
        elif linear.expert is not None and fused is not None:
            self.parameter, self.expert = fused.down_proj, linear.expert
            self.transposed = getattr(fused, "is_transposed", False)
        else:
            self.parameter = None
        if self.parameter is None:
            raise PassError(
                f"importance: taylor does not reach {units.name}: it is not a module of its own",
                key="importance",
                fix="set `importance: obs`",
            )
        self.parameter.requires_grad_(True)
        self.total = torch.zeros(units.count, dtype=torch.float64)

    def add(self) -> None:
        """Add one sample's gradients; experts that no token was sent to have none."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        part = slice(None) if self.expert is None else self.expert
        moved = (gradient[part] * self.parameter.detach()[part]).double()
        by_input = moved.sum(1 if self.transposed else 0)
        self.total += by_input.view(self.units.count, -1).sum(1).square().cpu()
