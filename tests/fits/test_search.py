"""Combinations of a checkpoint: their planned bytes, and bounds that cannot be kept."""

from __future__ import annotations

import pytest

from compress.checkpoint.open import open_headers
from compress.errors import CompressError
from compress.fits.families import Making, amounts, at_least, tables
from compress.fits.rank import Curve, combinations
from compress.fits.search import PlannedBytes, Search
from compress.progress import SilentProgress
from compress.recipe.fit import FAMILIES, Bound
from tests import pico


@pytest.fixture(scope="module")
def sizes(folders):
    spec, _ = open_headers(folders["llama"])
    return PlannedBytes(spec, "compact", 5 * 10**9)


def _search(sizes, most, **settings):
    curve = Curve(((2.25, 0.2), (4.25, 0.01)))
    return Search(most, Bound(max_bytes=most, **settings), sizes, None, 8, SilentProgress(), curve)


@pytest.mark.slow
def test_every_combination_keeps_the_bound(sizes):
    whole = sizes.bytes(sizes.spec)
    search, tried = _search(sizes, int(0.3 * whole)), 0
    costs = {f: dict.fromkeys(amounts(f, sizes.spec)[:2], 0.01) for f in FAMILIES}
    for choice in list(combinations(costs))[::7]:
        weights = sizes.weights(choice)
        if weights is None or weights.bits(search.most) < 3:
            continue
        planned = sizes.planned(search.entries(choice, Making("fast")))
        assert sizes.bytes(planned) <= search.most
        tried += 1
    assert tried > 10


def test_what_is_planned_of_a_combination_is_what_its_passes_leave():
    """Bits and the weights beside them add up to the planned bytes of codes of one format."""
    folder = pico.folder("llama", hidden_size=256, head_dim=64, intermediate_size=512, with_tokenizer=False)
    spec, _ = open_headers(folder)
    sizes = PlannedBytes(spec, "compact", 5 * 10**9)
    for choice in ({}, {"embeddings": "int8"}, {"depth": 1, "width": 0.5}, {"kv_heads": 1}):
        weights = sizes.weights(choice)
        coded = sizes.planned([*Making("fast").smaller(choice), {"cast": _coded(choice, sizes.spec)}])
        assert sizes.bytes(coded) == pytest.approx(weights.bytes(8 + 16 / 256), rel=0.02)


def _coded(choice, spec):
    table = {"overrides": dict.fromkeys(tables(spec), choice["embeddings"])} if "embeddings" in choice else {}
    return {"weights": "int8", "method": "rtn", **table}


def test_a_bound_out_of_reach_names_the_least(sizes):
    search = _search(sizes, 1_000)
    with pytest.raises(CompressError, match=r"no combination keeps 1\.00 kB: \d+\.?\d* kB is the least"):
        search.require_possible()
    alone = _search(sizes, 1_000, families=["depth"])
    with pytest.raises(CompressError) as fewer:
        alone.require_possible()
    with pytest.raises(CompressError) as more:
        search.require_possible()
    assert _least(more) < _least(fewer)


def _least(error):
    return float(str(error.value).split(": ")[2].split()[0])


@pytest.mark.parametrize(
    ("family", "measured", "amount", "least"),
    [
        ("depth", {1: 0.1, 2: 0.3}, 4, 0.6),
        ("width", {0.125: 0.2}, 0.25, 0.4),
        ("sharing", {2: 0.2}, 1, 0.3),  # of four blocks, two and three are not stored
        ("embeddings", {"int8": 0.1, "int6": 0.2}, "int4", 0.2),
    ],
)
def test_more_of_a_family_costs_no_less_for_each_part(family, measured, amount, least):
    folder = pico.folder("llama", num_hidden_layers=4)
    spec, _ = open_headers(folder)
    assert at_least(family, measured, amount, spec) == pytest.approx(least)
