"""One layer's attention by pattern: CPU seconds and peak memory beside full causal attention."""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TITLE = "Attention: one layer by pattern"

LENGTHS = (512, 1024, 2048, 4096, 8192)
WINDOW, SINKS, ROUNDS = 256, 4, 3


def rows(options: Any) -> list[str]:
    """Seconds of full causal attention, and ratios to it, measured side by side; peak memory of the longest prompt."""
    import torch

    torch.set_num_threads(1)
    config = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for length in lengths:
        cases = _cases(*_tensors(length, heads, groups, size))
        for name, taken in _side_by_side(cases).items():
            seconds.setdefault(name, []).append(taken)
        if length == lengths[-1]:
            peaks = {name: _peak(case) for name, case in cases.items()}
    lines = [
        f"One layer, {heads} heads on {groups}, {size} wide, float32, batch 1, one thread; CPU seconds, least of {ROUNDS} "
        "rounds in which the cases take turns. Full causal attention in seconds, all others as a multiple of it, in brackets "
        f"as a multiple of the window without logits. Windows of {WINDOW}; l is the root of the length. Peak: MiB beyond the "
        f"inputs at {lengths[-1]:,} tokens.",
        "",
        "| pattern | " + " | ".join(f"{length:,}" for length in lengths) + " | peak |",
        "| --- |" + " ---: |" * (len(lengths) + 1),
    ]
    for name, taken in seconds.items():
        cells = [
            f"{t:.4f} s" if name == "full" else f"{t / f:.2f}" for t, f in zip(taken, seconds["full"], strict=True)
        ]
        if name == "window, logits":
            cells = [f"{c} ({t / o:.2f})" for c, t, o in zip(cells, taken, seconds["window"], strict=True)]
        lines.append(f"| {_TITLES[name]} | " + " | ".join(cells) + f" | {peaks[name]:.0f} |")
    return [*lines, "", *_further(heads, groups, size), ""]


def _further(heads: int, groups: int, size: int) -> list[str]:
    """CPU milliseconds of a chunk, of padded rows, and with gradients, beside transformers' masks."""
    import torch

    lines = [
        f"The same layer in CPU milliseconds: transformers' SDPA with its masks, and ours. Windows of {WINDOW}.",
        "",
        "| | full, stock | full, ours | window, stock | window, ours |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for title, length, queries, padded, trained in (
        ("512 tokens after 3,584", 4096, 512, False, False),
        ("1,024 tokens, 100 of them padding", 1024, 1024, True, False),
        ("2,048 tokens, with gradients", 2048, 2048, False, True),
    ):
        query, key, value = _tensors(length, heads, groups, size)
        tensors = [x.requires_grad_(trained) for x in (query[:, :, length - queries :], key, value)]
        padding = torch.ones(1, length, dtype=torch.bool)
        padding[:, : 100 * padded] = False
        cases = [
            make(tensors, window, padding, padded, trained) for window in (None, WINDOW) for make in (_masked, _ours)
        ]
        taken = _side_by_side(dict(zip("abcd", cases, strict=True)), trained)
        lines.append(f"| {title} | " + " | ".join(f"{seconds * 1000:.1f}" for seconds in taken.values()) + " |")
    return lines


def _masked(tensors: list[Any], window: int | None, padding: Any, padded: bool, trained: bool) -> Callable[[], Any]:
    """Attention by transformers' function, with the mask that transformers makes for it, if any."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups = tensors[0].shape[1] // tensors[1].shape[1]  # type: ignore[assignment]

    def case() -> Any:
        length, queries = padding.shape[1], tensors[0].shape[2]
        far = torch.arange(length - queries, length)[:, None] - torch.arange(length)
        mask = (far >= 0) & (far < (window or length)) & padding[:, None, None]
        plain = window is None and not padded and queries == length
        out, _ = sdpa_attention_forward(module, *tensors, None if plain else mask)
        return torch.autograd.grad(out.sum(), tensors) if trained else out

    return case


def _ours(tensors: list[Any], window: int | None, padding: Any, padded: bool, trained: bool) -> Callable[[], Any]:
    """The same by our attention function."""
    import torch

    from compress.checkpoint.attention.patterns import LocalPattern, attention

    def case() -> Any:
        out = attention(*tensors, LocalPattern(window=window), padding=padding if padded else None)
        return torch.autograd.grad(out.sum(), tensors) if trained else out

    return case


_TITLES = {
    "full": "full causal (SDPA)",
    "full, logits": "full causal, logits of sinks",
    "stock": "stock window (SDPA with a mask of all pairs)",
    "window": "window",
    "window, sinks": f"window and {SINKS} first tokens",
    "window, logits": "window, logits of sinks",
    "window, whole": "window without masks, as on CUDA",
    "strided": "window l, every l-th token before",
    "strided_ends": "window l, the last of every l tokens",
    "strided_block": "own stretch of l, every l-th token before",
    "fixed": "own stretch of l, the last 4 of each earlier one",
    "chunks": "own stretch of the window's length",
}


def _tensors(length: int, heads: int, groups: int, size: int) -> tuple[Any, Any, Any]:
    """Queries, keys and values [1, heads, length, size] in the memory that projections give them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = ((1, length, n, size) for n in (heads, groups, groups))
    query, key, value = (torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes)
    return query, key, value


def _cases(query: Any, key: Any, value: Any) -> dict[str, Callable[[], Any]]:
    """Name ▶ function that computes the attention."""
    import torch

    from compress.checkpoint.attention.patterns import LocalPattern, attention

    length, root = query.shape[2], round(math.sqrt(query.shape[2]))
    sdpa: Any = torch.nn.functional.scaled_dot_product_attention
    logits = torch.linspace(-1, 1, query.shape[1])

    def stock() -> Any:
        where = torch.arange(length)
        far = where[:, None] - where
        repeated = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return sdpa(query, *repeated, attn_mask=(far >= 0) & (far < WINDOW))

    def ours(pattern: Any, **more: Any) -> Callable[[], Any]:
        return lambda: attention(query, key, value, pattern, **more)

    window = LocalPattern(window=WINDOW)
    return {
        "full": lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True),
        "full, logits": ours(LocalPattern(), logits=logits),
        "stock": stock,
        "window": ours(window),
        "window, sinks": ours(LocalPattern(window=WINDOW, sinks=SINKS)),
        "window, logits": ours(window, logits=logits),
        "window, whole": ours(window, masked=False),
        "strided": ours(LocalPattern(window=root, stride=root)),
        "strided_ends": ours(LocalPattern(window=root, last=1, period=root)),
        "strided_block": ours(LocalPattern(block=root, stride=root)),
        "fixed": ours(LocalPattern(block=root, last=4)),
        "chunks": ours(LocalPattern(block=WINDOW)),
    }


def _side_by_side(cases: dict[str, Callable[[], Any]], trained: bool = False) -> dict[str, float]:
    """Least CPU seconds of each case over some rounds."""
    import torch

    best = dict.fromkeys(cases, math.inf)
    with torch.inference_mode(not trained):
        for turn in range(ROUNDS + 1):
            for name, case in cases.items():
                start = time.process_time()
                case()
                if turn:
                    best[name] = min(best[name], time.process_time() - start)
    return best


def _peak(case: Callable[[], Any]) -> float:
    """MiB by which the resident memory grows at most during a call."""
    import torch

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest mark is now the present size
    before = _status("VmRSS")
    with torch.inference_mode():
        case()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """KiB of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
