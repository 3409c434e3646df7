"""Quality of windows: which blocks stay full, what stands for the first tokens, and what repair gives back.

Every figure is kept in out/bench_quality, and a second call measures only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.page import table

TITLE = "Attention: quality of windows"

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Shape:
    """Sizes of the job.

    Attributes:
        length: tokens of a sample. window: tokens that a block sees. passage, gap: of the samples that copy.
        scored: tokens at the end of a text that are scored. calibration, texts, copies: number of samples. tuning: those that
            weights are tuned on.
    """

    length: int
    window: int
    passage: int
    gap: int
    scored: int
    calibration: int
    texts: int
    copies: int
    tuning: int


#: For models trained on long texts, and for those of the test suite, which know 256 tokens.
LONG, SHORT = Shape(640, 128, 160, 320, 339, 12, 2, 2, 128), Shape(256, 44, 64, 128, 128, 32, 12, 12, 128)


def rows(options: Any) -> list[str]:
    """KL to the original and loss on held-out text and on passages that come again, by choice, sinks and repair."""
    import torch

    torch.set_num_threads(1)
    lab = Lab(options)
    depth, half, quarter = lab.depth, lab.depth // 2, -(-lab.depth // 4)
    shape = lab.shape
    lines = [
        f"Windows of {shape.window}, samples of {shape.length} tokens, {shape.calibration} of them for calibration. Text: "
        f"KL to the original and loss over the last {shape.scored} tokens of {shape.texts} held-out samples. Copy: over "
        f"{shape.passage} tokens that come again after {shape.gap} others, {shape.copies} samples. Loss of the original: "
        + " and ".join(f"{value:.3f}" for value in lab.original)
        + f". Nothing is trained unless a row says so; weights on {shape.tuning} samples.",
        "",
    ]
    body = []
    for title, sinks in (("4 tokens", 4), ("logits", "learned"), ("none", 0)):
        body.append(lab.row("no block", title, lab.fixed(sinks, [])))
        if sinks == 0:
            body.append(lab.row(f"{half} blocks, chosen", title, lab.chosen(sinks, half)))
            continue
        for step, count in ((4, quarter), (2, half)):
            for start in range(step):
                full = list(range(start, depth, step))
                body.append(
                    lab.row(f"every {ORDINALS[step]} from {start} ({len(full)})", title, lab.fixed(sinks, full))
                )
            body.append(lab.row(f"**{count} blocks, chosen**", title, lab.chosen(sinks, count)))
    for count in (quarter, half):
        for repair in REPAIRS:
            body.append(lab.row(f"{count} blocks, chosen", f"logits, {REPAIRS[repair]}", lab.repaired(count, repair)))
    lines += table(["full", "sinks", "text KL", "text loss", "copy KL", "copy loss"], body)
    lines += ["", lab.singles(), ""]
    return lines


ORDINALS = {2: "2nd", 4: "4th"}
REPAIRS = {"sinks": "`sink_steps: 32`", "weights": "`tune_epochs: 2`"}


class Lab:
    """A model, its samples, and what was measured."""

    def __init__(self, options: Any) -> None:
        from compress.checkpoint.open import open_checkpoint
        from compress.workspace import Workspace

        self.options, self.folder = options, Path(options.model)
        self.checkpoint = open_checkpoint(self.folder)
        config = self.checkpoint.spec.structure.config
        self.depth = int(config["num_hidden_layers"])
        self.shape = LONG if config["max_position_embeddings"] > 1024 else SHORT
        if options.quick:
            self.shape = replace(self.shape, calibration=8, texts=1, copies=1, tuning=8)
        name = self.folder.name + "-quick" * options.quick
        self.workspace = Workspace(ROOT / "out" / "bench_quality" / name)

    # ---- samples ----

    def _windows(self, files: Sequence[str], samples: int, length: int, seed: int) -> Any:
        from compress.data.documents import read_documents
        from compress.data.sampling import sample_windows
        from compress.models.processors import load_tokenizer

        tokenizer = load_tokenizer(self.folder)
        return sample_windows(tokenizer, read_documents(files, None), samples, length, seed)

    @cached_property
    def calibration(self) -> Any:
        """Samples for choice and sinks."""
        return self._windows([self.options.train], self.shape.calibration, self.shape.length, 0)

    @cached_property
    def tuning(self) -> Any:
        """Samples to tune weights on."""
        return self._windows([self.options.train], self.shape.tuning, self.shape.length, 0)

    @cached_property
    def held_out(self) -> tuple[list[Any], list[Any]]:
        """Texts, and samples whose passage comes again, each [1, length]."""
        import torch

        shape = self.shape
        ids = self._windows(self.options.heldout[-1:], shape.texts + shape.copies, shape.length, 1).ids
        texts, others = list(ids[: shape.texts, None]), ids[shape.texts :, None, : shape.passage + shape.gap]
        return texts, [torch.cat([sample, sample[:, : shape.passage]], 1) for sample in others]

    # ---- the pass ----

    def _context(self, name: str) -> Any:
        from compress.passes.base import Context
        from compress.progress import SilentProgress

        return Context(
            self.checkpoint,
            "cpu",
            "float32",
            0,
            None,
            lambda _: self.calibration,
            SilentProgress(),
            self.workspace.folder(name),
        )

    def _settings(self, sinks: int | str, full: int | Sequence[int], **more: Any) -> Any:
        from compress.passes.local_attention.settings import LocalAttentionSettings

        return LocalAttentionSettings.model_validate(
            {"window": self.shape.window, "full": full, "sinks": sinks, **more}
        )

    def measure(self) -> None:
        """The losses of windows under each kind of sinks, in one pass; the pass then reads them."""
        from compress.blockwise.executor import BlockExecutor
        from compress.blockwise.inputs import Inputs
        from compress.passes.local_attention.divergence import repeated
        from compress.progress import SilentProgress
        from compress.sensitivity.attention import Sight
        from compress.sensitivity.windows import WindowLosses, window_losses

        window = self.shape.window
        kinds = {"learned": Sight(window, logits=True), 4: Sight(window, 4), 0: Sight(window)}
        places = [self._context(f"sinks {kind}").workspace for kind in kinds]
        if all(place.read_json("window_losses") is not None for place in places):
            return
        settings = self._settings("learned", 1)
        read = repeated(settings, self._context("samples"))
        executor = BlockExecutor(self.checkpoint, Inputs(read.batches.values), dtype="float32", device="cpu")
        executor.learn_calls()
        work = self.workspace.folder("work")
        losses = window_losses(
            executor,
            list(kinds.values()),
            by="layers",
            weights=read.weights(settings.repeat_weight),
            workspace=work,
            progress=SilentProgress(),
        )
        for at, place in enumerate(places):
            joint, noise = (part[at :: len(kinds), at :: len(kinds)] for part in (losses.joint, losses.noise))
            one = WindowLosses(joint, [[b[at]] for b in losses.logits], losses.values, noise)
            place.write_json("window_losses", one.to_json())

    def windows(self, sinks: int | str, full: int | Sequence[int]) -> Any:
        """Blocks and logits as the pass chooses them."""
        from compress.passes.local_attention.divergence import choose

        self.measure()
        return choose(self.checkpoint, self._settings(sinks, full), self._context(f"sinks {sinks}"))

    # ---- figures ----

    @cached_property
    def model(self) -> Any:
        """The original in float32, with an attention function that takes windows."""
        from compress.models.loading import load_checkpoint

        model = load_checkpoint(self.checkpoint, dtype="float32")
        register()
        model.set_attn_implementation(NAME)
        return model

    @cached_property
    def references(self) -> list[Any]:
        """The original's predictions of all samples."""
        return [_predictions(self.model, ids) for part in self.held_out for ids in part]

    def figures(self, model: Any) -> list[float]:
        """KL and loss on texts, then on copies; and KL over all tokens of both."""
        result, everything, references = [], [], iter(self.references)
        for part, scored in zip(self.held_out, (self.shape.scored, self.shape.passage - 1), strict=True):
            kl, loss = 0.0, 0.0
            for ids in part:
                after, before = _predictions(model, ids), next(references)
                distance = (before.exp() * (before - after)).sum(-1)
                kl += float(distance[-scored:].mean()) / len(part)
                loss -= float(after.gather(1, ids[0, 1:, None])[-scored:].mean()) / len(part)
                everything.append(float(distance.mean()))
            result += [kl, loss]
        return [*result, *everything]

    @property
    def original(self) -> tuple[float, float]:
        """Loss of the original on texts and copies."""
        _, text, _, copy, *_ = self.workspace.cached("original", lambda: self.figures(self.model))
        return text, copy

    def masked(self, name: str, chosen: Any, first: int) -> list[float]:
        """Figures of the original under windows."""

        def measure() -> list[float]:
            assert self.references  # computed here, without windows
            with under(chosen.windows, first, chosen.sinks, chosen.values):
                return self.figures(self.model)

        return list(self.workspace.cached(name, measure))

    def fixed(self, sinks: int | str, full: Sequence[int]) -> list[float]:
        """Figures where those blocks are full."""
        name = "fixed " + "-".join(map(str, [sinks, *full]))
        if (known := self.workspace.read_json(name)) is not None:
            return list(known)
        chosen = self.windows(sinks, list(full))
        return self.masked(name, chosen, 0 if sinks == "learned" else int(sinks))

    def chosen(self, sinks: int | str, count: int) -> list[float]:
        """Figures where the pass chooses so many blocks."""
        chosen = self.windows(sinks, count)
        print(sinks, count, "full:", *chosen.full, flush=True)
        return self.masked(f"chosen {sinks} {count}", chosen, 0 if sinks == "learned" else int(sinks))

    def repaired(self, count: int, repair: str) -> list[float]:
        """Figures of the model that the pass makes, in its stock class."""

        def measure() -> list[float]:
            from compress.models.loading import load_checkpoint
            from compress.passes.local_attention.repair import repaired
            from compress.passes.local_attention.stock import with_windows

            more = {"sink_steps": 32} if repair == "sinks" else {"tune_epochs": 2}
            settings, chosen = self._settings("learned", count, **more), self.windows("learned", count)
            changed = with_windows(self.checkpoint, settings, chosen)
            context = self._context(f"repair {repair} {count}")
            if repair == "weights":
                context = replace(context, data=lambda _: self.tuning)
            changed = repaired(self.checkpoint, changed, chosen, settings, context)
            return self.figures(load_checkpoint(changed, dtype="float32"))

        return list(self.workspace.cached(f"repaired {repair} {count}", measure))

    def row(self, full: str, sinks: str, values: Sequence[float]) -> list[str]:
        """A row of the table."""
        print(full, sinks, *(f"{value:.4f}" for value in values), flush=True)
        return [full, sinks, *(f"{value:.3f}" for value in values[:4])]

    def singles(self) -> str:
        """Rank correlation of the predicted and the measured KL of single blocks, logits in place."""
        import torch

        every = self.windows("learned", [])

        def measure() -> list[float]:
            texts, copies = self.held_out
            originals = self.references  # computed here, without windows
            picked = [(texts[0], 0, 0.75), (copies[0], len(texts), 0.25)]
            result = []
            for block in range(self.depth):
                windows = [self.shape.window if i == block else None for i in range(self.depth)]
                total = 0.0
                with under(windows, 0, every.sinks, every.values):
                    for ids, at, weight in picked:
                        before, after = originals[at], _predictions(self.model, ids)
                        total += weight * float((before.exp() * (before - after)).sum(-1).mean())
                result.append(total)
            return result

        pairs = torch.tensor([every.losses, self.workspace.cached("singles", measure)])
        ranks = pairs.argsort(1).argsort(1).double()
        return (
            f"Window in one block alone: rank correlation (Spearman) between its predicted loss and its KL on held-out samples "
            f"{float(torch.corrcoef(ranks)[0, 1]):.2f}, over {self.depth} blocks."
        )


