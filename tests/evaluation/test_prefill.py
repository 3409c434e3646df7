"""Prefill and its time."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.evaluation import prefill
from compress.models.loading import load_model
from compress.passes.base import Context
from compress.passes.prune_structured.speed import Stopwatch
from compress.progress import SilentProgress
from compress.workspace import Workspace
from tests import pico
from tests.toolbox import plan


@pytest.mark.slow
def test_prefill_measures_time(tmp_path, monkeypatch):
    """A model of a third of the blocks is faster than the whole; the same one is about as fast."""
    monkeypatch.setattr(prefill, "SECONDS", 0.5)
    original = open_checkpoint(pico.save(tmp_path / "in", with_tokenizer=False, num_hidden_layers=24))
    context = Context(original, "cpu", "float32", 0, None, lambda key: None, SilentProgress(), Workspace(tmp_path))
    watch = Stopwatch(original, context)
    assert watch.prompt.shape == (1, 256)
    assert watch.ratio(plan(original, "prune_structured", layers=list(range(16)), compensation="none")) < 0.8
    assert 0.5 < watch.ratio(original.spec) < 2


def test_prefill_asks_for_last_logits(pico_llama):
    model = load_model(pico_llama)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(prefill.prefill(model, ids).logits, model(input_ids=ids).logits[:, -1:])
