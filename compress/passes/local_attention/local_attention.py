"""Local attention: some blocks see everything, all others a sliding window, in a stock class where one can express it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.architectures.conversions.windows import current_windows
from compress.architectures.model_map import model_map
from compress.errors import DataError, PassError
from compress.passes.base import EDITED, Context, Mode, Pass, Storage
from compress.passes.local_attention.choose import evenly
from compress.passes.local_attention.compact import check_edits, choose_heads, planned_edits, spread
from compress.passes.local_attention.divergence import choose
from compress.passes.local_attention.repair import repaired, tuning_memory
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.passes.local_attention.stock import planned, with_windows
from compress.passes.memory import runner_memory
from compress.solvers.memory import NO_SOLVER
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


class LocalAttention(Pass[LocalAttentionSettings]):
    """The blocks that lose most by a window go on seeing everything. The others cache no more tokens than they see.

    Weights stay as they are, but for biases that sinks need. A family whose class has no windows becomes one that has: a Llama
    becomes a GraniteSWA, whose heads have a logit for what the window drops, or without sinks a Ministral.

    Sample recipe::

        data:
          calibration: {files: [train.txt], length: 1024}
        passes:
          - local_attention: {window: 256, full: 25%}
    """

    name: ClassVar[str] = "local_attention"
    summary: ClassVar[str] = "Let most blocks see a sliding window of tokens."
    settings = LocalAttentionSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Storage]] = EDITED | {"float"}
    yields: ClassVar[frozenset[Storage]] = EDITED | {"float"}
    source: ClassVar[str] = (
        "windows: Longformer, arXiv 2004.05150; sinks: StreamingLLM, arXiv 2309.17453; which heads stay full: DuoAttention, "
        "arXiv 2410.10819"
    )

    def required_data(self, settings: LocalAttentionSettings) -> frozenset[str]:
        """Calibration data where they decide which blocks are full, or the logits of sinks."""
        return self.needs if settings.calibrated else frozenset()

    def check_samples(self, settings: LocalAttentionSettings, name: str, length: int) -> None:
        """Refuse samples that a window covers: nothing would differ on them, and the choice would be noise."""
        if length <= max(settings.window):
            raise DataError(
                f"samples of {length} tokens fit into a window of {max(settings.window)}, so nothing would differ on them",
                where=f"data.{name}",
                fix=f"set data.{name}.length to {4 * max(settings.window)}, or at least {max(settings.window) + 1}",
            )

    def mode_for(self, settings: LocalAttentionSettings) -> Mode:
        """``stream`` without calibration data, else ``blockwise``."""
        return "blockwise" if settings.calibrated else "stream"

    def output_storage(self, settings: LocalAttentionSettings) -> frozenset[Storage]:
        """Floats, whose attention has edits where no stock class expresses the windows."""
        return frozenset({"float", "windowed"}) if settings.edits else frozenset({"float"})

    def plan(self, spec: Spec, settings: LocalAttentionSettings) -> Spec:
        """Exact in names, shapes and bytes. Which blocks are full is a guess where calibration data decide."""
        _check(spec, settings)
        if settings.edits:
            result = planned_edits(spec, settings, spread(spec, settings))
        else:
            result = planned(spec, settings, evenly(spec, settings))[0]
        _check_head(spec, settings)
        return result

    def apply(self, checkpoint: Checkpoint, settings: LocalAttentionSettings, context: Context) -> Checkpoint:
        """Choose the windows here; the result reads the weights as they are."""
        _check(checkpoint.spec, settings)
        for name in self.required_data(settings):
            self.check_samples(settings, name, context.data(name).ids.shape[1])
        if settings.edits:
            choice = choose_heads(checkpoint, settings, context)
            context.details["windows"], chosen = choice.rows(), choice.blocks()
            result = _edited(checkpoint, planned_edits(checkpoint.spec, settings, choice))
        else:
            chosen = choose(checkpoint, settings, context)
            context.details["windows"] = chosen.rows()
            result = with_windows(checkpoint, settings, chosen)
        return repaired(checkpoint, result, chosen, settings, context)

    def memory(self, spec: Spec, settings: LocalAttentionSettings, width: int) -> int | None:
        """Bytes of the training that `tune_epochs` asks for, of two models for `sink_steps`, or of gradients by block."""
        if settings.tune_epochs:
            return tuning_memory(self.plan(spec, settings), settings, width)
        if settings.sink_steps:
            return 2 * 4 * spec.parameters
        return runner_memory(spec, [], width, NO_SOLVER, gradients=True) if settings.measured else None

    def plan_notes(self, spec: Spec, settings: LocalAttentionSettings) -> list[str]:
        """Remarks on repair, on copying, and on prompts in stock transformers."""
        notes, after = [], self.plan(spec, settings)
        if settings.sinks == 0:
            notes.append("windows without sinks need repair: let `distill` follow, or set `sinks: learned`")
        if settings.choose == "divergence" and settings.long_range == 0:
            notes.append("`long_range: 0`: blocks that copy from far are not seen, and may be given windows")
        if not settings.edits:
            slow = "runs no fused kernel in" if model_map(after).record.eager else "gives masks of all pairs to"
            notes.append(
                f"stock transformers {slow} {after.structure.model_type}, so that prompts read at once get slower with their "
                "length; `generate` reads them in chunks, and `compress.load` by our attention function"
            )
        return notes


def _edited(checkpoint: Checkpoint, spec: Spec) -> Checkpoint:
    """The checkpoint with edits. No weight changes."""
    from compress.checkpoint.values import Derived

    return Derived(checkpoint, spec, checkpoint.tensor)


def _check(spec: Spec, settings: LocalAttentionSettings) -> None:
    """Raise `PassError` for models and settings that windows do not fit."""
    mapped = model_map(spec)
    if not mapped.record.causal or mapped.record.stacks:
        raise PassError(f"{mapped.record.model_type} does not decode token by token: windows are for causal models")
    if settings.only or settings.skip:
        raise PassError(
            "blocks are chosen by number", key="only" if settings.only else "skip", fix="use `full: [0, 7]`"
        )
    window, positions = max(settings.window), mapped.trained_positions
    if positions is not None and window >= positions:
        raise PassError(
            f"a window of {window} is no shorter than the {positions} positions that the model is trained for",
            key="window",
            fix="set a shorter one",
        )
    if positions is not None and settings.at is not None and settings.at > positions:
        raise PassError(f"the model is trained for {positions} positions", key="at", fix=f"set {positions} or less")
    if smaller := [w for w in current_windows(spec) if w is not None and w < window]:
        raise PassError(f"blocks have windows of {smaller[0]} already", key="window", fix=f"set {smaller[0]} or less")
    if settings.edits:
        check_edits(spec, settings)


def _check_head(spec: Spec, settings: LocalAttentionSettings) -> None:
    """Raise `PassError` where losses of windows cannot be measured, for want of a head that predicts tokens."""
    if settings.measured and not model_map(spec).has_head:
        key = "choose" if settings.choose == "divergence" else "sinks"
        raise PassError(
            f"`{key}: {settings.choose if key == 'choose' else settings.sinks}` needs a model that predicts tokens",
            key=key,
            fix="set `choose: every` and `sinks: 0`",
        )