def _predictions(model: Any, ids: Any) -> Any:
    """Log-probabilities of the next token, [length - 1, vocabulary]."""
    import torch

    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)


# ---- the original under windows, by dense masks ----

NAME = "windows_by_masks"
_windows: list[int | None] = []
_first = 0
_logits: Mapping[int, Any] = {}
_values: Mapping[int, Any] = {}


@contextmanager
def under(
    windows: Sequence[int | None], first: int, logits: Mapping[int, Any], values: Mapping[int, Any]
) -> Iterator[None]:
    """Within, blocks of a model with this attention function see windows and the first tokens, and have sinks."""
    global _windows, _first, _logits, _values
    _windows, _first, _logits, _values = list(windows), first, logits, values
    try:
        yield
    finally:
        _windows, _first, _logits, _values = [], 0, {}, {}


def register() -> None:
    """Make the attention function known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any) -> Any:
    """Eager attention of one sample under the block's window."""
    import torch

    block = module.layer_idx
    window = _windows[block] if _windows else None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    at = torch.arange(query.shape[2])
    ago = at[:, None] - at
    seen = ago >= 0
    if window is not None:
        seen &= (ago < window) | (at < _first)
    scores = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    output = scores.softmax(-1) @ value
    if window is not None and block in _logits:
        share = torch.sigmoid(scores.logsumexp(-1) - _logits[block][:, None])[..., None]
        output = output * share + (1 - share) * _values[block].repeat_interleave(groups, 0)[:, None]
    return output.transpose(1, 2).contiguous(), None
