"""One trial, in a process of its own: a recipe's passes, and the divergence of its result on samples that no pass saw.

``python -m compress.fits.trial JOB.json RESULT.json``
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from compress.errors import PassError
from compress.progress import SilentProgress

#: Samples of a forward pass.
_AT_ONCE = 2


def main(job: Path, result: Path) -> None:
    """Run the job's recipe; a refusal of a pass is a result, every other end has none."""
    from compress.files import write_atomically

    threading.Thread(target=_end_with_parent, daemon=True).start()
    asked = json.loads(job.read_text())
    start = time.perf_counter()
    try:
        measured = _tried(asked)
    except PassError as error:
        measured = {"refused": str(error)}
    measured["seconds"] = round(time.perf_counter() - start, 1)
    write_atomically(result, json.dumps(measured).encode())


def _end_with_parent() -> None:
    """End this process when the search that holds its stdin is gone."""
    sys.stdin.read()
    os._exit(1)


def _tried(asked: dict[str, Any]) -> dict[str, Any]:
    from compress.pipeline.run import run
    from compress.recipe import recipe_from_mapping

    recipe = recipe_from_mapping(asked["recipe"])
    shared = None if asked["shared"] is None else Path(asked["shared"])
    done = run(recipe, shared=shared, progress=SilentProgress())
    size = done.report["result"]["size"]["bytes"]
    measured = {"bytes": size, "divergences": divergences(asked, done.checkpoint)}
    shutil.rmtree(done.checkpoint)
    shutil.rmtree(done.report["run_folder"])
    return measured


def divergences(asked: dict[str, Any], checkpoint: Path) -> list[float]:
    """Mean KL divergence of the original's predictions from the checkpoint's for each held-out sample, nats per token."""
    import torch
    from safetensors.torch import load_file

    from compress.models.loading import load_model

    ids = load_file(asked["samples"])["held_out"]
    options = {k: asked["recipe"].get(k, False) for k in ("trust_remote_code", "ignore_auto_map")}
    device = asked["device"]
    models = [
        load_model(each, dtype="float32", device=device, **options) for each in (asked["recipe"]["model"], checkpoint)
    ]
    result: list[float] = []
    with torch.inference_mode():
        for rows in torch.split(ids, _AT_ONCE):
            first, second = (m(input_ids=rows.to(device)).logits.float().log_softmax(-1) for m in models)
            each = (first.exp() * (first - second)).sum(-1).mean(-1)
            result += each.tolist()
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
