"""Time to read a prompt: of one model, or of two that are in memory, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compress.models.loading import arguments_of
from compress.statistics import median_ratio

if TYPE_CHECKING:
    import torch

#: Rounds of both models in `prefill_ratio`: as many as fit the seconds, within these bounds.
SECONDS, FEWEST, MOST = 2.0, 5, 40


def prefill(model: Any, prompt: torch.Tensor) -> Any:
    """Output for token ids [samples, length], as generation asks for it: with a cache, and logits of the last token alone."""
    if not model.can_generate():
        return model(input_ids=prompt)
    last = {"logits_to_keep": 1} if "logits_to_keep" in arguments_of(model) else {}
    return model(input_ids=prompt, use_cache=True, **last)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of ``work`` until the device is done with it, and what it gives."""
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
    """Seconds that the candidate takes to read the prompt over those of the original: the ratio of the medians of rounds.

    Both are warm when the first round begins, and take turns in changing order.
    """
    import torch

    models = (original, candidate)
    samples: tuple[list[float], list[float]] = ([], [])

    def once(which: int) -> float:
        return timed(lambda: prefill(models[which], prompt), prompt.device)[0]

    with torch.inference_mode():
        for _ in range(2):  # the second warm-up tells how many rounds fit
            seconds = sum(once(which) for which in (0, 1))
        for number in range(int(max(FEWEST, min(MOST, SECONDS / max(seconds, 1e-6))))):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                samples[which].append(once(which))
    return median_ratio(*samples, confidence=0.95, bootstrap=1, seed=seed).value
