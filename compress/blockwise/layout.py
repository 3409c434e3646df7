"""Where samples are in hidden states: most models have them first, some behind the tokens, some in several rows each."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SampleLayout:
    """The axes of hidden states in a model.

    Attributes:
        order: those that become samples, tokens and others; None where samples are first in the model too.
        parts: rows of a sample along the first axis, such as the patches of MobileViT; 1 where it has one.
    """

    order: tuple[int, ...] | None = None
    parts: int = 1

    def samples_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states as the model lays them out ▶ with the samples first."""
        if self.order is not None:
            return hidden.permute(self.order)
        return hidden if self.parts == 1 else hidden.view(-1, self.parts, *hidden.shape[1:])

    def as_in_model(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states with the samples first ▶ as the model lays them out."""
        if self.order is not None:
            return hidden.permute([self.order.index(i) for i in range(len(self.order))])
        return hidden if self.parts == 1 else hidden.flatten(0, 1)


def layout_of(single: torch.Tensor, double: torch.Tensor, length: int) -> SampleLayout | None:
    """The layout, told from the hidden states of one sample and of two; None where samples are not apart.

    Args:
        single: of the first of the two samples. length: number of tokens of a sample.
    """
    axes = [i for i, (a, b) in enumerate(zip(single.shape, double.shape, strict=False)) if a != b]
    if single.ndim != double.ndim or len(axes) != 1:
        return None
    one, two = single.shape[axes[0]], double.shape[axes[0]]
    if axes == [0] and two == 2 * one:
        # the rows of a sample must follow one another
        return SampleLayout(parts=one) if one == 1 or torch.allclose(double[:one], single, 1e-3, 1e-5) else None
    if (one, two) != (1, 2):
        return None
    others = [i for i in range(single.ndim) if i not in axes]
    tokens = [i for i in others if single.shape[i] == length][:1]
    return SampleLayout((*axes, *tokens, *(i for i in others if i not in tokens)))
