"""`low_rank_attention` on an encoder of sentences: similarity to the original, and time to read a text."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

TITLE = "Attention: Linformer for encoders"

RANK, TEXTS, ROUNDS = 128, 16, 9
LENGTHS = (128, 256, 512)


def rows(options: Any) -> list[str]:
    """Cosine to the original's embeddings and CPU seconds, for means of neighbours, the fit, and after distillation."""
    import torch

    import compress

    config = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))
    if not str(config["architectures"][0]).endswith("Model"):
        return [f"Needs a base model of an encoder, not {config['architectures'][0]}: give MODEL=.", ""]
    torch.set_num_threads(1)
    steps = 4 if options.quick else 24
    with tempfile.TemporaryDirectory() as temp:
        models = {"original": compress.load(options.model).float()}
        for name, passes in (
            ("means of neighbours", [{"low_rank_attention": {"rank": RANK, "iterations": 0}}]),
            ("least squares", [{"low_rank_attention": {"rank": RANK}}]),
            (
                f"least squares, {steps} steps of `distill`",
                [
                    {"low_rank_attention": {"rank": RANK}},
                    {"distill": {"steps": steps, "batch_size": 4, "validation_samples": 4, "allow_noop": True}},
                ],
            ),
        ):
            recipe = _recipe(options, passes, Path(temp) / str(len(models)))
            models[name] = compress.load(compress.run(recipe).checkpoint).float()
        similar = _similarity(models, options)
        seconds = _seconds(models)
    lines = [
        f"Rank {RANK}, {LENGTHS[-1]} positions. Similarity: mean cosine of the mean-pooled embeddings of {TEXTS} held-out "
        f"texts to the original's. Seconds: one text, float32, one thread, median of {ROUNDS} rounds in turns; the ratio to "
        "the original in brackets.",
        "",
        "| | "
        + " | ".join(f"similarity at {n}" for n in LENGTHS)
        + " | "
        + " | ".join(f"ms at {n}" for n in LENGTHS)
        + " |",
        "| --- |" + " ---: |" * 6,
    ]
    for name in models:
        times = [f"{1000 * seconds[name, n]:.1f} ({seconds[name, n] / seconds['original', n]:.2f})" for n in LENGTHS]
        lines.append(f"| {name} | " + " | ".join([f"{similar[name, n]:.4f}" for n in LENGTHS] + times) + " |")
    return [*lines, ""]


def _recipe(options: Any, passes: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Recipe of a model; calibration and training read the same text."""
    text = {"files": [options.train], "length": LENGTHS[-1]}
    return {
        "model": options.model,
        "output": str(output),
        "store": "compact",
        "data": {"calibration": {**text, "samples": 16 if options.quick else 32}, "training": text},
        "passes": passes,
    }


def _similarity(models: dict[str, Any], options: Any) -> dict[tuple[str, int], float]:
    """Mean cosine to the original by model and length."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = "\n".join(Path(name).read_text(encoding="utf-8") for name in options.heldout)
    ids = tokenizer(text[: 6 * TEXTS * LENGTHS[-1]], add_special_tokens=False)["input_ids"]
    similar = {}
    for length in LENGTHS:
        inner = [ids[i * LENGTHS[-1] :][: length - 2] for i in range(TEXTS)]
        batch = torch.tensor([[tokenizer.cls_token_id, *part, tokenizer.sep_token_id] for part in inner])
        with torch.inference_mode():
            embedded = {name: model(input_ids=batch)[0].mean(1) for name, model in models.items()}
        for name, vectors in embedded.items():
            cosine = torch.nn.functional.cosine_similarity(vectors, embedded["original"], dim=-1)
            similar[name, length] = float(cosine.mean())
    return similar


def _seconds(models: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Median CPU seconds of one text by model and length."""
    import torch

    taken: dict[tuple[str, int], list[float]] = {}
    for length in LENGTHS:
        ids = torch.randint(1000, 2000, (1, length), generator=torch.Generator().manual_seed(0))
        for _ in range(ROUNDS + 1):
            for name, model in models.items():
                start = time.process_time()
                with torch.inference_mode():
                    model(input_ids=ids)
                taken.setdefault((name, length), []).append(time.process_time() - start)
    return {key: statistics.median(values[1:]) for key, values in taken.items()}
