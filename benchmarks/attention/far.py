"""What windows forget: loss by position, and on passages that come again, of stock windows without sinks or repair."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

TITLE = "Attention: loss far from the beginning, and on repetitions"

WINDOW, READ, DISTANCE, PASSAGE, SAMPLES = 128, 512, 512, 128, 4


def rows(options: Any) -> list[str]:
    """A row per model: bits per byte by position, and nats per token on repeated passages."""
    import torch
    from transformers import AutoTokenizer

    import compress
    from compress.data.documents import Document
    from compress.evaluation.language import score_documents
    from compress.evaluation.repetition import measure_repetition
    from compress.evaluation.repetition_settings import RepetitionSettings

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.heldout[0]).read_text(encoding="utf-8")
    documents = [Document("text", text[: 24 * SAMPLES * READ])]
    short = [Document("text", text[: 4 * SAMPLES * READ])]
    settings = RepetitionSettings(distances=(DISTANCE,), passage=PASSAGE, samples=2 if options.quick else SAMPLES)
    original = compress.load(options.model, dtype="float32")
    lines, once = [], 0.0
    with tempfile.TemporaryDirectory() as temp:
        models = [("the original", original), *_windowed(options.model, Path(temp))]
        for name, model in models:
            beside = {} if model is original else {"reference": original}
            by_position = score_documents(model, tokenizer, short, window=READ, stride=READ, **beside).to_dict()[
                "positions"
            ]
            again = measure_repetition(model, tokenizer, documents, settings, window=READ, **beside)
            bits = [f"{row['bits_per_byte']:.3f}" for row in by_position]
            loss, once = again["distances"][0], again["seen_once"] if model is original else once
            kl = "" if loss["kl"] is None else f"{loss['kl']:.3f}"
            lines.append(f"| {name} | " + " | ".join([*bits, f"{loss['nats_per_token']:.3f}", kl]) + " |")
    heads = [f"{row['from']} to {row['to']}" for row in by_position]
    return [
        f"Windows of {WINDOW} tokens in stock classes, no sinks, no training; float32. Bits per byte by position in windows of "
        f"{READ} tokens; nats per token on a passage of {PASSAGE} tokens that comes again after {DISTANCE}, and the KL from "
        f"the original there. The same passages cost the original {once:.3f} nats per token when it sees them first.",
        "",
        "| bits per byte at | " + " | ".join([*heads, "repetition", "KL there"]) + " |",
        "| --- |" + " ---: |" * (len(heads) + 2),
        *lines,
        "",
    ]


def _windowed(model: str, folder: Path) -> list[tuple[str, Any]]:
    """The model with windows in all blocks, and in all but every fourth."""
    import compress

    made = []
    for name, full in (("windows in every block", 0), ("every 4th block full", "25%")):
        windows = {"window": WINDOW, "full": full, "choose": "every", "sinks": 0}
        recipe = {"model": model, "output": str(folder / str(len(made))), "passes": [{"local_attention": windows}]}
        made.append((name, compress.load(compress.run(recipe).checkpoint, dtype="float32")))
    return made
