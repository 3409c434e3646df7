"""A model's weight matrices and blocks, as the map of a model gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from compress.spec.spec import Tensor

#: The role of a weight matrix. In blocks: ``attention``, ``mlp``, ``router`` (chooses experts), ``distances`` (added to
#: attention scores). Outside: ``embedding``, ``head``. Added by edits: ``factor`` (one of two in place of a matrix),
#: ``residual`` (of low rank, beside a shared matrix), ``projection`` (between a thin embedding table and the hidden states).
Role = Literal[
    "attention", "mlp", "router", "distances", "embedding", "head", "factor", "residual", "projection", "other"
]


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight matrix, or another tensor of two axes or more.

    Attributes:
        tensor: its entry in the spec. role: its role in the model.
        block: number of its block; None outside the blocks. part: its module, without the block's path.
        transposed: whether it is stored [I, O], or [E, I, O].
        expert: number of its expert; None outside of experts.
        is_layer: whether it is the weight of a linear layer or a convolution that passes take. Routers, tables of distances,
            a model's first convolution and depthwise ones are none.
        kernel: whether it is the kernel of a convolution, [O, inputs of a group, *positions]. Its matrix is [O, I] with I =
            inputs of a group x positions.
    """

    tensor: Tensor
    role: Role
    block: int | None
    part: str
    transposed: bool = False
    expert: int | None = None
    is_layer: bool = False
    kernel: bool = False

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.tensor.name

    @property
    def module(self) -> str:
        """Name of the module that owns the tensor."""
        return self.tensor.module

    @property
    def shared_with(self) -> str | None:
        """The tensor whose data it uses; None for data of its own."""
        return self.tensor.alias_of

    @property
    def input_axis(self) -> int:
        """Axis that the inputs run along: -1, or -2 where it is transposed. Of a kernel, that of its matrix."""
        return -2 if self.transposed else -1

    @property
    def I(self) -> int:  # noqa: E743 - the letter of every formula
        """Number of inputs; of a kernel, times its positions."""
        return prod(self.tensor.shape[1:]) if self.kernel else self.tensor.shape[self.input_axis]

    @property
    def O(self) -> int:  # noqa: E743
        """Number of outputs, of all experts together."""
        return self.tensor.count // max(1, self.I)

    @property
    def experts(self) -> int:
        """Number of matrices in a tensor of all experts, [E, O, I] or [E, I, O]; 0 for a single matrix."""
        return self.tensor.shape[0] if self.is_layer and len(self.tensor.shape) == 3 and not self.kernel else 0


@dataclass(frozen=True, slots=True)
class ModelBlock:
    """One repeated layer.

    Attributes:
        index: its number within its list of blocks. path: beginning of its tensors' names, with the dot.
        tensors: name without the path ▶ tensor; those that it shares with other blocks too.
        linears: its matrices, in the order of the file.
    """

    index: int
    path: str
    tensors: Mapping[str, Tensor]
    linears: tuple[Linear, ...]

    def stored(self) -> list[Tensor]:
        """The tensors that have bytes of their own."""
        return [tensor for tensor in self.tensors.values() if tensor.alias_of is None]
