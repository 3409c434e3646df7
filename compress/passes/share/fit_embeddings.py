"""Tables of vectors that tokens are looked up and predicted by: one for both, or thin ones with projections."""

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

#: Tokens that run at a time.
_TOKENS = 2048


@dataclass(frozen=True)
class Tables:
    """What calibration data say of a model's tables: E [V, h] that tokens are looked up by, how often each is [V]; W [V, h]
    that they are predicted by, and H = Σ x xᵀ of what those predictions are made of, both None without a head. Float64.
    """

    E: torch.Tensor
    counts: torch.Tensor
    W: torch.Tensor | None
    H: torch.Tensor | None


def read_tables(checkpoint: Checkpoint, batches: Batches, *, device: str, dtype: str, progress: Progress) -> Tables:
    """The tables of a model, and what the batches say of them. The whole model is in memory."""
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
    """The checkpoint with input and output embeddings tied, as ``after`` says.

    Each token's vector t is the one of least ‖(t - w) X‖² / Σ ‖w X‖² + f ‖t - e‖² / Σ f ‖e‖², with e and w the vectors it was
    looked up and predicted by, X the hidden states that predictions are made of, and f how often the token is read.
    The whole model is in memory.
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
    found = (turned @ vectors.T).cpu()
    name = after.tensors[model_map(after).record.head_tie].alias_of

    def value(tensor: str) -> Value:
        if tensor == name:
            return Value(found.to(torch_dtype(after.tensors[tensor].dtype)))
        return checkpoint.tensor(tensor)

    return Derived(checkpoint, after, value)


def thin(
    checkpoint: Checkpoint, after: Spec, batches: Batches, rank: int, *, device: str, dtype: str, progress: Progress
) -> dict[str, torch.Tensor]:
    """The table of embeddings, and that of the head, as thin tables [V, r] with projections; see `solvers.embeddings`.

    Args:
        after: the spec with them, where the head's table is tied or not.

    Returns:
        On CPU, float64: ``table``, ``in`` [r, h]; where there is a head ``out`` [r, h], and ``head`` [V, r] if it is not tied.
    """
    read = read_tables(checkpoint, batches, device=device, dtype=dtype, progress=progress)
    frequency = (read.counts + 1) / (read.counts + 1).sum()
    found = {}
    if read.W is not None and read.H is not None and model_map(after).tied:
        found["table"], found["in"], found["out"] = thin_tied(read.E, frequency, read.H, rank)
    else:
        found["table"], found["in"] = thin_input(read.E, frequency, rank)
        if read.W is not None and read.H is not None:
            found["head"], found["out"] = thin_output(read.W, read.H, rank)
    return {name: tensor.cpu() for name, tensor in found.items()}
