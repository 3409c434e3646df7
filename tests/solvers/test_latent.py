"""Components across heads, against loops over complex numbers and against every other choice."""

from __future__ import annotations

import cmath
import itertools

import pytest
import torch

from compress.solvers.latent import (
    best_counts,
    best_split,
    constant_channel,
    key_components,
    latent_keys,
    rotary,
    unrotary,
    value_components,
)

G, H, F, I = 3, 6, 4, 10  # noqa: E741 - groups, heads, frequencies, inputs
ANGLES = [1.0, 0.3, 0.1, 0.02]


@pytest.fixture
def layer():
    """Rows of keys and queries, inputs [T, I], and their moment."""
    draw = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(n * 2 * F, I, generator=draw, dtype=torch.float64) for n in (G, H))
    inputs = torch.randn(200, I, generator=draw, dtype=torch.float64) @ torch.randn(I, I, generator=draw).double()
    return keys, queries, inputs, inputs.T @ inputs / len(inputs)


def energies_of(queries, inputs):
    """E Σ|q|² of the heads of each group, [F, G], number by number."""
    result = torch.zeros(F, G, dtype=torch.float64)
    outputs = (inputs @ queries.T).view(-1, H, 2, F)
    for h, f in itertools.product(range(H), range(F)):
        result[f, h // (H // G)] += (outputs[:, h, 0, f] ** 2 + outputs[:, h, 1, f] ** 2).mean()
    return result


def turned(vector, position):
    """A head's numbers [2F] as complex ones, turned by hand to a position."""
    return [complex(vector[f], vector[f + F]) * cmath.exp(1j * position * ANGLES[f]) for f in range(F)]


def test_rotary_rows_are_halves_and_come_back(layer):
    rows = rotary(layer[0], G)
    assert rows.shape == (G, F, I)
    assert complex(rows[1, 2, 3]) == complex(layer[0][8 + 2, 3], layer[0][8 + 6, 3])
    assert torch.equal(unrotary(rows), layer[0])


def test_latent_keys_give_every_head_its_own_scores_at_all_positions(layer):
    keys, queries, inputs, moment = layer
    parts = key_components(rotary(keys, G), energies_of(queries, inputs), moment)
    folded = latent_keys(rotary(keys, G), rotary(queries, H), parts, [G] * F)
    count = G * F
    angles = [angle for angle in ANGLES for _ in range(G)]
    for x, y, m, n in ((inputs[0], inputs[1], 5, 2), (inputs[2], inputs[3], 40, 0)):
        shared = (folded.key @ x).tolist()
        key = [complex(shared[j], shared[j + count]) * cmath.exp(1j * n * angles[j]) for j in range(count)]
        for h in range(H):
            row = (folded.query[h] @ y).tolist()
            query = [complex(row[j], row[j + count]) * cmath.exp(1j * m * angles[j]) for j in range(count)]
            score = sum((q * k.conjugate()).real for q, k in zip(query, key, strict=True))
            q, k = (queries @ y).view(H, -1)[h].tolist(), (keys @ x).view(G, -1)[h // (H // G)].tolist()
            expected = sum((a * b.conjugate()).real for a, b in zip(turned(q, m), turned(k, n), strict=True))
            assert score == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_key_components_lose_what_they_say_and_least_of_all(layer):
    keys, queries, inputs, moment = layer
    energies = energies_of(queries, inputs)
    parts = key_components(rotary(keys, G), energies, moment)
    rows, draw = rotary(keys, G), torch.Generator().manual_seed(1)

    def lost(f, encode, decode):
        error = rows[:, f] - decode @ (encode @ rows[:, f])
        outputs = inputs.to(error.dtype) @ error.T
        return float((outputs.abs().square().mean(0) * energies[f]).sum())

    for f, r in itertools.product(range(F), range(G)):
        best = lost(f, parts.encode[f, :r], parts.decode[f, :, :r])
        assert best == pytest.approx(float(parts.losses[f, r:].sum()), rel=1e-6, abs=1e-9)
        for _ in range(5):
            axes = torch.linalg.qr(torch.randn(G, max(r, 1), generator=draw, dtype=torch.complex128))[0][:, :r]
            scale = energies[f].sqrt()[:, None]
            assert best <= lost(f, (axes * scale).mH, axes / scale) + 1e-9


def test_value_components_lose_what_they_say_and_decode_all(layer):
    keys, _, inputs, moment = layer
    draw = torch.Generator().manual_seed(2)
    root = torch.randn(len(keys), len(keys), generator=draw, dtype=torch.float64)
    metric = root @ root.T
    parts = value_components(keys, metric, moment)
    torch.testing.assert_close(parts.decode @ parts.encode, torch.eye(len(keys), dtype=torch.float64))
    torch.testing.assert_close(parts.decode.norm(dim=0), torch.ones(len(keys), dtype=torch.float64))
    for rank in (1, 4, 9):
        error = inputs @ (keys - parts.decode[:, :rank] @ parts.encode[:rank] @ keys).T
        lost = float(((error @ metric) * error).sum(1).mean())
        assert lost == pytest.approx(float(parts.losses[rank:].sum()), rel=1e-6, abs=1e-6)


def test_best_counts_match_every_allocation():
    losses = torch.rand(3, 3, generator=torch.Generator().manual_seed(3)).sort(1, descending=True).values
    for total in range(1, 10):
        every = [c for c in itertools.product(range(4), repeat=3) if sum(c) == total]
        least = min(sum(float(losses[f, n:].sum()) for f, n in enumerate(c)) for c in every)
        counts = best_counts(losses, total)
        assert sum(counts) == total
        assert sum(float(losses[f, n:].sum()) for f, n in enumerate(counts)) == pytest.approx(least)


@pytest.mark.parametrize("step", [1, 2])
def test_best_split_matches_every_split(step):
    draw = torch.Generator().manual_seed(4)
    keys = torch.rand(3, 3, generator=draw).sort(1, descending=True).values
    values = torch.rand(12, generator=draw).sort(descending=True).values
    left = keys.flatten().sort(descending=True).values
    for budget in range(6, 30):
        losses = {
            n: float(left[n:].sum() + values[budget - 2 * n :].sum())
            for n in range(step, 10, step)
            if budget - 2 * n >= 1
        }
        assert losses[best_split(keys, values, budget, step)] == pytest.approx(min(losses.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_constant_channel_makes_the_norm_an_identity(dtype):
    latent = torch.randn(64, 20, generator=torch.Generator().manual_seed(5))
    constant, weight, factor = constant_channel(float(latent.norm(dim=1).max()), 21)
    assert torch.tensor([constant, weight]).to(torch.bfloat16).tolist() == [constant, weight]
    x = torch.cat((latent, torch.full((64, 1), constant)), 1).to(dtype).float()
    normed = (x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()).to(dtype) * torch.tensor(weight, dtype=dtype)
    error = (normed[:, :-1].float() * factor - latent).norm() / latent.norm()
    assert error < {torch.float32: 3e-5, torch.float16: 1e-3}[dtype]
