"""Combinations by the sum of what their parts cost, and the bytes that they leave for codes."""

from __future__ import annotations

import itertools
import math

import pytest

from compress.fits.rank import Curve, Weights, finalists, ranked

CURVE = Curve(((2.25, 0.2), (3.25, 0.03), (4.25, 0.007)))


def test_a_curve_passes_through_its_points_and_falls():
    assert [CURVE.at(bits) for bits, _ in CURVE.points] == pytest.approx([y for _, y in CURVE.points])
    assert CURVE.at(2.75) == pytest.approx(math.sqrt(0.2 * 0.03))
    assert CURVE.at(1.25) == pytest.approx(0.8)
    assert CURVE.at(6.25) == pytest.approx(0.007 / 16)
    assert Curve(((4.0, 0.1),)).at(3.0) == pytest.approx(0.4)


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_bits_and_bytes_are_inverse(kept):
    weights = Weights(cast=8_000, beside=3_000, kept=kept)
    assert weights.bytes(weights.bits(9_000)) == 9_000
    assert weights.bits(9_000) == pytest.approx(6.0 if kept == 1 else 10.0)  # a mask takes one bit for each weight


def test_ranking_is_the_best_of_all_combinations():
    costs = {"depth": {1: 0.1, 2: 0.4}, "width": {0.25: 0.01, 0.5: 0.2}, "embeddings": {"int8": 0.001}}

    def weights(choice):
        if choice.get("depth") == 2 and "width" in choice:
            return None  # passes that do not go together
        left = (1 - 0.15 * choice.get("depth", 0)) * (1 - 0.6 * choice.get("width", 0))
        return Weights(int(10_000 * left), 2_000 if "embeddings" in choice else 4_000)

    most, least = 5_500, 2.1
    expected = []
    for depth, width, table in itertools.product([None, 1, 2], [None, 0.25, 0.5], [None, "int8"]):
        choice = {k: v for k, v in {"depth": depth, "width": width, "embeddings": table}.items() if v is not None}
        if (of := weights(choice)) is not None and (bits := 8 * (most - of.beside) / of.cast) >= least:
            expected.append((sum(costs[f][a] for f, a in choice.items()) + CURVE.at(bits), choice))
    found = ranked(costs, lambda choice: CURVE, weights, most, least)
    assert [one.choice for one in found] == [choice for _, choice in sorted(expected, key=lambda pair: pair[0])]
    assert {} not in [one.choice for one in found]  # bits alone are below the smallest format
    best = finalists(found, 3, lambda one: True)
    assert best[0] == found[0]
    assert finalists(found, 3, lambda one: one != found[0])[0] == found[1]
    assert len(finalists(found, 99, lambda one: True)) == len(found)
    sets = [frozenset(one.choice) - {"embeddings"} for one in best]
    assert len(set(sets)) == 3  # one wrong cost does not decide about all
