"""Experts of a fused module run one by one, so that each expert's matrices are linear layers like any other.

T tokens, I inputs and O outputs of a matrix, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Experts(torch.nn.Module):
    """Fused experts, run one by one through linear modules that share the fused parameters' memory.

    The computation is that of the fused module (Mixtral, Qwen3-MoE and their like: gate and up projection fused, an
    activation, a down projection).

    Attributes:
        token_mask: bool [T], which tokens of the next forward pass count; None for all.
        expert_mask: the same for the tokens that the running expert was sent; linear modules' hooks read it.
        watch: called for each expert with its number, outputs [t, I] and router weights [t] of the tokens that count.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.fused = fused
        count, double, _ = fused.gate_up_proj.shape
        self.act_fn = fused.act_fn
        self.gate, self.up, self.down = (torch.nn.ModuleList() for _ in range(3))
        for e in range(count):
            self.gate.append(_linear_view(fused.gate_up_proj[e, : double // 2]))
            self.up.append(_linear_view(fused.gate_up_proj[e, double // 2 :]))
            self.down.append(_linear_view(fused.down_proj[e]))
        self.token_mask: torch.Tensor | None = None
        self.expert_mask: torch.Tensor | None = None
        self.watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is fused experts of that kind."""
        shapes: list[Any] = [getattr(getattr(module, n, None), "shape", ()) for n in ("gate_up_proj", "down_proj")]
        return (
            len(shapes[0]) == len(shapes[1]) == 3
            and (shapes[0][1] == 2 * shapes[1][2] and shapes[0][2] == shapes[1][1])
            and callable(getattr(module, "act_fn", None))
            and not getattr(module, "has_bias", False)
        )

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [T, I], indices and weights of each token's experts [T, k] ▶ [T, I]."""
        result = torch.zeros_like(hidden_states)
        for e in range(len(self.gate)):
            token, place = torch.where(top_k_index == e)
            if not len(token):
                continue
            self.expert_mask = None if self.token_mask is None else self.token_mask[token]
            state = hidden_states[token]
            state = self.down[e](self.act_fn(self.gate[e](state)) * self.up[e](state))
            if self.watch is not None:
                counted = slice(None) if self.expert_mask is None else self.expert_mask
                self.watch(e, state[counted], top_k_weights[token, place][counted])
            result.index_add_(0, token, (state * top_k_weights[token, place, None]).to(result.dtype))
        return result


class ExpertSwap(NamedTuple):
    """Where a block holds fused experts, and the module that stands in for them within `unfused`."""

    parent: Any
    child: str
    experts: Experts


@contextmanager
def unfused(swaps: Sequence[ExpertSwap]) -> Iterator[None]:
    """Within, experts run one by one."""
    try:
        for parent, child, experts in swaps:
            setattr(parent, child, experts)
        yield
    finally:
        for parent, child, experts in swaps:
            setattr(parent, child, experts.fused)


def _linear_view(matrix: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(matrix, requires_grad=False)
    return linear
