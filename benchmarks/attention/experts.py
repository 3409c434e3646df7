"""Half of the MLP for each token: experts carved out of it, beside neurons pruned from it, before and after distillation.

Both ways are tuned block by block on the same samples and distilled under the original with the same tokens and settings.
Scores are those of benchmarks/scoring.py. Times are of 512 tokens at once on one thread, CPU seconds, each way in turn with
the dense one; the smallest of the repeats counts. Stock transformers runs experts by grouped products (``grouped_mm``, its
default) or one after the other (``eager``).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import page, scoring

if TYPE_CHECKING:
    from benchmarks.attention.__main__ import Options

TITLE = "Experts carved out of dense MLPs"
PROMPT, SAMPLES, TOKENS = 512, 128, 2_000_000
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "MLP pruned to 50%": ("prune_structured", {"mlp": 0.5}),
    "carved, 50% active": ("carve_experts", {}),
}
#: Hidden width, neurons, experts, experts of a token; a quarter of the neurons is shared, and half are active.
SHAPES = ((256, 704, 16, 5), (576, 1536, 8, 3), (576, 1536, 16, 5), (576, 1536, 32, 10), (2048, 8192, 16, 5))
IMPLEMENTATIONS = ("eager", "grouped_mm")


def rows(options: Options) -> list[str]:
    """Both ways on the model, and the times of their MLPs."""
    scratch = Path(tempfile.mkdtemp(prefix="compress-bench-"))
    try:
        return [*quality(options, scratch), "", *mlp_speed(3 if options.quick else 9)]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def quality(options: Options, scratch: Path) -> list[str]:
    """Held-out loss of each way before and after distillation, file, neurons of a token, and time of a prompt."""
    import compress

    texts, tokens = scoring.HeldOut(options.model, options.heldout), 40_000 if options.quick else TOKENS
    data = scoring.calibration(options.train, 16 if options.quick else SAMPLES)
    size = _bytes(Path(options.model))
    table = []
    for way, (name, settings) in WAYS.items():
        folder, trained = scratch / name, scratch / f"{name}-distilled"
        compress.apply(name, options.model, folder, **settings, **data)
        before = texts.cells([texts.score(folder)])
        compress.apply(
            "distill", folder, trained, data=[options.train], length=256, document_separator="<|doc|>",
            teacher=options.model, tokens=tokens, allow_noop=options.quick,
        )  # fmt: skip
        speed = prompt_speed(options.model, str(folder), 3 if options.quick else 15)
        table.append([way, f"{_bytes(folder) / size:.3f} ×", *before, speed])
        table.append(["… distilled", "", *texts.cells([texts.score(trained)]), ""])
        print(*table[-2:], flush=True)
    return [
        f"{Path(options.model).name}; then {tokens:,} tokens of {Path(options.train).name}, with the defaults of `distill`. "
        f"{texts.note()}",
        "",
        *page.table(["", "file", *scoring.COLUMNS, f"time of {PROMPT} tokens"], table),
    ]


def prompt_speed(before: str, after: str, repeats: int) -> str:
    """Time of a prompt over the original's; with experts by each implementation."""
    from compress.models.loading import load_model

    dense = load_model(before, dtype="float32")
    model = load_model(after, dtype="float32")
    if not hasattr(model.model.layers[0].mlp, "experts"):
        return f"{_ratio(_prompt(dense), _prompt(model), repeats):.2f} ×"
    ratios = []
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        ratios.append(f"{_ratio(_prompt(dense), _prompt(model), repeats):.2f} × {implementation}")
    return ", ".join(ratios)


def mlp_speed(repeats: int) -> list[str]:
    """Time of one MLP with random weights, carved and pruned, over the dense one's."""
    table = []
    for hidden, neurons, experts, active in SHAPES:
        dense = _mlp(hidden, neurons)
        cells = [_ratio(dense, _experts(hidden, neurons, experts, active, name), repeats) for name in IMPLEMENTATIONS]
        cells.append(_ratio(dense, _mlp(hidden, neurons // 2), repeats))
        table.append([f"{hidden:,} × {neurons:,}", f"{active} of {experts}", *(f"{cell:.2f} ×" for cell in cells)])
        print(*table[-1], flush=True)
    return [
        f"One MLP of stock transformers with random weights, float32, {PROMPT} tokens at once:",
        "",
        *page.table(["hidden × neurons", "experts", *(f"carved, {n}" for n in IMPLEMENTATIONS), "half pruned"], table),
    ]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _ratio(dense: Callable[[], Any], other: Callable[[], Any], repeats: int) -> float:
    """Least CPU seconds of one call over those of the dense one; one thread, calls in turn."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(repeats + 1):
            for place, call in enumerate((dense, other)):
                start = time.process_time()
                call()
                seconds[place].append(time.process_time() - start)
    torch.set_num_threads(threads)
    return min(seconds[1][1:]) / min(seconds[0][1:])


def _prompt(model: Any) -> Callable[[], Any]:
    import torch

    ids = torch.randint(0, int(model.config.vocab_size), (1, PROMPT), generator=torch.Generator().manual_seed(0))
    return lambda: model(input_ids=ids, logits_to_keep=1)


def _inputs(hidden: int) -> Any:
    import torch

    return torch.randn(1, PROMPT, hidden, generator=torch.Generator().manual_seed(0))


def _mlp(hidden: int, neurons: int) -> Callable[[], Any]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    module, x = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=neurons)), _inputs(hidden)
    return lambda: module(x)


def _experts(hidden: int, neurons: int, experts: int, active: int, implementation: str) -> Callable[[], Any]:
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeModel

    size = 8 * round(neurons * 0.75 / experts / 8)
    config = Qwen2MoeConfig(
        hidden_size=hidden, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=8,
        num_experts=experts, num_experts_per_tok=active, moe_intermediate_size=size, norm_topk_prob=True,
        shared_expert_intermediate_size=neurons - experts * size,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen2MoeModel(config)
    model.set_experts_implementation(implementation)
    module = model.layers[0].mlp
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = _inputs(hidden)
    return lambda: module(x)
