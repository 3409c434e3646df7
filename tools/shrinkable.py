"""Which classes of transformers have a pico model: ``python -m tools.shrinkable [mapping …] [--types a,b]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

#: Mappings of transformers whose classes are tried.
MAPPINGS = (
    "CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION",
)  # fmt: skip


def classes(mapping: str) -> list[tuple[str, str]]:
    """Model types and class names of one of `MAPPINGS`; a type may have several classes."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
    return [(kind, name) for kind, of in names.items() for name in ((of,) if isinstance(of, str) else of)]


def attempt(kind: str, name: str) -> dict[str, Any]:
    """Build a pico model and run it once: ``{parameters, seconds}``, or ``{stage, error}``."""
    import torch
    import transformers

    from compress.models.classes import first_line, quiet_transformers
    from compress.models.pico import config_of, dummy_inputs, pico_model
    from compress.models.shrink import default_config, shrunken

    started, stage = time.perf_counter(), "config"
    try:
        with quiet_transformers():
            cls = getattr(transformers, name)
            config = default_config(kind)
            stage = "shrink"
            config = shrunken(config)
            stage = "build"
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(config_of(cls, config)).parameters())
            if count > 30e6:
                raise ValueError(f"{count:,} parameters")
            model = pico_model(cls, config)
            stage = "forward"
            with torch.inference_mode():
                output = model(**dummy_inputs(model))
            first = output[0] if not hasattr(output, "logits") else output.logits
            stage = "finite"
            if not bool(first.isfinite().all()):
                raise ValueError("outputs are not finite")
    except Exception as error:
        return {"stage": stage, "error": f"{type(error).__name__}: {first_line(error)}"[:300]}
    return {"parameters": count, "seconds": round(time.perf_counter() - started, 2)}


def main(arguments: list[str] | None = None) -> int:
    """Print a line per class that fails, and counts; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mappings", nargs="*", default=list(MAPPINGS))
    parser.add_argument("--types", default="")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    only = set(filter(None, options.types.split(",")))
    results: dict[str, dict[str, Any]] = {}
    for mapping in options.mappings:
        tried = [pair for pair in classes(mapping) if not only or pair[0] in only]
        rows = {f"{kind} {name}": attempt(kind, name) for kind, name in tried}
        results[mapping] = rows
        for name, row in rows.items():
            if "error" in row or only:
                print(f"{mapping} {name}: {row.get('stage', 'ok')}: {row.get('error', row)}")
        works = sum("error" not in row for row in rows.values())
        print(f"{mapping}: {works} of {len(rows)}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
