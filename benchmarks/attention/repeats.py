"""Spread of the ratios that `latency` gives by length: ten comparisons of a model with itself, and with long windows.

Windows that are longer than the prompt change nothing, so all ratios should be 1.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.attention.length import measured
from compress.evaluation.latency_settings import LatencySettings

if TYPE_CHECKING:
    from benchmarks.attention.__main__ import Options

TITLE = "Spread of ratios by length"


def rows(options: Options) -> list[str]:
    """A table: smallest, median and largest ratio over the comparisons, of CPU and of wall seconds."""
    repeats = 2 if options.quick else 10
    cost = LatencySettings(lengths=(512,), generated=16, rounds=10)
    names = ("the same model", "windows of 2,048 tokens")
    ratios: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        full, windowed = (_model(Path(folder) / name, window) for name, window in (("full", None), ("window", 2048)))
        for _ in range(repeats):
            _, *others = measured([full, full, windowed], cost)
            for name, side in zip(names, others, strict=True):
                (row,) = side["lengths"]
                for part in ("prefill", "decode"):
                    ratios.setdefault((name, part, "wall"), []).append(row[part]["ratio"])
                    ratios.setdefault((name, part, "cpu"), []).append(row[part]["cpu"]["ratio"])
    lines = ["| compared with a model | | CPU seconds | wall seconds |", "|---|---|--:|--:|"]
    for name in names:
        for part in ("prefill", "decode"):
            cells = (_spread(ratios[name, part, clock]) for clock in ("cpu", "wall"))
            lines.append(f"| {name} | {part} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Smallest, median and largest ratio of {repeats} comparisons at 512 tokens, in new processes each. A ratio is that of "
        "the medians of 10 rounds.",
    ]


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
