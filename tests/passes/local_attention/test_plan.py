"""Plans of windows: bytes, cache and refusals, from headers alone."""

from __future__ import annotations

import json

import pytest

import compress
from compress.architectures.cache import cache_bytes
from compress.architectures.conversions.windows import current_windows, rope_parameters
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import stored_form
from compress.errors import DataError, PassError
from compress.models import sameness
from compress.passes.local_attention.local_attention import LocalAttention
from compress.passes.local_attention.settings import LocalAttentionSettings
from tests import pico
from tests.toolbox import edit_config, plan

PLAIN = {"window": 8, "full": [0, 2], "sinks": 0}
EVERY = {"window": 8, "choose": "every", "sinks": 0}


def planned(family="llama", changes=None, **settings):
    return plan(open_checkpoint(pico.folder(family, **(changes or {}))), "local_attention", **settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"sinks": "learned", "choose": "every", "window": 8, "full": "50%"}),
        ("llama", {**EVERY, "target": "qwen2"}),
        ("qwen3", EVERY),
    ],
)
def test_plan_matches_what_is_written(family, settings, tmp_path, data):
    """Names, shapes, bytes and config; and the caches that the config promises are those of the windows."""
    checkpoint = open_checkpoint(pico.folder(family))
    spec = plan(checkpoint, "local_attention", **settings)
    assert spec.exact
    compress.apply("local_attention", checkpoint.folder, tmp_path / "out", data=data.ids, **settings)
    read = open_checkpoint(tmp_path / "out")
    assert dict(read.spec.tensors) == dict(spec.tensors)
    assert read.spec.structure.config == spec.structure.config
    layout = stored_form(spec, "stock", 1 << 40, checkpoint.metadata)[1]
    assert layout.bytes == sum((tmp_path / "out" / file).stat().st_size for file in read.files)


def test_memory_of_tuning_is_planned():
    """The trained model in float32, gradients and two moments of attention and vectors, and the original."""
    before, spec = open_checkpoint(pico.folder()).spec, planned(**PLAIN)
    instance, settings = LocalAttention(), LocalAttentionSettings(**PLAIN, tune_epochs=1)
    trained = sum(t.count for t in spec.weights() if "self_attn" in t.name or len(t.shape) == 1)
    weights = 2 * 4 * spec.parameters + 12 * trained
    assert weights < instance.memory(before, settings, 4) < weights + (10 << 20)
    deep = open_checkpoint(pico.folder(num_hidden_layers=9)).spec
    assert len({instance.memory(s, LocalAttentionSettings(**PLAIN), 4) for s in (before, deep)}) == 1  # one block


@pytest.mark.parametrize(
    ("settings", "full"),
    [
        ({"full": "25%"}, [0]),
        ({"full": "50%"}, [0, 2]),
        ({"full": 3}, [0, 1, 2]),
        ({"full": 0}, []),
        ({"full": [1]}, [1]),
        ({}, [0]),
        ({"max_cache": "60%", "at": 64}, [0]),
        ({"max_cache": "56%", "at": 64}, [0, 2]),
        ({"max_cache": "55%", "at": 64}, [0]),
        ({"max_cache": "20%"}, []),
    ],
)
def test_full_blocks_are_spread_evenly(settings, full):
    """At 64 tokens a window of 8 keeps 7: two blocks of four make (2 · 64 + 2 · 7) / 256 = 55.5 % of the cache."""
    if settings.get("max_cache") == "60%":
        full = [0, 2]
    spec = planned(**EVERY, **settings)
    assert [i for i, window in enumerate(current_windows(spec)) if window is None] == full
    share = cache_bytes(spec, 64) / cache_bytes(open_checkpoint(pico.folder()).spec, 64)
    assert share == (len(full) * 64 + (4 - len(full)) * 7) / 256


