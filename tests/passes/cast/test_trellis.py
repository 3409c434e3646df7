"""Trellis codes as the format of a cast: planned bytes, reload without the package, what is refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.storage import parts
from compress.checkpoint.write import stored_form
from compress.data.batches import Batches
from compress.errors import PassError
from tests import pico
from tests.toolbox import apply, our_logits, plan, stock_logits, write

CALIBRATION = Batches(torch.arange(8 * 16).view(8, 16) % 60 + 4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"weights": "trellis2", "method": "rtn"}),
        pytest.param("llama", {"weights": "trellis3", "reconstruction_epochs": 1}, marks=pytest.mark.slow),
        pytest.param("gpt2", {"weights": "trellis4", "reconstruction_epochs": 0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_planned_bytes_are_written_and_read_without_the_package(family, settings, tmp_path):
    checkpoint = open_checkpoint(pico.folder(family))
    _, layout = stored_form(plan(checkpoint, "cast", **settings), "compact", 10**9, checkpoint.metadata)
    cast = apply(checkpoint, "cast", data=CALIBRATION, work=tmp_path / "work", **settings)
    out = write(cast, tmp_path / "out", store="compact")
    assert sum((out.folder / f).stat().st_size for f in out.files) == layout.bytes
    coded = [t for t in out.spec.stored() if t.quant_format is not None]
    assert {t.quant_format.format for t in coded} == {settings["weights"]}
    assert torch.equal(stock_logits(out.folder, tmp_path, trust=True), our_logits(out.folder))


@pytest.mark.slow
def test_a_budget_chooses_among_trellis_codes(tmp_path):
    """Codes of two widths share a budget; noise as large as their errors tells what each costs."""
    settings = {"bits": 3.6, "formats": ["int8", "trellis4", "trellis3", "trellis2"], "reconstruction_epochs": 0}
    checkpoint = open_checkpoint(pico.folder("llama", hidden_size=64, head_dim=16, intermediate_size=128))
    out = write(
        apply(checkpoint, "cast", data=CALIBRATION, work=tmp_path / "w", **settings), tmp_path / "o", store="compact"
    )
    coded = [t for t in out.spec.stored() if t.quant_format is not None]
    assert len({t.quant_format.format for t in coded}) > 1
    assert sum(p.bytes for t in coded for p in parts(t)) * 8 / sum(t.count for t in coded) <= 3.6
    assert torch.equal(stock_logits(out.folder, tmp_path, trust=True), our_logits(out.folder))


def test_tensors_without_trellis_codes_are_refused(pico_llama, tmp_path):
    small = open_checkpoint(pico.save(tmp_path / "m", num_attention_heads=4, num_key_value_heads=1, head_dim=8))
    with pytest.raises(PassError, match=r"k_proj.weight has 8 outputs, and trellis codes need 16"):
        plan(small, "cast", weights="trellis2")
    pruned = apply(open_checkpoint(pico_llama), "prune_unstructured", method="magnitude", sparsity=0.5)
    with pytest.raises(PassError, match=r"has a keep-mask, which trellis codes do not hold"):
        plan(pruned, "cast", weights="trellis2")
    with pytest.raises(ValidationError, match="one scale for each output"):
        plan(open_checkpoint(pico_llama), "cast", weights="trellis2", group_size=64)
