"""Carve the MLP of one block. The block keeps its shape: hooks leave each token the neurons of its experts. Imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compress.architectures.conversions.experts import ExpertSizes
from compress.blockwise.block import Block
from compress.blockwise.linears import TargetLinear
from compress.blockwise.memory_budget import FLOAT64_MAX_WIDTH
from compress.blockwise.reconstruct import Reconstruction, reconstruct_block, trainable_floats
from compress.blockwise.results import TensorExtras
from compress.passes.carve_experts.plan import MLP
from compress.solvers.carving import Carving, carve, chosen, solve_down
from compress.solvers.memory import ENERGY_BYTES
from compress.workspace import Workspace

#: Fewest tokens that experts are chosen by.
_FEWEST = 4096


@dataclass(frozen=True)
class CarveOptions:
    """How to carve blocks.

    Attributes:
        sizes: of the experts. dense: numbers of the blocks that stay dense. solve: solve for the down projections.
        reconstruction: of each block afterwards; None for none. results: receives each block's `Carving`.
    """

    sizes: ExpertSizes
    dense: frozenset[int]
    solve: bool
    reconstruction: Reconstruction | None
    results: Workspace


@dataclass
class Routing:
    """The neurons that the router leaves to each token. It stays at the block's modules as long as the run goes on.

    The weights are computed as stock transformers does it, so that ties fall alike.
    """

    carving: Carving
    active: int
    _left: torch.Tensor | None = None

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights of the experts [T, E] for inputs [..., I]: near 1 for those of each token, else 0."""
        scores = torch.softmax(torch.nn.functional.linear(x.flatten(0, -2).float(), self.carving.router_EI), -1)
        kept = scores * chosen(scores, self.active)
        return kept / kept.sum(-1, keepdim=True) * self.active

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of the experts [T, E] ▶ those of the neurons [T, A]; of shared neurons 1."""
        return torch.cat([weights, torch.ones_like(weights[:, :1])], 1)[:, self.carving.expert_A]  # shared ones have -1

    def attach(self, up: Any, down: Any) -> None:
        """Route from now on: ``up`` reads the MLP's inputs, ``down`` its neurons."""

        def see(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            self._left = self.spread(self.weights(x)).view(*x.shape[:-1], -1).to(x.dtype)

        def leave(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            assert self._left is not None
            return (args[0] * self._left, *args[1:])

        up.register_forward_pre_hook(see)
        down.register_forward_pre_hook(leave)


def carve_block(block: Block, options: CarveOptions) -> dict[str, TensorExtras]:
    """Carve a block's MLP in place, and repair it; a dense block is only repaired.

    ``block.details`` gets a row for the down projection, the tokens of each expert, and with reconstruction the block's error
    before and after.
    """
    if block.index not in options.dense:
        _carve(block, options)
    if options.reconstruction is not None:
        block.details["tuning"] = reconstruct_block(
            block, options.reconstruction, trainable_floats(block), lambda: None
        )
    return {}


def _carve(block: Block, options: CarveOptions) -> None:
    """Divide the neurons and solve the down projection; none of its sums are in memory while the block trains."""
    by_part = {part: x for x in block.linears for part in MLP if x.name.endswith(f"{part}.weight")}
    gate, up, down = (by_part[part] for part in MLP)
    carving, hessian = _carving(block, gate, up, down, options.sizes)
    options.results.save_tensors(
        f"{block.index:05}", {"expert": carving.expert_A.cpu(), "router": carving.router_EI.cpu().contiguous()}
    )
    energy = _energy(down.weight, hessian)
    del hessian
    routing = Routing(carving, options.sizes.active)
    cross, gram, counts = _products(block, gate, down, routing)
    before = down.weight.clone()
    if options.solve:
        solved = solve_down(down.weight, cross, gram).to(down.weight.dtype)
        block.view.processes.broadcast(0, solved)
        down.weight.copy_(solved)
    block.details["tensors"] = {down.name: {"error": _error(before, down.weight, cross, gram, energy)}}
    names = [f"{down.name.removesuffix('.down_proj.weight')}.experts.{e}" for e in range(options.sizes.count)]
    block.details["experts"] = {"tokens": block.view.tokens, "reached": dict(zip(names, counts, strict=True))}
    routing.attach(gate.module, down.module)


def _carving(
    block: Block, gate: TargetLinear, up: TargetLinear, down: TargetLinear, sizes: ExpertSizes
) -> tuple[Carving, torch.Tensor]:
    """The division of a block's neurons, the same in all processes; and Σ h hᵀ of their activations."""
    neurons = down.weight.shape[1]
    ((_, statistics, _),) = block.statistics(groups=block.groups_with({down.name}))
    x = _stored_inputs(block, gate, max(_FEWEST, ENERGY_BYTES // (4 * neurons)))
    processes = block.view.processes
    carving = Carving(
        torch.empty(neurons, dtype=torch.int64, device=x.device),
        torch.empty(sizes.count, x.shape[1], dtype=torch.float32, device=x.device),
    )
    if processes.rank == 0:
        with torch.no_grad():
            act = _activation(block)
            h = act(torch.nn.functional.linear(x, gate.weight.float())) * torch.nn.functional.linear(
                x, up.weight.float()
            )
            carving = carve(
                x, h, down.weight, statistics.hessian,
                count=sizes.count, size=sizes.size, active=sizes.active, seed=block.view.seed,
            )  # fmt: skip
    processes.broadcast(0, carving.expert_A, carving.router_EI)
    return carving, statistics.hessian


def _activation(block: Block) -> Any:
    """The activation function of the block's MLP."""
    return next(m.act_fn for m in block.module.modules() if hasattr(m, "act_fn") and hasattr(m, "down_proj"))


def _stored_inputs(block: Block, gate: TargetLinear, most: int) -> torch.Tensor:
    """Inputs of the MLP [T, I], float32, of up to ``most`` of this process's tokens that count, evenly from all samples."""
    batches = list(block.view.batches())
    share = max(1, most // max(1, len(batches)))
    kept: list[torch.Tensor] = []
    with _inputs_of(gate) as seen, torch.no_grad():
        for rows in batches:
            seen.clear()
            block.forward(rows, block.read_inputs(rows))
            mask = block.token_mask(rows)
            x = (seen[0] if mask is None else seen[0][mask]).flatten(0, -2)
            step = max(1, len(x) // share)
            kept.append(x[::step][:share].float())
    return torch.cat(kept)


@contextmanager
def _inputs_of(linear: TargetLinear) -> Iterator[list[torch.Tensor]]:
    """Within, the inputs that a linear layer reads are appended to the list."""
    seen: list[torch.Tensor] = []
    handle = linear.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _products(
    block: Block, gate: TargetLinear, down: TargetLinear, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Σ h mᵀ and Σ m mᵀ [A, A], with the neurons' activations h and what the router leaves of them, m; and the tokens of each
    expert."""
    width, device = down.weight.shape[1], down.weight.device
    dtype = torch.float64 if width <= FLOAT64_MAX_WIDTH else torch.float32
    cross, gram = (torch.zeros(width, width, dtype=dtype, device=device) for _ in range(2))
    counts = torch.zeros(len(routing.carving.router_EI), dtype=torch.float64, device=device)
    with _inputs_of(gate) as inputs, _inputs_of(down) as neurons, torch.no_grad():
        for rows in block.view.batches():
            inputs.clear()
            neurons.clear()
            block.forward(rows, block.read_inputs(rows))
            mask = block.token_mask(rows)
            x, h = (t[0].flatten(0, -2) if mask is None else t[0][mask] for t in (inputs, neurons))
            weights = routing.weights(x)
            counts += (weights > 0).sum(0)
            h = h.float()
            m = h * routing.spread(weights)
            for total, left in ((cross, h), (gram, m)):
                if total.dtype == torch.float32:
                    total.addmm_(left.T, m)
                else:
                    total += left.T @ m
    block.view.processes.all_reduce(cross, gram, counts)
    return cross, gram, [int(count) for count in counts]


def _energy(W: torch.Tensor, hessian: torch.Tensor) -> float:
    """Σ ‖W h‖²."""
    W = W.to(hessian.dtype)
    return float(((W @ hessian) * W).sum())


def _error(
    before: torch.Tensor, after: torch.Tensor, cross: torch.Tensor, gram: torch.Tensor, whole: float
) -> float | None:
    """Σ ‖W h - V m‖² over Σ ‖W h‖², for W before and V after; None where no neuron was active."""
    W, V = before.to(gram.dtype), after.to(gram.dtype)
    lost = whole - 2 * float(((W @ cross) * V).sum()) + float(((V @ gram) * V).sum())
    return max(0.0, lost) / whole if whole > 0 else None
