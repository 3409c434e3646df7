"""Fit embeddings to calibration data: one table for input and output, or thin tables with projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.values import Checkpoint, Derived, Value, torch_dtype
from compress.data.batches import Batches
from compress.models.loading import load_checkpoint
from compress.progress import Progress
from compress.sensitivity.samples import SampleLoop
from compress.solvers.embeddings import thin_input, thin_output, thin_tied
from compress.spec.spec import Spec

#: Tokens per forward pass.
_TOKENS = 2048


@dataclass(frozen=True)
class Tables:
    """Embeddings of a model, with statistics of calibration data; float64.

    Input embeddings E [V, h] and the frequency [V] of each token; the head's W [V, h] and the Hessian H = Σ x xᵀ [h, h] of its
    inputs, both None without a head.
    """

    E: torch.Tensor
    counts: torch.Tensor
    W: torch.Tensor | None
    H: torch.Tensor | None


def read_tables(checkpoint: Checkpoint, batches: Batches, *, device: str, dtype: str, progress: Progress) -> Tables:
    """Embeddings of a model and their statistics on the batches. The whole model is in memory."""
    model: Any = load_checkpoint(checkpoint, dtype=dtype, device=device)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    loop = SampleLoop(batches, device, tokens=_TOKENS)
    counts = torch.zeros(len(table.weight), dtype=torch.float64, device=device)
    H: torch.Tensor | None = None
    if head is not None:
        width = head.weight.shape[1]
        H = sums = torch.zeros(width, width, dtype=torch.float64, device=device)

        def add_inputs(module: Any, args: tuple[Any, ...]) -> None:
            x = loop.current.counted(args[0].reshape(-1, width).double())
            sums.add_(x.T @ x)

        head.register_forward_pre_hook(add_inputs)
    with torch.inference_mode():
        for sample in loop.with_progress(progress, "reading what predictions are made of", "batches"):
            counts += torch.bincount(sample.counted(sample.inputs["input_ids"].flatten()), minlength=len(counts))
            if H is not None:
                model(**sample.inputs)
    return Tables(table.weight.detach().double(), counts, None if head is None else head.weight.detach().double(), H)


def tie(
    checkpoint: Checkpoint, after: Spec, batches: Batches, *, device: str, dtype: str, progress: Progress
) -> Checkpoint:
    """The checkpoint with input and output embeddings tied, as in ``after``.

    Each token's vector t minimises ‖(t - w) X‖² / Σ ‖w X‖² + f ‖t - e‖² / Σ f ‖e‖², with e and w its input and output
    embeddings, X the inputs of the head, and f the token's frequency. The whole model is in memory.
    """
    read = read_tables(checkpoint, batches, device=device, dtype=dtype, progress=progress)
    E, W, H, counts = read.E, read.W, read.H, read.counts
    assert W is not None
    assert H is not None
    frequency = counts / counts.sum()
    H = H / torch.trace(W.T @ W @ H).clamp_min(1e-30)
    pull = frequency / (frequency * E.square().sum(1)).sum().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh(H)
    values = values.clamp_min(values.max() * 1e-6)
    turned = ((W @ vectors) * values + (E @ vectors) * pull[:, None]) / (values + pull[:, None])
    table = (turned @ vectors.T).cpu()
    name = after.tensors[model_map(after).record.head_tie].alias_of

    def value(tensor: str) -> Value:
        if tensor == name:
            return Value(table.to(torch_dtype(after.tensors[tensor].dtype)))
        return checkpoint.tensor(tensor)

    return Derived(checkpoint, after, value)


def thin(
    checkpoint: Checkpoint, after: Spec, batches: Batches, rank: int, *, device: str, dtype: str, progress: Progress
) -> dict[str, torch.Tensor]:
    """Thin tables [V, r] of embeddings and head, with projections; see `solvers.embeddings`.

    Args:
        after: the planned spec; the head's table may be tied.

    Returns:
        On CPU, float64: ``table``, ``in`` [r, h]; with a head ``out`` [r, h], and ``head`` [V, r] if it is not tied.
    """
    read = read_tables(checkpoint, batches, device=device, dtype=dtype, progress=progress)
    frequency = (read.counts + 1) / (read.counts + 1).sum()
    factors = {}
    if read.W is not None and read.H is not None and model_map(after).tied:
        factors["table"], factors["in"], factors["out"] = thin_tied(read.E, frequency, read.H, rank)
    else:
        factors["table"], factors["in"] = thin_input(read.E, frequency, rank)
        if read.W is not None and read.H is not None:
            factors["head"], factors["out"] = thin_output(read.W, read.H, rank)
    return {name: tensor.cpu() for name, tensor in factors.items()}
