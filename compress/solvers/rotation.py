"""Random orthogonal matrices that spread every entry over all others, as products that take n log n steps.

Q = D (C ⊗ H) / √n for n entries: D are random signs, H is the Hadamard matrix of the largest power of two that divides n, and C
the Hartley matrix of the odd rest, whose entries cos φ + sin φ are no larger than √2. Sources: QuaRot, arXiv 2404.00456 (random
signs and Hadamard matrices); Hartley 1942.
"""

from __future__ import annotations

from math import pi

import torch

from compress.checkpoint.storage.trellis import hadamard

#: Numbers that are rotated at a time, in float64.
_AT_ONCE = 1 << 23


class Rotation:
    """An orthogonal matrix Q [n, n].

    Args:
        size: n. seed: of the signs; equal seeds give equal matrices.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._even = size & -size
        odd = size // self._even
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        angles = torch.outer(torch.arange(odd), torch.arange(odd)).double() % odd * (2 * pi / odd)
        self._odd_CC = (angles.cos() + angles.sin()) * size**-0.5

    def turned(self, values: torch.Tensor) -> torch.Tensor:
        """Values [..., n] times Q, computed in float64, in the dtype of the values."""
        rows = values.reshape(-1, self.size)
        result = torch.empty_like(rows)
        step = max(1, _AT_ONCE // self.size)
        for start in range(0, len(rows), step):
            result[start : start + step] = self._product(rows[start : start + step])
        return result.view(values.shape)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        signed = rows.double() * self._signs.to(rows.device)
        odd = len(self._odd_CC)
        mixed = hadamard(signed.reshape(-1, self._even), self._even).view(len(rows), odd, self._even)
        product: torch.Tensor = self._odd_CC.to(rows.device) @ mixed
        return product.flatten(1)

    def matrix(self) -> torch.Tensor:
        """Q, float64 [n, n]."""
        return self.turned(torch.eye(self.size, dtype=torch.float64))
