"""Random orthogonal matrices that spread every entry over all others, as a few products with small matrices.

Q = D (C ⊗ H) / √n for n entries: D are random signs, H is the Hadamard matrix of the largest power of two that divides n, and C
the Hartley matrix of the odd rest, whose entries cos φ + sin φ are no larger than √2. H is a Kronecker product of matrices of
at most 64 rows, each a product of its own. Sources: QuaRot, arXiv 2404.00456 (signs and Hadamard matrices); Hartley 1942.
"""

from __future__ import annotations

from math import pi

import torch

#: Rows of the largest Hadamard matrix that values are multiplied with.
_LARGEST = 64
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
        mixed = _times_hadamard(signed, self._even).reshape(len(rows), odd, self._even)
        product: torch.Tensor = self._odd_CC.to(rows.device) @ mixed
        return product.flatten(1)

    def matrix(self) -> torch.Tensor:
        """Q, float64 [n, n]."""
        return self.turned(torch.eye(self.size, dtype=torch.float64))


def _times_hadamard(values: torch.Tensor, size: int) -> torch.Tensor:
    """Runs of ``size`` neighbours, a power of two, times the Hadamard matrix of as many rows, with entries 1 and -1."""
    done = 1
    while done < size:
        factor = min(_LARGEST, size // done)
        H = _hadamard(factor).to(values)
        runs = values.reshape(-1, factor, done)
        values = runs.flatten(1) @ H if done == 1 else H @ runs
        done *= factor
    return values


def _hadamard(size: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix, float64 [size, size]."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H
