"""Cost by length of two models, measured in this process; tests of `latency` start the worker processes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.evaluation import latency_path
from compress.evaluation.latency_lengths import Lengths, with_planned
from compress.evaluation.latency_settings import LatencySettings
from compress.models.loading import load_model
from compress.progress import SilentProgress
from tests import pico
from tests.toolbox import edit_config

#: Length ▶ path that a worker was asked for, by `worker`.
PATHS: list[tuple[int, str]] = []


def worker(model, folder, command):
    if command["do"] == "paths":
        return latency_path.paths(model, open_checkpoint(folder).spec)
    PATHS.append((command["length"], command["path"]))
    return latency_path.measure(model, command)


def measured(folders, lengths=(8, 16, 40), room=10**12, generated=3, decode=True):
    models = [load_model(folder) for folder in folders]
    settings = LatencySettings(lengths=lengths, generated=generated, rounds=2)
    task = {"vocabulary": 250, "seed": 0, "decode": decode}
    asks = [partial(worker, model, folder) for model, folder in zip(models, folders, strict=True)]
    PATHS.clear()
    return Lengths(asks, settings, task, lambda workers: room, SilentProgress()).measure()


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return pico.save(tmp_path_factory.mktemp("windowed") / "in", "qwen2")  # two of four blocks see 6 tokens


@pytest.fixture(scope="module")
def compared(windowed):
    return measured([pico.folder("llama"), windowed])


def test_lengths_measure_time_memory_and_cache(compared):
    sides, shared = compared
    assert shared == {"not_tried": []}
    for side in sides:
        assert [row["length"] for row in side["lengths"]] == [8, 16, 40]
        for row in side["lengths"]:
            assert len(row["prefill"]["samples"]) == len(row["decode"]["cpu"]["samples"]) == row["rounds"] == 2
            assert 0 < row["prefill"]["median"] <= row["prefill"]["p90"]
            assert row["depth"] == row["length"]
        assert side["fit"]["clock"] == "cpu"
    assert sides[0]["path_fits"] == []
    assert [(way["path"], way["fit"]["clock"]) for way in sides[1]["path_fits"]] == [("compress_local", "cpu")]
    assert "ratio" not in sides[0]["lengths"][0]["prefill"]
    assert sides[1]["lengths"][0]["prefill"]["cpu"]["lower"] <= sides[1]["lengths"][0]["prefill"]["cpu"]["ratio"]


def test_cache_is_counted_as_planned(windowed, compared):
    sides, _ = compared
    for folder, side in zip((pico.folder("llama"), windowed), sides, strict=True):
        rows = with_planned(side, open_checkpoint(folder).spec)["lengths"]
        assert [row["cache"]["values"] for row in rows] == [row["cache"]["planned"] for row in rows]
        assert [row["cache"]["bytes"] for row in rows] == [4 * row["cache"]["values"] for row in rows]
    assert [row["cache"]["values"] for row in rows] == [2 * 32 * (n + 5) for n in (8, 16, 40)]


def test_chunked_prompts_are_a_path_of_windowed_models(windowed, tmp_path):
    chunked = pico.save(tmp_path / "in", "qwen2")
    generation = load_model(chunked).generation_config
    generation.prefill_chunk_size = 8
    generation.save_pretrained(chunked)
    sides, _ = measured([windowed, chunked], lengths=(20,))
    assert [[path["path"] for path in side["lengths"][0]["paths"]] for side in sides] == [
        ["compress_local"],
        ["compress_local", "chunks"],
    ]
    path = next(path for path in sides[1]["lengths"][0]["paths"] if path["path"] == "chunks")
    assert path["prefill"]["ratio"] > 0
    assert (20, "chunks") in PATHS
    assert {length for length, path in PATHS if path == "compress_local"} == {20}
    full = pico.folder("llama")
    assert latency_path.paths(load_model(full), open_checkpoint(full).spec) == {"paths": ["stock"], "table": None}


def test_measuring_leaves_the_attention_of_the_model(windowed):
    model = load_model(windowed)
    before = model.config._attn_implementation
    command = {"do": "length", "length": 8, "depth": 8, "generated": 0, "vocabulary": 250, "seed": 0}
    latency_path.paths(model, open_checkpoint(windowed).spec)
    for path in ("compress_local", "stock"):
        latency_path.measure(model, {**command, "path": path})
        assert model.config._attn_implementation == before


def test_chunks_compute_what_the_whole_prompt_does(windowed):
    from compress.evaluation.prefill import prefill

    model, ids = load_model(windowed), torch.arange(20)[None] + 5
    with torch.inference_mode():
        whole, chunked = prefill(model, ids), prefill(model, ids, 8)
    torch.testing.assert_close(whole.logits[:, -1], chunked.logits[:, -1], atol=1e-5, rtol=1e-5)
    assert chunked.logits.shape[1] == 1


def test_lengths_end_where_memory_is_short():
    folder = pico.folder("llama")
    sides, shared = measured([folder, folder], room=0)
    assert [row["length"] for row in shared["not_tried"]] == [8, 16, 40]
    assert shared["not_tried"][0]["reason"].startswith("may need ")
    assert shared["not_tried"][0]["reason"].endswith("of memory, 0 B are left")
    assert [side["lengths"] for side in sides] == [[], []]
    assert sides[0]["fit"]["doubt"] == "a fit takes 3 lengths or more, there are 0"


def test_memory_of_a_longer_prompt_is_bounded_by_shorter_ones():
    lengths = Lengths([], LatencySettings(lengths=(1024,)), {}, lambda workers: 0, SilentProgress())
    lengths._left = 1000
    probed = []

    def grows_linearly(length):
        probed.append(length)
        lengths._peaks[length] = length

    lengths._probe = grows_linearly
    assert lengths._needed(1024) == 4 * 512, "twice as long may take four times as much"
    assert probed == [64, 128, 256, 512]
    lengths._left = 1024 * 16
    assert lengths._needed(1024) == 2048, "the longest probe is known already"
    assert lengths._needed(2048) == 512 * 16


def test_decode_stays_within_a_table_of_positions():
    sides, _ = measured([pico.folder("gpt2")] * 2, lengths=(64,), generated=4)
    row = sides[0]["lengths"][0]
    assert (row["length"], row["depth"], row["generated"]) == (64, 60, 4)


def test_encoders_have_neither_decode_nor_cache():
    sides, _ = measured([pico.folder("bert")] * 2, lengths=(8,), decode=False)
    assert all((row["decode"], row["cache"], row["generated"]) == (None, None, 0) for row in sides[1]["lengths"])


def test_windows_beyond_the_prompt_change_no_cache(tmp_path):
    folder = pico.save(tmp_path / "in", "qwen2")
    edit_config(folder, sliding_window=64)
    sides, _ = measured([pico.folder("llama"), folder], lengths=(8, 40))
    assert [row["cache"] for row in sides[0]["lengths"]] == [row["cache"] for row in sides[1]["lengths"]]


@pytest.mark.parametrize(
    "settings",
    [
        {"full": "50%", "sinks": 2},
        pytest.param({"full": 0, "sinks": 2, "pattern": "strided"}, marks=pytest.mark.slow),
        pytest.param({"full": 0, "sinks": 0, "pattern": "fixed"}, marks=pytest.mark.slow),
    ],
)
def test_caches_by_head_are_counted_as_planned(settings, tmp_path):
    from compress import apply

    full = pico.folder("llama")
    local = apply("local_attention", full, tmp_path / "out", store="compact", window=8, choose="every", **settings)
    sides, _ = measured([full, local], lengths=(16, 40))
    spec = open_checkpoint(local).spec
    rows = with_planned(sides[1], spec)["lengths"]
    assert [row["cache"]["values"] for row in rows] == [row["cache"]["planned"] for row in rows]
    assert rows[1]["cache"]["values"] < sides[0]["lengths"][1]["cache"]["values"]
