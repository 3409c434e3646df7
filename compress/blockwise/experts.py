"""Experts of a fused module run one by one, so that each expert's matrices are linear layers like any other.

T tokens, I inputs and O outputs of a matrix, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from compress.architectures.inference.roles import inputs_first


class Experts(torch.nn.Module):
    """Fused experts, run one by one through linear modules that share the fused parameters' memory.

    The computation is that of the fused module: gate and up projection fused, an activation, a down projection. The rows of
    gate and up follow each other (Mixtral, Qwen3-MoE and their like) or alternate (gpt-oss). Llama 4 hands on every token for
    every expert, zero where it is not sent there.

    Attributes:
        token_mask: bool [T], which tokens of the next forward pass count; None for all.
        expert_mask: the same for the tokens that the running expert was sent; linear modules' hooks read it.
        watch: called for each expert with its number, outputs [t, I] and router weights [t] of the tokens that count.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.fused = fused
        self.gate, self.up, self.down = (torch.nn.ModuleList() for _ in range(3))
        self.rows = gate_and_up(fused)
        biased = getattr(fused, "has_bias", False)
        both, down = (rows_first(fused, weight) for weight in (fused.gate_up_proj, fused.down_proj))
        for e in range(len(both)):
            for modules, rows in zip((self.gate, self.up), self.rows, strict=True):
                modules.append(_linear_view(both[e][rows], fused.gate_up_proj_bias[e][rows] if biased else None))
            self.down.append(_linear_view(down[e], fused.down_proj_bias[e] if biased else None))
        self.token_mask: torch.Tensor | None = None
        self.expert_mask: torch.Tensor | None = None
        self.watch: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module is fused experts of that kind."""
        return (
            inputs_first(module) is not None
            and getattr(module, "has_gate", True)
            and not getattr(module, "has_post_expert_norm", False)
            and (callable(getattr(module, "_apply_gate", None)) or callable(getattr(module, "act_fn", None)))
        )

    def _activated(self, state: torch.Tensor, e: int) -> torch.Tensor:
        """Inputs [t, I] of an expert ▶ inputs of its down projection."""
        gate, up = self.gate[e](state), self.up[e](state)
        if not hasattr(self.fused, "_apply_gate"):
            activated: torch.Tensor = self.fused.act_fn(gate) * up
            return activated
        both = torch.empty((*gate.shape[:-1], 2 * gate.shape[-1]), dtype=gate.dtype, device=gate.device)
        both = both.index_copy(-1, self._columns(0, both), gate).index_copy(-1, self._columns(1, both), up)
        gated: torch.Tensor = self.fused._apply_gate(both)
        return gated

    def _columns(self, which: int, both: torch.Tensor) -> torch.Tensor:
        return torch.arange(both.shape[-1], device=both.device)[self.rows[which]]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, I], indices and weights of each token's experts [T, k] ▶ [T, I].

        Without indices: inputs of all experts one after another [E T, I] ▶ [E T, I].
        """
        result = torch.zeros_like(hidden_states)
        if top_k_index is None or top_k_weights is None:
            by_expert = hidden_states.view(len(self.gate), -1, hidden_states.shape[-1])
            for e, states in enumerate(by_expert):
                token = torch.where((states != 0).any(-1))[0]
                self.expert_mask = None if self.token_mask is None else self.token_mask[token]
                if len(token):
                    result.index_add_(0, e * len(states) + token, self.down[e](self._activated(states[token], e)))
            return result
        for e in range(len(self.gate)):
            token, place = torch.where(top_k_index == e)
            if not len(token):
                continue
            self.expert_mask = None if self.token_mask is None else self.token_mask[token]
            state = hidden_states[token]
            state = self.down[e](self._activated(state, e))
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


def rows_first(fused: Any, weight: torch.Tensor) -> torch.Tensor:
    """A weight of fused experts as [E, O, I]; it may be stored [E, I, O]."""
    return weight.mT if inputs_first(fused) else weight


def gate_and_up(fused: Any) -> tuple[slice, slice]:
    """The rows of gate and up in the fused projection [2 I] of an expert."""
    if getattr(fused, "is_concatenated", True):
        half = rows_first(fused, fused.gate_up_proj).shape[1] // 2
        return slice(0, half), slice(half, 2 * half)
    return slice(0, None, 2), slice(1, None, 2)


def _linear_view(matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(matrix, requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    return linear
