"""The shape for a target."""

from __future__ import annotations

import pytest
import torch

from compress.calibration.batches import Batches
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.loading import load_model
from compress.passes.search import shapes
from compress.passes.structured_settings import PruneStructuredSettings
from tests import pico
from tests.passes.helpers import apply, plan, write

IDS = torch.randint(0, 250, (48, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("key", ["keep_parameters", "max_bytes"])
def test_the_least_costly_shape_that_meets_the_target(family, key, tmp_path):
    original = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False))
    size = sum((original.folder / f).stat().st_size for f in original.files)
    target = 0.7 if key == "keep_parameters" else int(0.7 * size)
    details: dict = {}
    out = apply(
        original,
        "prune_structured",
        data=Batches(IDS),
        work=tmp_path / "work",
        details=details,
        repair="least_squares",
        **{key: target},
    )
    out = write(out, tmp_path / "out")
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


def test_no_shape_takes_more_than_it_must(tmp_path):
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_parameters": 0.05}, "no shape is that small; the smallest that is tried keeps"),
        ({"max_bytes": "1kB"}, "no shape is that small"),
        ({"max_bytes": "1GB"}, "the model is that small already"),
    ],
)
def test_refusals(settings, message, pico_llama):
    with pytest.raises(PassError, match=message) as caught:
        plan(open_checkpoint(pico_llama), "prune_structured", **settings)
    assert caught.value.key in settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp": 0.5, "keep_parameters": 0.5}, "give amounts or a target, not `mlp` and `keep_parameters`"),
        ({"score": "magnitude", "max_bytes": "1MB"}, "leave out `score: magnitude`"),
        ({}, "give what to remove"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        PruneStructuredSettings(**settings)
