"""The norms of a family's blocks whose outputs linear layers alone read. Imports neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Norms:
    """Norms in front of a block's linear layers, whose weights can be folded into these layers.

    Attributes:
        attention: module of a block, read by its queries, keys and values alone. mlp: module of a block, read by the first
            layers of its MLP, or by the router and the experts.
        final: the norm after the blocks, below the prefix, which the head alone reads.
        offset: added to the weights of norms (1 in Gemma).
        centred: whether they subtract the mean and have a bias (LayerNorm).
        behind: whether norms also change what attention and MLP add to the hidden states.
        unless: config fields ▶ values with which the norms are read by others too.
    """

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    final: str = "norm"
    offset: float = 0.0
    centred: bool = False
    behind: bool = False
    unless: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether a config leaves the norms where they are declared."""
        return not any(config.get(key) == value for key, value in self.unless.items())
