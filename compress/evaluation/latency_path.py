"""Cost of one prompt of a given length in this process: time, memory beyond the weights, numbers in the cache.

A path is a way to read the prompt: ``stock`` (as `from_pretrained` gives it), ``compress_local`` (the attention function of
this package), ``chunks`` (``prefill_chunk_size`` of ``generation_config.json``).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress import architectures
from compress.evaluation.prefill import cached, generate, prefill, timed
from compress.memory import give_back_freed, peak_memory, reset_peak, resident_memory
from compress.models.attention import implementation

if TYPE_CHECKING:
    import torch

    from compress.spec.spec import Spec

STOCK, LOCAL, CHUNKS = "stock", "compress_local", "chunks"


def paths(model: Any, spec: Spec) -> dict[str, Any]:
    """The ``paths`` of a model: the stock one, and those that use windows of its attention, or spare it eager attention.

    Also ``table``: the rows of its table of positions; None where positions are computed.
    """
    record = architectures.find(model.config.to_dict())
    table = record is None or record.position_table is not None
    names = [STOCK]
    if implementation("auto", spec, type(model), model.config) == LOCAL:
        names.append(LOCAL)
    if _has_windows(model) and _chunk(model):
        names.append(CHUNKS)
    return {"paths": names, "table": getattr(model.config, "max_position_embeddings", None) if table else None}


def _has_windows(model: Any) -> bool:
    """Whether any layer of a fresh cache forgets tokens."""
    from transformers import DynamicCache

    return model.can_generate() and any(DynamicCache(config=model.config).is_sliding)


def _chunk(model: Any) -> int | None:
    config = getattr(model, "generation_config", None)
    size: int | None = getattr(config, "prefill_chunk_size", None)
    return size


def measure(model: Any, command: Mapping[str, Any]) -> dict[str, Any]:
    """Read one prompt, and generate after it.

    Args:
        command: ``length`` tokens of the prompt, ``generated`` tokens (0 for none), ``path``, ``vocabulary``, ``seed``, and
            ``depth``: tokens of the prompt before the generated ones, where the table of positions ends before them.

    Returns:
        ``prefill`` and ``decode`` (per token; None without one): wall seconds, and on a CPU the process's CPU seconds.
        ``cache``: ``values`` and ``bytes`` of the tensors cached after the prompt; None without a cache. ``peak``: bytes beyond
        those held before. ``resident``: bytes of the process, and on a GPU ``free`` ones of the device.
    """
    import torch

    path, device = command["path"], model.device
    before = model.config._attn_implementation
    if path == LOCAL:
        model.set_attn_implementation(LOCAL)
    generator = torch.Generator().manual_seed(command["seed"])
    prompt = torch.randint(command["vocabulary"], (1, command["length"]), generator=generator).to(device)
    gc.collect(1)  # what earlier prompts left; a full collection takes longer than a short prompt
    held = _reset_peak(device)
    try:
        with torch.inference_mode():
            answer = _read(model, prompt, command)
    finally:
        if path == LOCAL:
            model.set_attn_implementation(before)
    answer["peak"] = max(_peak(device) - held, 0)
    answer["resident"] = resident_memory()
    answer["free"] = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return answer


def _read(model: Any, prompt: torch.Tensor, command: Mapping[str, Any]) -> dict[str, Any]:
    """Read the prompt and generate; the first entries of `measure`'s answer."""
    chunk = _chunk(model) if command["path"] == CHUNKS else None
    read, output = _clocked(lambda: prefill(model, prompt, chunk), model.device)
    answer: dict[str, Any] = {"prefill": read, "decode": None, "cache": _cache(model, output)}
    if count := command["generated"]:
        if command["depth"] < command["length"]:
            output = prefill(model, prompt[:, : command["depth"]], chunk)
        spent, _ = _clocked(lambda: generate(model, output, count), model.device)
        answer["decode"] = [seconds / count for seconds in spent]
    return answer


def _clocked(work: Callable[[], Any], device: torch.device) -> tuple[list[float], Any]:
    start = time.process_time()
    wall, result = timed(work, device)
    return [wall, time.process_time() - start] if device.type == "cpu" else [wall], result


def _reset_peak(device: torch.device) -> int:
    """Bytes held now, from which the peak starts."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back_freed()
    held = resident_memory()
    return held if reset_peak() else peak_memory()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def _cache(model: Any, output: Any) -> dict[str, int] | None:
    """Numbers and bytes of the tensors that an output's cache holds."""
    cache = next(iter(cached(model, output).values()), None)
    if cache is None or not hasattr(cache, "layers"):
        return None
    tensors = {id(tensor): tensor for layer in cache.layers for tensor in _tensors(vars(layer))}.values()
    return {
        "values": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of three axes or more inside lists and mappings; smaller ones hold positions and lengths."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.ndim >= 3:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