@pytest.mark.parametrize(
    ("family", "changes", "settings", "message"),
    [
        ("llama", {}, {"window": 64}, r"a window of 64 is no shorter than the 64 positions .*; set a shorter one"),
        ("llama", {}, {"at": 65}, "trained for 64 positions"),
        ("llama", {}, {"full": [4]}, "there is no block 4: the model has 4, numbered from 0"),
        ("llama", {}, {"full": 4}, "every block would stay full"),
        ("llama", {}, {"full": 5}, "only 4 of 4 blocks see everything, and 5 are to stay so"),
        ("llama", {}, {"max_cache": "5%"}, r"everywhere the cache is 10\.9% of the original's at 64 tokens"),
        ("llama", {}, {"only": ["*.mlp.*"]}, r"blocks are chosen by number; use `full: \[0, 7\]`"),
        (
            "llama",
            {},
            {"target": "mistral"},
            "there is no target `mistral`; set one of granite_swa, ministral, smollm3, qwen2, cwm",
        ),
        (
            "llama",
            {},
            {"sinks": "learned", "target": "ministral"},
            "`ministral` has no logits of sinks; set `sinks: 0`",
        ),
        ("llama", {"attention_bias": True}, {"target": "qwen2"}, r"this llama \(qwen2: its o_proj has no bias\)"),
        ("llama", {"class_name": "LlamaForSequenceClassification"}, {"sinks": "learned"}, "it has no class like Llama"),
        ("qwen3", {}, {"sinks": "learned"}, r"express this qwen3 with sinks .*; set `sinks: 0`, and repair"),
        ("gemma2", {}, {}, r"blocks have windows of 6 already; set 6 or less"),
        ("mistral", {"sliding_window": 16}, {}, "every block has a window, and 1 are to stay so; set `full: 0`"),
        ("gemma3_text", {}, {"window": 4, "full": [1]}, r"full blocks have other rotary .*; set `full: \[1, 3\]`"),
        ("bert", {}, {}, "bert does not decode token by token"),
        ("t5", {}, {}, "t5 does not decode token by token"),
        ("gpt2", {}, {}, "no stock family can express this gpt2"),
        ("bloom", {}, {"sinks": "learned"}, "no stock family can express this bloom with sinks"),
        ("phi3", {}, {}, "no stock family can express this phi3"),
        ("qwen3_moe", {}, {}, "no stock family can express this qwen3_moe"),
    ],
)
def test_plan_refuses(family, changes, settings, message):
    with pytest.raises(PassError, match=message) as caught:
        planned(family, changes, **{**EVERY, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "does not say full or sliding attention for each block"),
        ("qwen2", {"layer_types": ["full_attention"]}, "does not say full or sliding attention for each block"),
        ("smollm3", {"no_rope_layers": [1]}, "`no_rope_layers` of the config has 1 entries for 4 blocks"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "the base of rotary positions is None here"),
        ("llama", {"rope_parameters": {"rope_type": "x"}}, "does not compute rotary positions of the kind x"),
        ("llama", {"partial_rotary_factor": 0.5}, "of the kind default on a part of each head"),
    ],
)
def test_plan_refuses_damaged_configs(family, changes, message, tmp_path):
    folder = pico.save(tmp_path / "in", family)
    edit_config(folder, **changes)
    with pytest.raises(PassError, match=message):
        plan(open_checkpoint(folder), "local_attention", window=8, choose="every", full=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "expected a number of tokens from 2 up"),
        ({"window": [8, 8]}, "a window is named twice"),
        ({"window": 8, "full": 1.5}, "expected a share between 0 and 1"),
        ({"window": 8, "full": 2, "max_cache": "40%"}, "give `full` or `max_cache`, not both"),
        ({"window": 8, "at": 8}, "`at` is no longer than the window of 8"),
        ({"window": 8, "sinks": "learnt"}, "expected `learned`, or a number of tokens from 0 up"),
        ({"window": 8, "sinks": True}, "expected `learned`"),
        ({"window": 8, "by": "heads", "full": [1]}, "give `full` as a share or a count"),
    ],
)
def test_settings_refuse(settings, message, tmp_path):
    with pytest.raises(Exception, match=message):
        compress.apply("local_attention", pico.folder(), tmp_path / "out", **settings)


