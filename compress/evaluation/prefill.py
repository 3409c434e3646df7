"""Prefill and decode of one model, and ratios of times for two models in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compress.models.classes import arguments_of, cache_argument
from compress.statistics import median_ratio

if TYPE_CHECKING:
    import torch

#: Rounds of a ratio: as many as fit into ``SECONDS``, within these bounds.
SECONDS, FEWEST, MOST = 2.0, 5, 40


def prefill(model: Any, prompt: torch.Tensor, chunk: int | None = None) -> Any:
    """Output for token ids [samples, length], as generation calls the model: with a cache and logits of the last token only.

    Args:
        chunk: tokens that are read at once, each chunk with the cache of those before it; None for the whole prompt.
    """
    import torch

    if not model.can_generate():
        return model(input_ids=prompt)
    last = {"logits_to_keep": 1} if "logits_to_keep" in arguments_of(model) else {}
    output: Any = None
    for piece in (prompt,) if chunk is None else torch.split(prompt, chunk, 1):
        output = model(input_ids=piece, use_cache=True, **last, **cached(model, output))
    return output


def cached(model: Any, output: Any) -> dict[str, Any]:
    """The argument that hands the cache of an output on to the next call; empty for an output of None."""
    name = cache_argument(model)
    return {} if output is None or name is None else {name: getattr(output, name)}


def generate(model: Any, output: Any, count: int) -> Any:
    """Generate ``count`` tokens greedily with the cache of an output, one at a time. Returns the last output."""
    for _ in range(count):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, **cached(model, output))
    return output


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has finished ``work``, and its result."""
    import torch

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def prefill_ratio(original: Any, candidate: Any, prompt: torch.Tensor, *, seed: int = 0) -> float:
    """Ratio of the median prefill times, candidate over original, after a warm-up, in alternating order."""
    return _ratio(lambda: prefill(original, prompt), lambda: prefill(candidate, prompt), prompt.device, seed)


def decode_ratio(original: Any, candidate: Any, prompt: torch.Tensor, *, seed: int = 0) -> float:
    """Ratio of the median times of one cached step after a prompt, candidate over original, in alternating order."""
    return _ratio(_step(original, prompt), _step(candidate, prompt), prompt.device, seed)


def _step(model: Any, prompt: torch.Tensor) -> Callable[[], Any]:
    """A function that runs the model for one more token after the prompt, whose keys and values are cached."""
    import torch

    with torch.inference_mode():
        output = model(input_ids=prompt, use_cache=True)
    return lambda: model(input_ids=prompt[:, :1], use_cache=True, **cached(model, output))


def _ratio(original: Callable[[], Any], candidate: Callable[[], Any], device: torch.device, seed: int) -> float:
    """Ratio of the median times of two works, after a warm-up, in alternating order."""
    import torch

    works = (original, candidate)
    samples: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(2):  # the second warm-up tells how many rounds fit
            seconds = sum(timed(work, device)[0] for work in works)
        for number in range(int(max(FEWEST, min(MOST, SECONDS / max(seconds, 1e-6))))):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                samples[which].append(timed(works[which], device)[0])
    return median_ratio(*samples, confidence=0.95, bootstrap=1, seed=seed).value
