"""Process that times one model: ``python -m compress.evaluation.latency_worker SETTINGS``.

It reads commands (``warm``, ``round``, ``memory``, ``paths``, ``length``) as lines of JSON on stdin, answers each by one line
on stdout, and ends when stdin closes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Load the model, describe it on stdout, then answer commands."""
    out = os.fdopen(os.dup(1), "w")  # prints of libraries must not mix with the answers
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    try:
        model, before = _load(settings)
    except Exception as error:
        _say(out, {"error": str(error) or type(error).__name__, "resources": "memory" in str(error)})
        return
    if model.main_input_name != "input_ids":
        reads = f"{type(model).__name__} reads `{model.main_input_name}`"
        _say(out, {"error": f"latency is measured on token ids, and {reads}"})
        return
    config = model.config
    if config.is_encoder_decoder:
        _say(out, {"error": f"latency is measured on one text, and {type(model).__name__} reads two"})
        return
    _say(
        out,
        {
            "positions": getattr(config, "max_position_embeddings", None),
            "vocabulary": model.get_input_embeddings().weight.shape[0],
            "generates": model.can_generate(),
        },
    )
    for line in sys.stdin:
        command = json.loads(line)
        try:
            _say(out, _answer(model, before, command, settings))
        except Exception as error:
            _say(out, {"error": f"{type(error).__name__}: {error}", "resources": "memory" in str(error)})


def _say(out: Any, data: dict[str, Any]) -> None:
    out.write(json.dumps(data) + "\n")
    out.flush()


def _load(settings: dict[str, Any]) -> tuple[Any, int]:
    """The model, and the resident bytes of the process before loading."""
    import torch

    from compress.checkpoint.sidecars import with_links
    from compress.memory import peak_memory, reset_peak
    from compress.models.loading import load_model

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.ones(64, 64) @ torch.ones(64, 64)  # load the maths library
    reset_peak()
    before = peak_memory()
    model = load_model(
        with_links(settings["folder"], settings["allow_links"]),
        dtype=settings["dtype"],
        device=settings["device"],
        trust_remote_code=settings["trust_remote_code"],
        ignore_auto_map=settings["ignore_auto_map"],
        quantized_activations=False,  # emulation takes time that no runtime needs
    )
    if settings["device"].startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(model.device)
    else:
        reset_peak()
    return model, before


def _answer(model: Any, before: int, command: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from compress.evaluation.prefill import generate, prefill, timed
    from compress.memory import peak_memory

    if command["do"] in ("paths", "length"):
        from compress.checkpoint.open import open_checkpoint
        from compress.checkpoint.sidecars import with_links
        from compress.evaluation import latency_path

        if command["do"] == "length":
            return latency_path.measure(model, command)
        folder = with_links(settings["folder"], settings["allow_links"])
        code = {key: settings[key] for key in ("trust_remote_code", "ignore_auto_map")}
        return latency_path.paths(model, open_checkpoint(folder, **code).spec)
    cuda = model.device.type == "cuda"
    if command["do"] == "memory":
        if cuda:
            return {"bytes": torch.cuda.max_memory_allocated(model.device)}
        return {"bytes": max(peak_memory() - before, 0)}
    generator = torch.Generator().manual_seed(command["seed"])
    prompt = torch.randint(command["vocabulary"], (1, command["prompt"]), generator=generator).to(model.device)

    with torch.inference_mode():
        if not command["decode"]:
            read, _ = timed(lambda: model(input_ids=prompt), model.device)
            return {"prefill": read, "decode": None, "seconds": read}
        read, output = timed(lambda: prefill(model, prompt), model.device)
        decode, _ = timed(lambda: generate(model, output, command["generated"]), model.device)
    return {"prefill": read, "decode": decode / command["generated"], "seconds": read + decode}


if __name__ == "__main__":
    main()
