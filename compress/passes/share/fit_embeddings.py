"""Fit embeddings to calibration data: one table for input and output, or thin tables with projections."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.streamed import StopForward
from compress.checkpoint.values import Checkpoint, Derived, Value, torch_dtype
from compress.data.batches import Batches
from compress.models.loading import load_checkpoint
from compress.passes.memory import by_blocks
from compress.progress import Progress
from compress.sensitivity.ends import LastStates, last_states
from compress.sensitivity.samples import SampleLoop
from compress.solvers.embeddings import thin_input, thin_output, thin_tied
from compress.spec.spec import Spec

#: Tokens per forward pass of a whole model, and rows of tables that are in float64 at a time.
_TOKENS, _ROWS = 2048, 4096


@dataclass(frozen=True)
class Tables:
    """Embeddings of a model, with statistics of calibration data.

    Input embeddings E [V, h] and the frequency [V] of each token, float64; the head's W [V, h] and the Hessian H = Σ x xᵀ
    [h, h] of its inputs, float64, both None without a head. Tables are read when asked for, in the checkpoint's dtype.
    """

    checkpoint: Checkpoint
    counts: torch.Tensor
    H: torch.Tensor | None

    @property
    def E(self) -> torch.Tensor:
        """Input embeddings."""
        name = model_map(self.checkpoint.spec).embedding
        assert name is not None
        return self._read(name)

    @property
    def W(self) -> torch.Tensor | None:
        """The head's matrix."""
        head = model_map(self.checkpoint.spec).head_weight
        return None if head is None or self.H is None else self._read(head.alias_of or head.name)

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name).data.to(self.counts.device)


def read_tables(
    checkpoint: Checkpoint, batches: Batches, *, device: str, dtype: str, progress: Progress, work: Path
) -> Tables:
    """Embeddings of a model and their statistics on the batches.

    One block is in memory, or the whole model where that does not run block by block.

    Args:
        work: folder of files of hidden states.
    """
    spec = checkpoint.spec
    table = model_map(spec).embedding
    assert table is not None
    counts = torch.zeros(spec.tensors[table].shape[0], dtype=torch.float64, device=device)
    loop = SampleLoop(batches, device, tokens=_TOKENS)
    for sample in loop:
        counts += torch.bincount(sample.counted(sample.inputs["input_ids"].flatten()), minlength=len(counts))
    if not model_map(spec).has_head:
        return Tables(checkpoint, counts, None)
    if by_blocks(spec):
        with (
            last_states(checkpoint, batches, dtype=dtype, device=device, work=work) as end,
            end.executor.streamed.head(),
        ):
            return Tables(checkpoint, counts, _read_by_head(end, batches))
    model: Any = load_checkpoint(checkpoint, dtype=dtype, device=device)
    if (head := model.get_output_embeddings()) is None:
        return Tables(checkpoint, counts, None)
    sums = _zeros(head)
    head.register_forward_pre_hook(lambda m, args: _add(sums, loop.current.counted(_rows(m, args))))
    with torch.inference_mode():
        for sample in loop.with_progress(progress, "reading what predictions are made of", "batches"):
            model(**sample.inputs)
    return Tables(checkpoint, counts, sums)


def _read_by_head(end: LastStates, batches: Batches) -> torch.Tensor | None:
    """Σ x xᵀ of the inputs of the head."""
    model: Any = end.executor.streamed.model
    if (head := model.get_output_embeddings()) is None:
        return None
    sums, seen = _zeros(head), list[torch.Tensor]()

    def see(module: Any, args: tuple[Any, ...]) -> None:
        seen.append(_rows(module, args))
        raise StopForward

    handle = head.register_forward_pre_hook(see)
    with torch.no_grad():
        for row in range(len(batches.ids)):
            with suppress(StopForward):
                next(end.outputs([row]))
            x, mask = seen.pop(), None if batches.mask is None else batches.mask[row].to(sums.device)
            _add(sums, x if mask is None else x[mask])
    handle.remove()
    return sums


def _zeros(head: Any) -> torch.Tensor:
    width = head.weight.shape[1]
    return torch.zeros(width, width, dtype=torch.float64, device=head.weight.device)


def _rows(head: Any, args: tuple[Any, ...]) -> torch.Tensor:
    rows: torch.Tensor = args[0].detach().reshape(-1, head.weight.shape[1])
    return rows


def _add(sums: torch.Tensor, x: torch.Tensor) -> None:
    x = x.double()
    sums.addmm_(x.T, x)


def tie(
    checkpoint: Checkpoint,
    after: Spec,
    batches: Batches,
    *,
    device: str,
    dtype: str,
    progress: Progress,
    work: Path,
) -> Checkpoint:
    """The checkpoint with input and output embeddings tied, as in ``after``.

    Each token's vector t minimises ‖(t - w) X‖² / Σ ‖w X‖² + f ‖t - e‖² / Σ f ‖e‖², with e and w its input and output
    embeddings, X the inputs of the head, and f the token's frequency. Other arguments are those of `read_tables`.
    """
    read = read_tables(checkpoint, batches, device=device, dtype=dtype, progress=progress, work=work)
    E, W, H, counts = read.E, read.W, read.H, read.counts
    assert W is not None
    assert H is not None
    frequency = counts / counts.sum()
    parts = [slice(start, start + _ROWS) for start in range(0, len(E), _ROWS)]
    output = sum(float(((w := W[rows].double()) @ H * w).sum()) for rows in parts)
    seen = sum(float(E[rows].double().square().sum(1) @ frequency[rows]) for rows in parts)
    pull = frequency / max(seen, 1e-30)
    values, vectors = torch.linalg.eigh(H / max(output, 1e-30))
    values = values.clamp_min(values.max() * 1e-6)
    name = after.tensors[model_map(after).record.head_tie].alias_of
    assert name is not None
    table = torch.empty(E.shape, dtype=torch_dtype(after.tensors[name].dtype))
    for rows in parts:
        e, w = (one[rows].double() @ vectors for one in (E, W))
        turned = (w * values + e * pull[rows, None]) / (values + pull[rows, None])
        table[rows] = (turned @ vectors.T).to("cpu", table.dtype)

    def value(tensor: str) -> Value:
        return Value(table) if tensor == name else checkpoint.tensor(tensor)

    return Derived(checkpoint, after, value)


def thin(
    checkpoint: Checkpoint,
    after: Spec,
    batches: Batches,
    rank: int,
    *,
    device: str,
    dtype: str,
    progress: Progress,
    work: Path,
) -> dict[str, torch.Tensor]:
    """Thin tables [V, r] of embeddings and head, with projections; see `solvers.embeddings`.

    Args:
        after: the planned spec; the head's table may be tied.

    Returns:
        On CPU, float64: ``table``, ``in`` [r, h]; with a head ``out`` [r, h], and ``head`` [V, r] if it is not tied.
    """
    read = read_tables(checkpoint, batches, device=device, dtype=dtype, progress=progress, work=work)
    frequency = (read.counts + 1) / (read.counts + 1).sum()
    factors, H = {}, read.H
    if H is not None and model_map(after).tied:
        factors["table"], factors["in"], factors["out"] = thin_tied(read.E, frequency, H, rank)
    else:
        factors["table"], factors["in"] = thin_input(read.E, frequency, rank)
        if (W := read.W) is not None and H is not None:
            factors["head"], factors["out"] = thin_output(W, H, rank)
    return {name: tensor.cpu() for name, tensor in factors.items()}
