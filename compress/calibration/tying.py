"""One table of vectors to look tokens up by and to predict them."""

from __future__ import annotations

from typing import Any

import torch

from compress import architectures
from compress.calibration.batches import Batches
from compress.checkpoint.open import Checkpoint, Derived, Value, torch_dtype
from compress.checkpoint.spec import Spec
from compress.loading import load_checkpoint
from compress.progress import Progress

#: Tokens that run at a time.
_TOKENS = 2048


def tie(
    checkpoint: Checkpoint, after: Spec, batches: Batches, *, device: str, dtype: str, progress: Progress
) -> Checkpoint:
    """The checkpoint with input and output embeddings tied, as ``after`` says.

    Each token's vector t is the one of least ‖(t - w) X‖² / Σ ‖w X‖² + f ‖t - e‖² / Σ f ‖e‖², with e and w the vectors it was
    looked up and predicted by, X the hidden states that predictions are made of, and f how often the token is read.
    The whole model is in memory.
    """
    model: Any = load_checkpoint(checkpoint, dtype=dtype, device=device)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    width = head.weight.shape[1]
    H = torch.zeros(width, width, dtype=torch.float64, device=device)
    counts = torch.zeros(len(table.weight), dtype=torch.float64, device=device)
    mask: list[torch.Tensor | None] = [None]

    def gather(module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, width).double()
        x = x if mask[0] is None else x[mask[0]]
        H.add_(x.T @ x)

    handle = head.register_forward_pre_hook(gather)
    parts = batches.parts(_TOKENS)
    with torch.inference_mode(), progress.task("reading what predictions are made of", len(parts), "batches") as task:
        for part in parts:
            inputs = part.inputs(device)
            mask[0] = None if part.mask is None else part.mask.flatten().to(device)
            ids = inputs["input_ids"].flatten()
            counts += torch.bincount(ids if mask[0] is None else ids[mask[0]], minlength=len(counts))
            model(**inputs)
            task.advance()
    handle.remove()
    E, W = (p.weight.detach().double() for p in (table, head))
    frequency = counts / counts.sum()
    H = H / torch.trace(W.T @ W @ H).clamp_min(1e-30)
    pull = frequency / (frequency * E.square().sum(1)).sum().clamp_min(1e-30)
    values, vectors = torch.linalg.eigh(H)
    values = values.clamp_min(values.max() * 1e-6)
    turned = ((W @ vectors) * values + (E @ vectors) * pull[:, None]) / (values + pull[:, None])
    found = (turned @ vectors.T).cpu()
    del model
    name = after.tensors[architectures.of(after.structure.config).head_tie].alias_of

    def read(tensor: str) -> Value:
        if tensor == name:
            return Value(found.to(torch_dtype(after.tensors[tensor].dtype)))
        return checkpoint.tensor(tensor)

    return Derived(checkpoint, after, read)
