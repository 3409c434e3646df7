"""Prompts and decode of a whole model by length: full attention against windows, by the metric `latency`.

The model has SmolLM2-135M's shape with eight blocks and random weights, as time does not depend on them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compress
from compress.checkpoint.open import open_checkpoint
from compress.evaluation.latency import measure_latency
from compress.evaluation.latency_lengths import with_planned
from compress.evaluation.latency_settings import LatencySettings
from compress.settings import format_bytes

if TYPE_CHECKING:
    from benchmarks.attention.__main__ import Options

TITLE = "Cost by length: full attention and windows"
LENGTHS = (512, 2048, 8192)
#: Name ▶ settings of `local_attention`.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "25 % of blocks full, w = 1,024": {"window": 1024, "full": "25%"},
    "25 % of blocks full, w = 256": {"window": 256, "full": "25%"},
    "no block full, w = 256": {"window": 256, "full": 0},
}


def rows(options: Options) -> list[str]:
    """A table: for each conversion and length, ratios to the original of prefill (stock, ours), decode and cache."""
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    head = "| model | tokens | original | prefill, stock | prefill, our attention | attention alone | decode | cache |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|"]
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        original = _original(Path(folder) / "original")
        for name, settings in SETTINGS.items():
            converted = _converted(original, Path(folder) / "converted", settings)
            cost = LatencySettings(lengths=lengths, generated=16, rounds=2)
            sides = measure_latency([original, converted], dtype="float32", device="cpu", threads=1, lengths=cost)
            for side, checkpoint in zip(sides.values(), (original, converted), strict=True):
                with_planned(side, open_checkpoint(checkpoint).spec)
            lines += _lines(name, sides)
            notes += _fits(name, sides)
    return [
        *lines,
        "",
        "CPU seconds of one thread, mean of 2 rounds in turns; ratios are to the original's. Attention alone is the prefill "
        "less what a + b·n gives of the original's fit. The cache was counted in its tensors, and is as planned.",
        "",
        *notes,
    ]


def _original(folder: Path) -> Path:
    """A stock Llama of SmolLM2's shape with eight blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _converted(original: Path, folder: Path, settings: Mapping[str, Any]) -> Path:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return compress.apply("local_attention", original, folder, choose="every", sinks=0, **settings)


def _lines(name: str, sides: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    fit = sides["original"]["fit"]
    for x, y in zip(sides["original"]["lengths"], sides["candidate"]["lengths"], strict=True):
        assert y["cache"]["planned"] == y["cache"]["values"], "the cache is not as planned"
        n, before = x["length"], x["prefill"]["cpu"]["median"]
        ours = next((path["prefill"]["cpu"] for path in y["paths"] if path["path"] == "compress_local"), None)
        rest = fit["a"] + fit["b"] * n if fit["c"] is not None else before
        alone = "–"
        if ours is not None and before > rest:
            alone = f"× {max(ours['median'] - rest, 0) / (before - rest):.2f}"
        cells = [
            name,
            f"{n:,}",
            f"{before:.3g} s, {x['decode']['cpu']['median'] * 1000:.3g} ms, {format_bytes(x['cache']['bytes'])}",
            f"× {y['prefill']['cpu']['ratio']:.2f}",
            "–" if ours is None else f"× {ours['ratio']:.2f}",
            alone,
            f"× {y['decode']['cpu']['ratio']:.2f}",
            f"× {y['cache']['bytes'] / x['cache']['bytes']:.3f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _fits(name: str, sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    before, after = sides["original"]["fit"], sides["candidate"]
    if before["c"] is None:
        return []
    ways = {"stock": after["fit"], **{way["path"]: way["fit"] for way in after["path_fits"]}}
    shown = ", ".join(f"{way} × {fit['c'] / before['c']:.2f}" for way, fit in ways.items() if before["c"])
    half = f"c·n² is half of the original's prefill at {before['half']:,.0f} tokens" if before["half"] else "c is 0"
    return [f"- {name}: c {shown} of the original's {before['c']:.2g}; {half}."]
