"""The Fisher information of weights: how much the model's predictions depend on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from compress.checkpoint.values import Checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_for_samples
from compress.progress import Progress
from compress.sensitivity.matrices import SAMPLES
from compress.sensitivity.samples import SampleLoop, token_losses


def fisher_information(
    checkpoint: Checkpoint, names: Sequence[str], batches: Batches, *, device: str, seed: int, progress: Progress
) -> Callable[[str], torch.Tensor]:
    """A function from a tensor's name to its diagonal Fisher information, shaped as the tensor, float32.

    It is the mean over calibration samples of the squared gradient of the log-likelihood of tokens, or of a class, drawn from
    the model's predictions. The whole model is in memory, with gradients and their squares for those tensors.

    Raises:
        PassError: the model predicts nothing, or a tensor is not a parameter of its own.

    Source: Fisher-weighted averaging (arXiv 2111.09832), section 3.2.
    """
    model: Any = load_for_samples(checkpoint, dtype="float32", device=device)
    if model.base_model is model:
        raise PassError("`init: fisher` needs a model that predicts something", key="init", fix="use `least_squares`")
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    if missing := next((n for n in names if n not in parameters), None):
        raise PassError(f"`init: fisher` does not reach {missing}: it is not a parameter of its own", key="init")
    sums = {n: torch.zeros_like(parameters[n]) for n in names}
    for name in names:
        parameters[name].requires_grad_(True)
    generator = torch.Generator(device).manual_seed(seed)
    loop = SampleLoop(batches.first(SAMPLES), device)
    for sample in loop.with_progress(progress, "measuring what weights matter"):
        token_losses(model, sample, generator).sum().backward()  # type: ignore[no-untyped-call]
        for name in names:
            gradient = parameters[name].grad
            assert gradient is not None
            sums[name] += gradient.square()
            parameters[name].grad = None
    return lambda name: sums[name] / len(loop)
