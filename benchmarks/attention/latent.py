"""Loss, cached numbers and decode time of `latent_attention`."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import page, scoring
from benchmarks.scoring import WINDOW

if TYPE_CHECKING:
    from benchmarks.attention.__main__ import Options

TITLE = "Latent attention"
#: Rows of the table: settings of the pass.
JOBS: dict[str, dict[str, Any]] = {
    "75%": {"max_cache": 0.75, "repair": "none"},
    "75%, tuned": {"max_cache": 0.75},
    "50%": {"max_cache": 0.5, "repair": "none"},
    "50%, tuned": {"max_cache": 0.5},
}
#: Windows that are scored, cached tokens at which decode is timed, and single steps of a comparison.
WINDOWS, DEPTH, STEPS = 96, 768, 16


def rows(options: Options) -> list[str]:
    """Markdown lines: each share of the cache with and without tuning, and the whole cache as the proof of exactness."""
    import compress
    from compress.architectures.cache import cache_values
    from compress.checkpoint.open import open_checkpoint

    texts = scoring.HeldOut(options.model, options.heldout, windows=WINDOWS // 4 if options.quick else WINDOWS)
    data = scoring.calibration(options.train, 16 if options.quick else 64)
    spec = open_checkpoint(options.model).spec
    whole = cache_values(spec, 1) or 0
    table, scratch = [], Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        head = 2 * [whole // (2 * int(spec.structure.config["num_hidden_layers"]))]
        exact = compress.apply(
            "latent_attention", options.model, scratch / "exact", repair="none",
            **dict(zip(("keys", "values"), head, strict=True)), **{**data, "samples": 8},
        )  # fmt: skip
        ids = scoring.token_windows(options.model, options.heldout[0], 2)[0]
        differences = [difference(options.model, exact, ids, steps) for steps in (0, STEPS)]
        for name, settings in JOBS.items():
            shutil.rmtree(scratch / "out", ignore_errors=True)
            start = time.perf_counter()
            compress.apply("latent_attention", options.model, scratch / "out", **data, **settings)
            seconds = time.perf_counter() - start
            after = open_checkpoint(scratch / "out").spec
            config = after.structure.config
            cached, times = cache_values(after, 1) or 0, decode(options.model, scratch / "out")
            table.append([
                name, f"{cached / whole:.1%}", f"{config['qk_rope_head_dim']} + {config['kv_lora_rank']}",
                *texts.cells([texts.score(scratch / "out")]), f"{after.parameters / spec.parameters:.2f} ×",
                f"{times[1] / times[0]:.2f} ×", f"{seconds:.0f}",
            ])  # fmt: skip
            print(*table[-1], flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [
        f"{Path(options.model).name}, {data['samples']} × {WINDOW} calibration tokens. {texts.note()} "
        f"With all numbers kept, the largest difference of logits is {differences[0]:.1e} in one pass and {differences[1]:.1e} "
        f"over {STEPS} cached steps (float32). Decode: CPU seconds per token after {DEPTH} cached tokens, over the original's.",
        "",
        *page.table(
            ["cache", "cached", "key + latent", *scoring.COLUMNS, "weights", "decode, transformers", "s"], table
        ),
    ]


def difference(one: str | Path, other: str | Path, ids: Any, steps: int) -> float:
    """Largest difference of two models' logits, in one pass or over the last ``steps`` tokens one at a time; float32."""
    import torch

    from compress.models.loading import load_model

    results = []
    for folder in (one, other):
        model: Any = load_model(folder, dtype="float32")
        with torch.no_grad():
            if steps == 0:
                results.append(model(ids).logits)
                continue
            output = model(ids[:, :-steps], use_cache=True)
            logits = []
            for i in range(ids.shape[1] - steps, ids.shape[1]):
                output = model(ids[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
                logits.append(output.logits)
        results.append(torch.cat(logits, 1))
    return float((results[0] - results[1]).abs().max())


def decode(*folders: str | Path) -> list[float]:
    """CPU seconds per token of each model after `DEPTH` cached tokens, the median of alternating rounds; float32."""
    import torch

    from compress.models.loading import load_model

    ids = torch.randint(5, 1000, (1, DEPTH), generator=torch.Generator().manual_seed(0))
    models: list[Any] = [load_model(folder, dtype="float32") for folder in folders]
    samples: list[list[float]] = [[] for _ in folders]
    with torch.no_grad():
        caches = [model(ids, use_cache=True).past_key_values for model in models]
        for number in range(12):
            for model, cache, own in zip(models, caches, samples, strict=True):
                start = time.process_time()
                for _ in range(2):
                    model(ids[:, :1], past_key_values=cache, use_cache=True)
                if number > 1:
                    own.append((time.process_time() - start) / 2)
    return [statistics.median(own) for own in samples]
