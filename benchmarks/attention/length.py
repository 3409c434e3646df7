"""Prompts and decode of a whole model by length: full attention against windows, by the machinery of `latency`.

The model has the shape of SmolLM2-135M with four of its thirty blocks, a vocabulary cut in proportion, and random weights,
as time does not depend on them. All models are measured in turns, in one run.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compress
from compress.checkpoint.open import open_checkpoint
from compress.evaluation import latency
from compress.evaluation.latency_lengths import Lengths, with_planned
from compress.evaluation.latency_settings import LatencySettings
from compress.formatting import format_bytes
from compress.progress import SilentProgress

if TYPE_CHECKING:
    from benchmarks.attention.__main__ import Options

TITLE = "Attention: cost by length"
#: Name ▶ settings of `local_attention`.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "25 % of blocks full, w = 1,024": {"window": 1024, "full": "25%"},
    "25 % of blocks full, w = 256": {"window": 256, "full": "25%"},
    "no block full, w = 256": {"window": 256, "full": 0},
}
_VOCABULARY = 6144


def rows(options: Options) -> list[str]:
    """A table: for each conversion and length, ratios to the original of prefill (stock, ours), decode and cache."""
    cost = LatencySettings(lengths=(512, 1024) if options.quick else (512, 2048, 8192), generated=16, rounds=2)
    head = "| model | tokens | prefill, stock | prefill, our attention | attention alone | decode | cache |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|"]
    with tempfile.TemporaryDirectory() as folder:
        original = _original(Path(folder) / "original")
        folders = [original]
        for number, settings in enumerate(SETTINGS.values()):
            made = compress.apply(
                "local_attention", original, Path(folder) / str(number), choose="every", sinks=0, **settings
            )
            folders.append(made)
        first, *others = measured(folders, cost)
    for row in first["lengths"]:
        prefill, decode = (row[part]["cpu"]["median"] for part in ("prefill", "decode"))
        cells = (f"{prefill:.3g} s", "–", "–", f"{decode * 1000:.3g} ms", format_bytes(row["cache"]["bytes"]))
        lines.append(f"| original | {row['length']:,} | {' | '.join(cells)} |")
    for name, side in zip(SETTINGS, others, strict=True):
        lines += _lines(name, first, side)
    return [
        *lines,
        "",
        "CPU seconds of one thread, mean of two rounds in turns; ratios are to the original's. Attention alone is the prefill "
        "less the a + b·n of the original's fit. Caches are as counted in their tensors, which is as planned.",
        "",
        *(line for name, side in zip(SETTINGS, others, strict=True) for line in _fits(name, first, side)),
    ]


def measured(folders: list[Path], cost: LatencySettings) -> list[dict[str, Any]]:
    """Cost of several models by length, in turns; ratios are to the first."""
    settings = {"dtype": "float32", "device": "cpu", "threads": 1, "trust_remote_code": False, "ignore_auto_map": False}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(latency._worker({**settings, "folder": str(folder)})) for folder in folders]
        for worker in workers:
            worker.answer()
        asks = [partial(latency._command, worker) for worker in workers]
        task = {"vocabulary": 4096, "seed": 0, "decode": True}
        sides, shared = Lengths(asks, cost, task, partial(latency._room, None), SilentProgress()).measure()
    assert not shared["not_tried"], shared
    return [with_planned(side, open_checkpoint(folder).spec) for side, folder in zip(sides, folders, strict=True)]


def _original(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _lines(name: str, original: Mapping[str, Any], side: Mapping[str, Any]) -> Iterator[str]:
    fit = original["fit"]
    for x, y in zip(original["lengths"], side["lengths"], strict=True):
        assert y["cache"]["planned"] == y["cache"]["values"], "the cache is not as planned"
        ours = next(path["prefill"]["cpu"] for path in y["paths"] if path["path"] == "compress_local")
        alone = "–"
        if fit["c"]:
            rest = fit["a"] + fit["b"] * x["length"]
            alone = f"× {max(ours['median'] - rest, 0) / (fit['c'] * x['length'] ** 2):.2f}"
        cells = (
            f"× {y['prefill']['cpu']['ratio']:.2f}",
            f"× {ours['ratio']:.2f}",
            alone,
            f"× {y['decode']['cpu']['ratio']:.2f}",
            f"× {y['cache']['bytes'] / x['cache']['bytes']:.3f}",
        )
        yield f"| {name} | {x['length']:,} | {' | '.join(cells)} |"


def _fits(name: str, original: Mapping[str, Any], side: Mapping[str, Any]) -> list[str]:
    before = original["fit"]
    if not before["c"]:
        return []
    ways = {"stock": side["fit"], **{way["path"]: way["fit"] for way in side["path_fits"]}}
    shown = ", ".join(f"{way} × {fit['c'] / before['c']:.2f}" for way, fit in ways.items())
    return [f"- {name}: c {shown} of the original's; c·n² is half of the original's at {before['half']:,.0f} tokens."]