def test_windows_of_gemma3_can_shrink(tmp_path):
    """Its full blocks have another base of rotary positions, so the kinds stay."""
    spec = planned("gemma3_text", window=4, full=[1, 3], sinks=0)
    assert current_windows(spec) == (4, None, 4, None)


@pytest.mark.parametrize("keys", [{"calibration": "text"}, {"calibration": "ids"}])
def test_recipe_refuses_samples_that_a_window_covers(keys, texts, tmp_path):
    import numpy as np

    np.save(tmp_path / "ids.npy", np.zeros((4, 8), dtype=np.int64))
    file, length = (str(texts[0]), {"length": 8}) if keys["calibration"] == "text" else (str(tmp_path / "ids.npy"), {})
    recipe = {
        "model": str(pico.folder()),
        "output": str(tmp_path / "out"),
        "data": {"calibration": {"files": [file], "samples": 4, **length}},
        "passes": [{"local_attention": {"window": 8, "choose": "every", "sinks": "learned"}}],
    }
    with pytest.raises(DataError, match=r"samples of 8 tokens fit into a window of 8.*set data\.calibration\.length"):
        compress.run(recipe)


def test_apply_refuses_samples_that_a_window_covers(data, tmp_path):
    with pytest.raises(DataError, match="samples of 24 tokens fit into a window of 24"):
        compress.apply(
            "local_attention", pico.folder(), tmp_path / "out", data=data.ids, window=24, full=1, choose="every"
        )


def test_check_after_writing_narrows_windows(tmp_path, monkeypatch):
    """The sample of the check is shorter than this window, which would hide a class that ignores it."""
    seen = []
    real = sameness.load_checkpoint
    monkeypatch.setattr(
        sameness,
        "load_checkpoint",
        lambda c, **kwargs: seen.append(c.spec.structure.config["sliding_window"]) or real(c, **kwargs),
    )
    compress.apply("local_attention", pico.folder(), tmp_path / "out", **{**PLAIN, "window": 32})
    assert seen[-1] == sameness.WINDOW < 32


def test_chunks_of_prompts_are_written_where_prompts_are_long(tmp_path):
    folder = pico.save(tmp_path / "in", max_position_embeddings=4096)
    compress.apply("local_attention", folder, tmp_path / "out", **PLAIN)
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    before = json.loads((folder / "generation_config.json").read_text())
    assert written == {**before, "prefill_chunk_size": 512}
    (folder / "generation_config.json").unlink()
    compress.apply("local_attention", folder, tmp_path / "bare", **{**PLAIN, "window": 1024})
    written = json.loads((tmp_path / "bare/generation_config.json").read_text())
    assert written == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "prefill_chunk_size": 1024}
    compress.apply("local_attention", pico.folder(), tmp_path / "short", **PLAIN)
    assert "prefill_chunk_size" not in json.loads((tmp_path / "short/generation_config.json").read_text())


def test_older_configs_of_rotary_positions_are_read(tmp_path):
    """Their keys are those of transformers before 5: a base and a scaling beside it."""
    from compress.models.loading import load_model

    folder = pico.save(tmp_path / "in", rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    edit_config(folder, rope_parameters=..., rope_theta=500.0, rope_scaling={"type": "linear", "factor": 2.0})
    compress.apply("local_attention", folder, tmp_path / "out", **PLAIN)
    same = pico.logits(load_model(folder), 8) - pico.logits(load_model(tmp_path / "out"), 8)
    assert same.abs().max() == 0
    assert rope_parameters({}, 10.0) == {"rope_theta": 10.0, "rope_type": "default"}
