"""A budget of bytes chooses formats and sizes of groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import compress
from compress.checkpoint.layout import lay_out
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.checkpoint.storage import parts
from compress.checkpoint.store import with_storage
from compress.errors import PassError
from compress.passes.cast.cast import Cast
from compress.passes.cast.settings import CastSettings
from tests import pico
from tests.toolbox import our_logits, stock_logits


@pytest.mark.slow
def test_cast_budget_is_kept_and_spent(folders, data, tmp_path):
    settings = {"group_size": 16, "reconstruction_epochs": 0}
    details: dict = {}
    out = compress.apply(
        "cast", folders["llama"], tmp_path / "bits", data=data.ids, bits=4.5, details=details, **settings
    )
    found = open_checkpoint(out)
    coded = [t for t in found.spec.stored() if t.quant_format is not None]
    stored = sum(p.bytes for t in coded for p in parts(t)) * 8 / sum(t.count for t in coded)
    assert 4.3 < stored <= 4.5
    assert {r["tensor"]: r["format"] for r in details["formats"]} == {t.name: t.quant_format.format for t in coded}
    for block in range(4):  # what reads the same inputs has the same format
        formats = {
            found.spec.tensors[f"model.layers.{block}.self_attn.{n}_proj.weight"].quant_format.format for n in "qkv"
        }
        assert len(formats) == 1
    assert torch.equal(stock_logits(out, tmp_path), our_logits(out))
    size = 130_000
    whole = compress.apply("cast", folders["llama"], tmp_path / "size", data=data.ids, max_bytes=size, **settings)
    assert 0.95 * size < sum(f.stat().st_size for f in whole.glob("*.safetensors")) <= size
    with pytest.raises(
        PassError, match=r"even the smallest formats need more: max_bytes: \d+_\d+ is the least possible"
    ):
        compress.apply("cast", folders["llama"], tmp_path / "no", data=data.ids, max_bytes=100_000, **settings)


@pytest.mark.slow
def test_cast_budget_on_experts(folders, data, tmp_path):
    """All experts get one format, as stock transformers asks; the attention's are chosen beside it."""
    settings = {"bits": 6.9, "group_size": 16, "reconstruction_epochs": 0, "error_correction": []}
    out = compress.apply("cast", folders["qwen3_moe"], tmp_path / "out", data=data.ids, **settings)
    coded = [t for t in open_checkpoint(out).spec.stored() if t.quant_format is not None]
    assert len({t.quant_format for t in coded if ".experts." in t.name}) == 1
    assert len({t.quant_format for t in coded if ".experts." not in t.name}) > 1
    assert sum(p.bytes for t in coded for p in parts(t)) * 8 / sum(t.count for t in coded) <= 6.9
    assert torch.equal(stock_logits(out, tmp_path), our_logits(out))


@pytest.mark.slow
def test_cast_budget_chooses_group_sizes(data, tmp_path):
    """With float32 scales groups of 64 take half a bit per weight: larger ones and more bits change the output less."""
    folder = pico.save(
        tmp_path / "m", "llama", hidden_size=128, head_dim=32, intermediate_size=192, with_tokenizer=False
    )
    details: dict = {}
    out = compress.apply(
        "cast", folder, tmp_path / "out", data=data.ids, bits=4.5, reconstruction_epochs=0, details=details
    )
    found = open_checkpoint(out)
    coded = [t for t in found.spec.stored() if t.quant_format is not None]
    stored = sum(p.bytes for t in coded for p in parts(t)) * 8 / sum(t.count for t in coded)
    assert 4.3 < stored <= 4.5
    assert {t.quant_format.group for t in coded} & {0, 128}
    assert all(t.quant_format.groups(t.shape) * (t.quant_format.group or t.shape[1]) == t.shape[1] for t in coded)
    assert {r["format"].partition("/")[0] for r in details["formats"]} == {t.quant_format.format for t in coded}
    assert torch.equal(stock_logits(out, tmp_path), our_logits(out))


def test_max_bytes_counts_codes_of_embeddings(folders):
    """The blocks get what a coded table of tokens gives up: more bits within 95 kB than beside a dense one within 120 kB."""
    spec, _ = open_headers(folders["llama"])
    table = "model.embed_tokens"
    settings = CastSettings(max_bytes=95_000, overrides={table: "int4"}).stored_in("compact")
    size = lay_out(with_storage(Cast().plan(spec, settings), "compact"), 1 << 62).bytes
    assert 0.95 * 95_000 < size <= 95_000
    dense = CastSettings(max_bytes=120_000)
    mean = [
        sum(t.quant_format.bits * t.count for t in coded) / sum(t.count for t in coded)
        for s in (settings, dense)
        if (coded := [t for t in Cast().plan(spec, s).stored() if t.quant_format and t.module != table])
    ]
    assert mean[0] > mean[1]


def test_max_bytes_counts_masks_in_the_compact_store(folders):
    """Half of the weights removed: the others get more bits within the same bytes."""
    spec, _ = open_headers(folders["llama"])
    names = [t.name for t in spec.stored() if len(t.shape) == 2 and ".layers." in t.name]
    half = spec.map(lambda t: replace(t, kept=t.count // 2) if t.name in names else t)
    bits = []
    for each in (spec, half):
        settings = CastSettings(max_bytes=125_000, group_size=16).stored_in("compact")
        coded = Cast().plan(each, settings)
        size = lay_out(with_storage(coded, "compact"), 1 << 62).bytes
        assert 0.9 * 125_000 < size <= 125_000
        bits.append(sum(t.quant_format.bits for t in coded.stored() if t.quant_format))
    assert bits[1] > bits[0]
