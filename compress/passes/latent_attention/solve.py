"""The projections of one block with latent attention, from its own: components ▶ folded projections ▶ constant channel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.values import Checkpoint, torch_dtype
from compress.errors import CheckpointError
from compress.passes.latent_attention.moments import Moments
from compress.solvers.latent import (
    Components,
    constant_channel,
    key_components,
    latent_keys,
    rotary,
    value_components,
)


@dataclass(frozen=True)
class Projections:
    """The attention of one block as it came, float64. A bias is the weight of one more input, which is 1.

    Attributes:
        query, key, value: [outputs, I + 1]. output: [hidden, heads · D]. output_bias: [hidden], zeros where there is none.
        norm: weights of the RMSNorm in front of it, [I]. heads, groups: numbers of query heads, and of key and value heads.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    output_bias: torch.Tensor
    norm: torch.Tensor
    heads: int
    groups: int


@dataclass(frozen=True)
class BlockComponents:
    """Components of a block's keys, by frequency, and of its values. Their losses are divergences, nats per token."""

    keys: Components
    values: Components


def projections(checkpoint: Checkpoint, index: int, device: str) -> Projections:
    """Read the attention of a block.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    mapped = model_map(checkpoint.spec)
    attention, hidden = mapped.record.attention, mapped.record.hidden
    assert attention is not None
    assert hidden is not None
    path = mapped.paths[index]

    def read(name: str) -> torch.Tensor:
        data = checkpoint.tensor(path + name).data.to(device, torch.float64)
        if not torch.isfinite(data).all():
            raise CheckpointError(f"{path + name} has NaN or infinite values", where=str(checkpoint.folder))
        return data

    def rows(module: str) -> torch.Tensor:
        weight = read(f"{module}.weight")
        named = f"{path}{module}.bias" in checkpoint.spec.tensors
        bias = read(f"{module}.bias") if named else weight.new_zeros(len(weight))
        return torch.cat((weight, bias[:, None]), 1)

    output = rows(attention.output)
    return Projections(
        rows(attention.query),
        rows(attention.key),
        rows(attention.value),
        output[:, :-1],
        output[:, -1],
        read(f"{hidden.norms[0]}.weight") + hidden.offset,
        mapped.heads,
        mapped.kv_heads,
    )


def components(own: Projections, moments: Moments) -> BlockComponents:
    """Components of keys and values. The losses of keys are scaled to the energy of the gradients at the keys."""
    queries = rotary(own.query, own.heads)
    energies = ((queries @ moments.second.to(queries.dtype)) * queries.conj()).real.sum(-1)  # [H, F]
    by_group = energies.view(own.groups, -1, energies.shape[1]).sum(1).T
    by_group = by_group * (moments.key_energy / by_group.sum().clamp_min(1e-30))
    mean = moments.by_value[:, -1]
    return BlockComponents(
        key_components(rotary(own.key, own.groups), by_group, moments.by_key),
        value_components(own.value, moments.value_metric, moments.by_value - torch.outer(mean, mean)),
    )


def latent_block(
    own: Projections, parts: BlockComponents, moments: Moments, counts: Sequence[int], rank: int, split_queries: bool
) -> dict[str, torch.Tensor]:
    """Tensors of the block's attention by name within it, float64.

    Args:
        counts: key components of each frequency. rank: components of the values.
        split_queries: two projections to queries, for a bias; see `conversions.latent.query_rank`.
    """
    width = own.output.shape[1] // own.heads
    keys = rotary(own.key, own.groups)
    identity = torch.eye(len(own.query), dtype=torch.float64, device=own.query.device)
    queries = rotary(identity if split_queries else own.query[:, :-1], own.heads)
    shared = latent_keys(keys, queries, parts.keys, counts)
    # the class divides scores by the root of the key's width, which has changed
    query = (shared.query * (shared.key.shape[0] / width) ** 0.5).flatten(0, 1)
    mean = own.value @ moments.by_value[:, -1]
    encode, decode = parts.values.encode[:rank], parts.values.decode[:, :rank]
    latent = encode @ own.value
    latent[:, -1] -= encode @ mean
    constant, norm, factor = constant_channel(_largest(latent, own.norm), rank + 1)
    by_head = _of_heads(decode, own) * factor
    channel = torch.zeros_like(latent[:1])
    channel[0, -1] = constant
    compressed = torch.cat((latent, channel, shared.key))
    result = {
        "kv_a_proj_with_mqa.weight": compressed[:, :-1],
        "kv_a_proj_with_mqa.bias": compressed[:, -1],
        "kv_a_layernorm.weight": _norm(latent, norm, rank),
        "kv_b_proj.weight": torch.nn.functional.pad(by_head, (0, 1)),
        "o_proj.weight": own.output,
        "o_proj.bias": own.output_bias + own.output @ _of_heads(mean[:, None], own)[:, 0],
    }
    if not split_queries:
        return {**result, "q_proj.weight": query}
    constant, norm, factor = constant_channel(_largest(own.query, own.norm), len(own.query) + 1)
    return {
        **result,
        "q_a_proj.weight": torch.nn.functional.pad(own.query[:, :-1], (0, 0, 0, 1)),
        "q_a_proj.bias": torch.nn.functional.pad(own.query[:, -1], (0, 1), value=constant),
        "q_a_layernorm.weight": _norm(query, norm, len(own.query)),
        "q_b_proj.weight": torch.nn.functional.pad(query * factor, (0, 1)),
    }


def _norm(like: torch.Tensor, weight: float, channels: int) -> torch.Tensor:
    """Weights of the norm. That of the constant channel is zero: nothing reads it, and training then leaves it alone."""
    return torch.nn.functional.pad(like.new_full((channels,), weight), (0, 1))


def _largest(rows: torch.Tensor, norm: torch.Tensor) -> float:
    """A bound on the norm of a projection's outputs, for any input of RMSNorm with those weights."""
    weights: float = torch.linalg.matrix_norm(rows[:, :-1] * norm, 2).item()
    bias: float = rows[:, -1].norm().item()
    return weights * math.sqrt(len(norm)) + bias


def _of_heads(rows: torch.Tensor, own: Projections) -> torch.Tensor:
    """Rows [G · D, …] of groups, repeated for each query head: [H · D, …]."""
    by_group = rows.view(own.groups, -1, rows.shape[-1])
    return by_group.repeat_interleave(own.heads // own.groups, 0).flatten(0, 1)


def stored(tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """The tensors in a checkpoint's dtype, on the CPU."""
    return {name: tensor.to("cpu", torch_dtype(dtype)).contiguous() for name, tensor in tensors.items()}
