from __future__ import annotations

from math import cos, pi, sin

import pytest
import torch

from compress.solvers.rotation import Rotation


def product(size: int, seed: int) -> torch.Tensor:
    """D (C ⊗ H) / √n by its definition."""
    even = size & -size
    odd = size // even
    H = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(even)] for i in range(even)], dtype=torch.float64)
    angles = [[2 * pi * i * j / odd for j in range(odd)] for i in range(odd)]
    C = torch.tensor([[cos(a) + sin(a) for a in row] for row in angles], dtype=torch.float64)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return signs[:, None] * torch.kron(C, H) / size**0.5


@pytest.mark.parametrize("size", [1, 8, 9, 24, 40, 128, 384])
def test_rotation_is_orthogonal_and_its_own_definition(size):
    matrix = Rotation(size, 3).matrix()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(matrix, product(size, 3), atol=1e-13)
    assert matrix.abs().max() <= (2 / size) ** 0.5 + 1e-13


def test_rotation_turns_rows_in_their_dtype():
    values = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    turned = Rotation(24, 0).turned(values)
    assert turned.dtype == torch.float32
    assert torch.allclose(turned, (values.double() @ product(24, 0)).float(), atol=1e-6)
