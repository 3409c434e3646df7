"""The shape for a target."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from compress.passes.prune_structured.search import shapes
from compress.passes.prune_structured.settings import PruneStructuredSettings
from compress.passes.prune_structured.speed import Stopwatch, work
from tests import pico
from tests.toolbox import apply, plan, write

IDS = torch.randint(0, 250, (48, 16), generator=torch.Generator().manual_seed(0))


def searched(original, tmp_path, **target):
    """The checkpoint pruned to a target, written; and what the report says of it."""
    details: dict = {}
    how = {"data": Batches(IDS), "work": tmp_path / "work", "details": details, "compensation": "least_squares"}
    return write(apply(original, "prune_structured", **how, **target), tmp_path / "out"), details


@pytest.mark.slow
@pytest.mark.parametrize("family", pico.families(["llama", "gpt2", "mixtral"], tier=("llama",)))
@pytest.mark.parametrize("key", ["keep_parameters", "max_bytes"])
def test_search_finds_least_costly_shape_for_target(family, key, tmp_path):
    original = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False))
    size = sum((original.folder / f).stat().st_size for f in original.files)
    target = 0.7 if key == "keep_parameters" else int(0.7 * size)
    out, details = searched(original, tmp_path, **{key: target})
    if key == "keep_parameters":
        assert 0.45 * original.spec.parameters < out.spec.parameters <= 0.7 * original.spec.parameters
    else:
        assert (out.folder / "model.safetensors").stat().st_size <= target
    rows = details["shapes"]
    assert len(rows) > 1
    chosen = next(row for row in rows if row["chosen"])
    assert chosen["divergence"] == min(row["divergence"] for row in rows)
    assert chosen["parameters"] == out.spec.parameters
    assert details.get("removed_blocks", []) == chosen["layers"]
    assert not plan(original, "prune_structured", **{key: target}).exact
    pico.logits(load_model(out.folder))


def test_shapes_remove_no_more_than_needed(tmp_path):
    """One neuron fewer in each MLP, and the shape would be too large."""
    spec = open_checkpoint(pico.save(tmp_path / "in", "llama", with_tokenizer=False)).spec
    settings = PruneStructuredSettings(keep_parameters=0.65)
    from compress import passes

    found = shapes(passes.get("prune_structured"), spec, settings)
    per_neuron = 3 * 32
    for shape in found:
        left = 4 - shape.layers
        assert shape.spec.parameters <= 0.65 * spec.parameters
        if shape.neurons:
            assert shape.spec.parameters + left * per_neuron > 0.65 * spec.parameters
        assert not any(other.less(shape) for other in found)
    assert {s.layers for s in found} >= {0, 1}


def clock(monkeypatch):
    """Time as a function of the shape: a constant, and what blocks hold; and what was measured."""
    measured = []

    def ratio(self, spec):
        measured.append(spec)
        return 0.2 + 0.8 * work(spec) / work(self.checkpoint.spec)

    monkeypatch.setattr(Stopwatch, "ratio", ratio)
    return measured


@pytest.mark.parametrize("family", pico.families(["llama", "gemma2", "gpt2", "mixtral", "bert"], tier=("gpt2",)))
def test_search_reaches_speed_at_least_divergence(family, tmp_path, monkeypatch):
    """Of the shapes that reach the ratio the one of least divergence; each is the largest of its depth and heads that does."""
    measured = clock(monkeypatch)
    original = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False))
    out, details = searched(original, tmp_path, max_latency_ratio="70%")
    rows = details["shapes"]
    assert len(rows) > 1
    assert all(row["prefill"] <= 0.7 for row in rows)
    assert all(spec is not original.spec for spec in measured)
    chosen = next(row for row in rows if row["chosen"])
    assert chosen["divergence"] == min(row["divergence"] for row in rows)
    assert chosen["parameters"] == out.spec.parameters
    assert chosen["prefill"] == pytest.approx(0.2 + 0.8 * work(out.spec) / work(original.spec))
    for row in rows:
        if row["mlp"] > 4:  # a sixteenth of the neurons more, in the blocks that are left, is too slow
            assert row["prefill"] > 0.7 - 0.1
    assert not plan(original, "prune_structured", max_latency_ratio=0.7).exact
    pico.logits(load_model(out.folder))


@pytest.mark.slow
def test_search_reaches_size_and_speed(tmp_path, monkeypatch):
    clock(monkeypatch)
    original = open_checkpoint(pico.save(tmp_path / "in", with_tokenizer=False))
    details: dict = {}
    settings = {"max_latency_ratio": 0.9, "keep_parameters": 0.6, "compensation": "none"}
    apply(original, "prune_structured", data=Batches(IDS), work=tmp_path / "work", details=details, **settings)
    assert all(row["parameters"] <= 0.6 * original.spec.parameters for row in details["shapes"])
    assert plan(original, "prune_structured", **settings).parameters <= 0.6 * original.spec.parameters


def test_search_refuses_unreachable_speed(tmp_path, monkeypatch):
    """The smallest shape is measured first, and nothing after it."""
    measured = clock(monkeypatch)
    original = open_checkpoint(pico.save(tmp_path / "in", with_tokenizer=False))
    message = r"no shape reads a prompt that fast; the fastest takes 0\.[23]\d of the original's time; ask"
    with pytest.raises(PassError, match=message) as caught:
        apply(original, "prune_structured", data=Batches(IDS), work=tmp_path, max_latency_ratio=0.21)
    assert caught.value.key == "max_latency_ratio"
    assert len(measured) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_parameters": 0.05}, "no shape is that small; the smallest that is tried keeps"),
        ({"max_bytes": "1kB"}, "no shape is that small"),
        ({"max_bytes": "1GB"}, "the model is that small already"),
        ({"max_bytes": "1kB", "max_latency_ratio": 0.9}, "no shape is that small; the smallest that is tried keeps"),
    ],
)
def test_search_refuses_unfit_models(settings, message, pico_llama):
    with pytest.raises(PassError, match=message) as caught:
        plan(open_checkpoint(pico_llama), "prune_structured", **settings)
    assert caught.value.key in settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp": 0.5, "keep_parameters": 0.5}, "give amounts or a target, not both `mlp` and `keep_parameters`"),
        ({"importance": "magnitude", "max_bytes": "1MB"}, "leave out `importance: magnitude`"),
        ({}, "give what to remove"),
    ],
)
def test_search_refuses_contradicting_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PruneStructuredSettings(**settings)
