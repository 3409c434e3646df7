"""Windows by KV head and first tokens that stay, as the edit ``local``: quality, cache, decode, and texts without end.

Losses of windows and figures are kept in out/bench_heads, and a second call measures only what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.attention.quality import ROOT, Lab
from benchmarks.page import table

TITLE = "Attention: windows by KV head"

#: Calibration samples, tokens of the cache for decoding, and single steps that are timed.
SAMPLES, DEPTH, STEPS = 4, 8192, 12
#: Ends of the bins of positions in texts beyond the trained length, and texts.
ENDS, TEXTS = (64, 128, 256, 512, 1024, 2048), 4
#: Length of the reference model's training texts, whose config names more.
TRAINED = 256


def rows(options: Any) -> list[str]:
    """Quality, cache and decode of windows by block and by KV head; the loss by position for a model of short texts."""
    import torch

    torch.set_num_threads(1)
    lab = Heads(options)
    if lab.checkpoint.spec.structure.config["max_position_embeddings"] <= 1024:
        return streaming(lab)
    heads, depth = lab.heads, lab.depth
    kinds = [("layers", -(-depth // 4)), ("heads", -(-heads // 4))]
    shape, body = lab.shape, []
    for by, full in kinds:
        text, _, copy, loss, *_ = lab.measured(by, full)
        name = f"{full} of {heads} KV heads" if by == "heads" else f"{full} of {depth} blocks"
        shares = [f"{lab.share(by, full, length):.3f}" for length in (shape.length, DEPTH)]
        body.append([name, f"{text:.3f}", f"{copy:.3f}", f"{loss:.3f}", *shares, f"{lab.counted(by, full):,}"])
    text = (
        f"Windows of {shape.window} and 4 first tokens, chosen by {SAMPLES} x {shape.length} tokens, untrained. KL to the "
        f"original over the last {shape.scored} tokens of {shape.texts} texts, and on {shape.copies} passages that come again "
        f"(copy loss of the original: {lab.original[1]:.3f}). Cache: share of the original's, and numbers counted in the "
        f"cache of {shape.length} tokens, which are those planned."
    )
    head = ["full", "text KL", "copy KL", "copy loss", f"cache at {shape.length}", f"at {DEPTH:,}", "numbers"]
    return [text, "", *table(head, body), "", *decoding(lab, kinds)]


class Heads(Lab):
    """A model, its samples, and what was measured with edits."""

    def __init__(self, options: Any) -> None:
        from compress.architectures.model_map import model_map
        from compress.workspace import Workspace

        super().__init__(options)
        self.heads = self.depth * model_map(self.checkpoint.spec).kv_heads
        self.shape = replace(self.shape, calibration=SAMPLES)
        self.workspace = Workspace(ROOT / "out" / "bench_heads" / self.folder.name)

    def settings(self, by: str, full: int) -> Any:
        """Settings of the pass."""
        return self._settings(4, full, by=by)

    def edited(self, by: str, full: int) -> Any:
        """The checkpoint that the pass makes. Losses are measured by KV head; a block's is that of its heads together."""
        from compress.checkpoint.values import Derived
        from compress.passes.local_attention.compact import choose_heads, planned_edits
        from compress.passes.local_attention.divergence import window_losses
        from compress.sensitivity.windows import WindowLosses

        if by == "layers" and self._context("layers").workspace.read_json("window_losses") is None:
            heads = window_losses(self.checkpoint, self.settings("heads", 1), self._context("heads"))
            shape = (self.depth, self.heads // self.depth) * 2
            joint, noise = (part.view(shape).sum((1, 3)) for part in (heads.joint, heads.noise))
            self._context("layers").workspace.write_json("window_losses", WindowLosses(joint, [], [], noise).to_json())
        settings = self.settings(by, full)
        choice = choose_heads(self.checkpoint, settings, self._context(by))
        spec = planned_edits(self.checkpoint.spec, settings, choice)
        return Derived(self.checkpoint, spec, self.checkpoint.tensor)

    def loaded(self, by: str, full: int) -> Any:
        """Its model, in float32."""
        from compress.models.loading import load_checkpoint

        return load_checkpoint(self.edited(by, full), dtype="float32")

    def measured(self, by: str, full: int) -> list[float]:
        """Its figures."""
        values = self.workspace.cached(f"figures {by} {full}", lambda: self.figures(self.loaded(by, full)))
        print(by, full, *(f"{value:.4f}" for value in values[:4]), flush=True)
        return list(values)

    def share(self, by: str, full: int, length: int) -> float:
        """Planned numbers of its cache at a length, by the original's."""
        from compress.architectures.cache import cache_values

        after, before = (cache_values(c.spec, length) for c in (self.edited(by, full), self.checkpoint))
        assert after is not None
        assert before is not None
        return after / before

    def counted(self, by: str, full: int) -> int:
        """Numbers in its cache after a text, which must be those planned."""
        import torch

        from compress.architectures.cache import cache_values

        cache = filled(self.loaded(by, full), self.shape.length)
        held = (part for layer in cache.layers for part in vars(layer).values())
        numbers = sum(part.numel() for part in held if isinstance(part, torch.Tensor) and part.ndim == 4)
        assert numbers == cache_values(self.edited(by, full).spec, self.shape.length)
        return numbers


def filled(model: Any, length: int) -> Any:
    """A cache of random keys and values, as after a text of that length: no step's time depends on their values."""
    import torch
    from transformers import DynamicCache

    from compress.checkpoint.edits.local_cache import layer_of

    config, cache = model.config, DynamicCache(config=model.config)
    heads, width = config.num_key_value_heads, config.head_dim
    for block in model.model.layers:
        attention = block.self_attn
        if hasattr(attention, "windows"):
            layer_of(cache, attention.layer_idx, attention.windows)
        states = torch.randn(2, 1, heads, length, width)
        cache.update(states[0], states[1], attention.layer_idx)
    return cache


def decoding(lab: Heads, kinds: Sequence[tuple[str, int]]) -> list[str]:
    """Seconds per token at a depth, interleaved, and bytes of the cache."""
    import torch

    from compress.architectures.cache import cache_bytes
    from compress.models.loading import load_checkpoint

    names = ["all", *(f"{full} {'KV heads' if by == 'heads' else 'blocks'}" for by, full in kinds), "none"]
    made = [lab.checkpoint, *(lab.edited(by, full) for by, full in kinds), lab.edited("layers", 0)]
    times: dict[str, list[float]] = {name: [] for name in names}
    models = [load_checkpoint(checkpoint, dtype="float32") for checkpoint in made]
    for _ in range(2):
        for name, model in zip(names, models, strict=True):
            cache, token = filled(model, DEPTH), torch.ones(1, 1, dtype=torch.long)
            with torch.inference_mode():
                model(token, cache=cache)
                for _ in range(STEPS):
                    start = time.process_time()
                    model(token, cache=cache)
                    times[name].append(time.process_time() - start)
    middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    body = []
    for name, checkpoint in zip(names, made, strict=True):
        held = cache_bytes(checkpoint.spec, DEPTH, "float32") or 0
        body.append([name, f"{middle[name] * 1e3:.1f}", f"{middle[name] / middle['all']:.2f}", f"{held / 2**20:.1f}"])
    text = f"Decode with {DEPTH:,} cached tokens, float32, one thread, CPU time, median of {2 * STEPS} steps."
    return [text, "", *table(["full", "ms a token", "of the original's", "cache, MiB"], body), ""]


def streaming(lab: Heads) -> list[str]:
    """Loss by position of texts beyond the trained length, all heads local."""
    import torch

    from compress.checkpoint.edits.local import attentions, localised
    from compress.checkpoint.values import Derived
    from compress.models.loading import load_checkpoint

    ids = lab._windows(lab.options.heldout[-1:], TEXTS, ENDS[-1], 2).ids
    window = TRAINED // 2
    plain = {"heads": lab.heads // lab.depth, "full": (), "pattern": "window", "window": window}
    kinds: list[tuple[str, dict[str, int]]] = [
        ("full attention", {}),
        ("window, 4 first tokens, turned", {"sinks": 4, "positions": TRAINED}),
        ("window, 4 first tokens, not turned", {"sinks": 4, "positions": 1 << 30}),
        ("window alone", {"sinks": 0, "positions": TRAINED}),
    ]
    body = []
    for name, values in kinds:
        spec = lab.checkpoint.spec
        if values:
            spec = localised(spec, {module: {**plain, **values} for module in attentions(spec)})
        model = load_checkpoint(Derived(lab.checkpoint, spec, lab.checkpoint.tensor), dtype="float32")
        with torch.inference_mode():
            logits = model(ids[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        starts = (0, *ENDS[:-1])
        body.append([name, *(f"{losses[:, a:b].mean():.3f}" for a, b in zip(starts, ENDS, strict=True))])
    text = (
        f"Loss by position, {TEXTS} texts of {ENDS[-1]:,} tokens; the model is trained on texts of {TRAINED}. "
        f"Windows of {window} in all heads."
    )
    return [text, "", *table(["", *(f"to {end:,}" for end in ENDS)], body), ""]
