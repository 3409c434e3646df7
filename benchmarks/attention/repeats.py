"""Spread of the ratios that `latency` gives by length: a model against itself, ten times, and against itself with windows.

Windows that are longer than the prompt change nothing, so all ratios should be 1.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from compress.evaluation.latency import measure_latency
from compress.evaluation.latency_settings import LatencySettings

if TYPE_CHECKING:
    from benchmarks.attention.__main__ import Options

TITLE = "Spread of ratios by length"
LENGTHS = (512, 1024)


def rows(options: Options) -> list[str]:
    """A table: smallest and largest ratio over the repeats, of CPU and of wall seconds."""
    repeats = 2 if options.quick else 10
    lines = [
        "| compared with itself | tokens | | CPU seconds | wall seconds |",
        "|---|--:|---|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        full, windowed = (_model(Path(folder) / name, window) for name, window in (("full", None), ("window", 2048)))
        for name, candidate in (("the same", full), ("windows of 2,048", windowed)):
            ratios: dict[tuple[int, str, str], list[float]] = {}
            for _ in range(repeats):
                cost = LatencySettings(lengths=LENGTHS, generated=16, rounds=10)
                sides = measure_latency([full, candidate], dtype="float32", device="cpu", threads=1, lengths=cost)
                for row in sides["candidate"]["lengths"]:
                    for part in ("prefill", "decode"):
                        ratios.setdefault((row["length"], part, "wall"), []).append(row[part]["ratio"])
                        ratios.setdefault((row["length"], part, "cpu"), []).append(row[part]["cpu"]["ratio"])
            for length in LENGTHS:
                for part in ("prefill", "decode"):
                    cells = (_spread(ratios[length, part, clock]) for clock in ("cpu", "wall"))
                    lines.append(f"| {name} | {length:,} | {part} | {' | '.join(cells)} |")
    return [*lines, "", f"Smallest, median and largest ratio of {repeats} comparisons, each the median of 10 rounds."]


def _spread(values: list[float]) -> str:
    return f"{min(values):.3f} · {statistics.median(values):.3f} · {max(values):.3f}"


def _model(folder: Path, window: int | None) -> Path:
    """Two blocks of SmolLM2's shape with random weights, as a stock Qwen2."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    if window is not None:
        path = folder / "config.json"
        changed = {"use_sliding_window": True, "sliding_window": window, "layer_types": ["sliding_attention"] * 2}
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder
