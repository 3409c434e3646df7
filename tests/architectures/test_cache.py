"""Bytes of the cache by headers are those of the tensors that stock transformers caches."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from compress import architectures
from compress.architectures.cache import (
    Cached,
    bytes_at,
    cache_bytes,
    cache_values,
    cached_bytes,
    caches,
    kv_bytes_per_token,
    reach,
)
from compress.checkpoint.edits.local import localised
from compress.checkpoint.open import open_checkpoint
from compress.errors import ReportError
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import edit_config, plan

CAUSAL = [family for family in pico.FAMILIES if architectures.of({"model_type": family}).causal]
#: Configs with windows beyond those of `pico.FAMILIES`.
WINDOWED = [
    ("mistral", {"sliding_window": 6}),
    ("mistral", {"sliding_window": 1}),
    ("mixtral", {"sliding_window": 6}),
    ("phi3", {"sliding_window": 6}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 6}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6}),
    ("gemma2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
]  # fmt: skip


def held(model, length, steps=0):
    """Numbers in the cache after a prompt and single steps."""
    ids = torch.randint(1, 250, (1, length + steps), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :length], use_cache=True).past_key_values
        for i in range(length, length + steps):
            cache = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
    return sum(tensor.numel() for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.parametrize(
    ("family", "changes"),
    [*(pytest.param(f, {}, marks=[] if f in pico.TIER else [pytest.mark.slow]) for f in CAUSAL), *WINDOWED],
)
def test_cache_values_are_those_of_the_real_cache(family, changes, tmp_path):
    folder = pico.save(tmp_path / "in", family, **changes)
    spec, model = open_checkpoint(folder).spec, load_model(folder)
    for length, steps in ((3, 0), (6, 0), (5, 2), (20, 0), (20, 5)):
        assert cache_values(spec, length + steps) == held(model, length, steps), (length, steps)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen3_moe"])
def test_windows_that_a_config_leaves_out_are_those_of_transformers(family, tmp_path):
    folder = pico.save(tmp_path / "in", family)
    edit_config(folder, sliding_window=...)
    window = load_model(folder).config.sliding_window
    record, config = architectures.of({"model_type": family}), open_checkpoint(folder).spec.structure.config
    assert record.window(config) == window


def test_cache_bytes_are_in_the_format_of_the_config(tmp_path):
    spec = open_checkpoint(pico.save(tmp_path / "in", "qwen2", dtype=torch.bfloat16)).spec
    assert caches(spec) == ((Cached(32),),) * 2 + ((Cached(32, 5),),) * 2
    assert cache_bytes(spec, 5) == 5 * kv_bytes_per_token(spec) == 5 * 4 * 32 * 2
    assert cache_bytes(spec, 8) == (2 * 8 + 2 * 5) * 32 * 2
    assert cache_bytes(spec, 8, "float32") == 2 * cache_bytes(spec, 8)


@pytest.mark.parametrize("family", ["bert", "t5", "vit"])
def test_cache_is_not_known_where_nothing_decodes(family):
    assert cache_bytes(open_checkpoint(pico.folder(family)).spec, 8) is None


def test_cache_is_not_known_for_other_kinds_of_layers(tmp_path):
    folder = pico.save(tmp_path / "in", "qwen2")
    edit_config(folder, layer_types=["full_attention", "linear_attention"] * 2)
    assert caches(open_checkpoint(folder).spec) is None
    edit_config(folder, layer_types=[["full_attention"]] * 4)
    assert caches(open_checkpoint(folder).spec) is None
    edit_config(folder, layer_types=["chunked_attention"] * 4, attention_chunk_size="many")
    assert caches(open_checkpoint(folder).spec) is None
    edit_config(folder, layer_types=["full_attention"])
    assert caches(open_checkpoint(folder).spec) is None


def test_shared_blocks_have_a_cache_each():
    checkpoint = open_checkpoint(pico.folder("llama"))
    shared = plan(checkpoint, "share", groups=2, residual_rank=2)
    assert any(tensor.alias_of for tensor in shared.tensors.values())
    assert cache_values(shared, 7) == cache_values(checkpoint.spec, 7) == 7 * 4 * 32


def test_edits_change_what_their_block_caches():
    spec = open_checkpoint(pico.folder("llama")).spec
    values = {"window": 3, "sinks": 1, "heads": 2, "full": [1], "pattern": "window", "positions": 64}
    edited = localised(spec, {"model.layers.2.self_attn": values})
    assert caches(edited)[1] == (Cached(32),)
    full, windows = caches(edited)[2]
    assert full == Cached(16)
    assert [windows.count(length) for length in (1, 4, 5, 100)] == [16, 64, 64, 64]
    assert cache_values(edited, 10) == 3 * 10 * 32 + 10 * 16 + 4 * 16


@pytest.mark.parametrize(
    ("changes", "blocks", "expected"),
    [({}, 4, None), ({}, 3, 64), ({"full": [0]}, 4, 64), ({"pattern": "strided", "stride": 2}, 4, 64)],
)
def test_texts_without_end_need_windows_in_all_heads(changes, blocks, expected):
    values = {"window": 3, "sinks": 1, "heads": 2, "full": [], "pattern": "window", "positions": 64, **changes}
    modules = [f"model.layers.{i}.self_attn" for i in range(blocks)]
    assert reach(localised(open_checkpoint(pico.folder("llama")).spec, dict.fromkeys(modules, values))) == expected


def test_cache_bytes_need_no_torch():
    code = "import sys, compress.architectures.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def strided(length):
    """Tokens kept of a window of 4 and every 8th token before it."""
    return min(length, 4) + max(length - 4, 0) // 8


@pytest.mark.parametrize("tokens", [None, 5, lambda length: min(length, 9)])
def test_parts_of_reports_give_the_bytes_at_any_length(tokens, monkeypatch):
    spec = open_checkpoint(pico.folder("llama")).spec
    monkeypatch.setattr(sys.modules[Cached.__module__], "caches", lambda spec: ((Cached(16), Cached(16, tokens)),) * 4)
    rows = [asdict(row) for row in cached_bytes(spec)]
    assert all(row["kept"] is None for row in rows)
    for length in (1, 4, 5, 6, 9, 10, 100, 777):
        assert bytes_at(rows, length) == cache_bytes(spec, length)


def test_parts_of_patterns_are_known_at_powers_of_two(monkeypatch):
    spec = open_checkpoint(pico.folder("llama")).spec
    monkeypatch.setattr(sys.modules[Cached.__module__], "caches", lambda spec: ((Cached(16), Cached(16, strided)),) * 4)
    rows = [asdict(row) for row in cached_bytes(spec)]
    for length in (16, 64, 8192):
        assert bytes_at(rows, length) == cache_bytes(spec, length)
    with pytest.raises(ReportError, match="is not known after 100 tokens"):
        bytes_at(rows, 100)
