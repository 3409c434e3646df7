"""Prompts in the stock classes of `local_attention`: read at once, and in chunks (`prefill_chunk_size`)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

TITLE = "Attention: prompts in stock classes"

BLOCKS, WINDOW, CHUNK = 4, 256, 512
LENGTHS = (1024, 2048, 4096, 8192)
#: Eager attention of a longer prompt, read at once, takes several times this many squared numbers per head.
_EAGER = 4096


def rows(options: Any) -> list[str]:
    """CPU seconds of prompts, for a quarter, half and none of the blocks full."""
    import torch

    torch.set_num_threads(1)
    config = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    lines = [
        f"{BLOCKS} blocks of the shape of the model, float32, random weights, windows of {WINDOW}, one thread. CPU seconds of "
        f"`generate` with one new token; the prompt at once · in chunks of {CHUNK}.",
        "",
        "| class | full blocks | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "| --- | ---: |" + " ---: |" * len(lengths),
    ]
    cases = [("llama", BLOCKS), *((kind, full) for kind in ("ministral", "granite_swa") for full in (2, 1, 0))]
    for kind, full in cases:
        model = _model(config, kind, full, lengths[-1] + 8)
        cells = []
        for length in lengths:
            ids = torch.randint(10, 900, (1, length), generator=torch.Generator().manual_seed(0))
            at_once = "–" if kind == "granite_swa" and length > _EAGER else f"{_seconds(model, ids, None):.2f}"
            cells.append(f"{at_once} · {_seconds(model, ids, CHUNK):.2f}")
        lines.append(f"| {kind} | {full} of {BLOCKS} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _model(shape: dict[str, Any], kind: str, full: int, positions: int) -> Any:
    """A random model of a stock class whose blocks have the shape of the config's; the first ``full`` ones see everything."""
    import torch
    import transformers

    torch.manual_seed(0)
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    fields = {key: shape[key] for key in keys}
    head_dim = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    if kind != "llama":
        fields |= {"layer_types": ["full_attention"] * full + ["sliding_attention"] * (BLOCKS - full)}
        fields["sliding_window"] = WINDOW
    if kind == "granite_swa":
        fields["attention_multiplier"] = head_dim**-0.5
    config = transformers.AutoConfig.for_model(
        kind,
        **fields,
        head_dim=head_dim,
        num_hidden_layers=BLOCKS,
        vocab_size=1000,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _seconds(model: Any, ids: Any, chunk: int | None) -> float:
    """CPU seconds of one prompt; the lesser of two runs."""
    import torch

    taken = []
    with torch.inference_mode():
        for _ in range(2):
            start = time.process_time()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, prefill_chunk_size=chunk)
            taken.append(time.process_time() - start)
    return min(taken)
