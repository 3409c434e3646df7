"""Latent attention: one rotary key and one latent of the values for all heads, stored in a stock class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from compress.architectures.conversions.latent import whole_cache
from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.base import Context, Pass
from compress.passes.latent_attention.plan import TIMED_BLOCKS, planned, shape_of
from compress.passes.latent_attention.settings import LatentAttentionSettings
from compress.passes.memory import comparison_memory, largest_block, runner_memory
from compress.solvers.memory import LATENT, NO_SOLVER, SOLVED_LATENT
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


class LatentAttention(Pass[LatentAttentionSettings]):
    """Keys and values of all heads become one rotary key and one latent, which alone are cached (MLA).

    The result is a stock model. Without reduction it computes the same. With it, keys lose their least components across
    heads within each rotary frequency, and values their least components across all heads. The weights grow, and transformers
    decodes more slowly: it expands the whole latent at every step. So this pass is for long texts and large batches, where
    the cache is most of the memory (docs/attention.md).

    Sample recipe::

        passes:
          - latent_attention: {max_cache: 75%}
    """

    name: ClassVar[str] = "latent_attention"
    summary: ClassVar[str] = "Cache one low-rank key and one low-rank value for all heads (MLA), in a stock model."
    settings = LatentAttentionSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    source: ClassVar[str] = (
        "DeepSeek-V2, arXiv 2405.04434; conversion as in TransMLA, arXiv 2502.07864, with complex components; block "
        "reconstruction: BRECQ, arXiv 2102.05426"
    )

    def depends_on_effort(self, settings: LatentAttentionSettings) -> bool:
        """Where blocks are tuned, or could be with another effort."""
        return settings.repair == "tune" or "repair" not in settings.model_fields_set

    def plan(self, spec: Spec, settings: LatentAttentionSettings) -> Spec:
        """Exact with `keys` and `values`. With `max_cache` trials divide the numbers, so weights are an estimate."""
        if settings.only or settings.skip:
            raise PassError(
                "`only` and `skip` do not apply: all blocks get latent attention",
                key="only" if settings.only else "skip",
            )
        after = planned(spec, settings)
        return replace(after, exact=spec.exact and settings.max_cache is None)

    def plan_notes(self, spec: Spec, settings: LatentAttentionSettings) -> list[str]:
        """How many numbers are cached, how much the weights grow, and from how many tokens on that saves memory."""
        whole, shape = whole_cache(spec), shape_of(spec, settings)
        before, depth = whole.keys + whole.values, model_map(spec).depth
        grown = planned(spec, settings).parameters - spec.parameters
        notes = [
            f"each block caches {shape.cached} numbers per token, {before} before; transformers decodes more slowly, since it "
            "expands the whole latent at every step"
        ]
        saved = (before - shape.cached) * depth
        if grown > 0 and saved > 0:
            notes.append(
                f"its weights have about {grown:,} numbers more: memory is saved from {-(-grown // saved):,} cached tokens on"
            )
        return notes

    def memory(self, spec: Spec, settings: LatentAttentionSettings, width: int) -> int | None:
        """Bytes of measuring moments, of solving, of tuning beside the original, and of decoding or comparing on trial."""
        after = planned(spec, settings)
        mapped, other = model_map(spec), model_map(after)
        attention = mapped.record.attention
        assert attention is not None
        parts = (attention.query, attention.key, attention.value)
        own = [x for x in mapped.layers if x.part in parts]
        peak = runner_memory(spec, {x.name for x in own}, width, LATENT, gradients=True)
        peak = max(peak, SOLVED_LATENT * 8 * max((x.O * x.I for x in own), default=0))
        if settings.repair == "tune":
            names = {x.name for x in other.layers if len(x.tensor.shape) == 2}
            peak = max(peak, runner_memory(after, names, width, NO_SOLVER, reconstruction="floats", teacher=spec))
        timed = width * TIMED_BLOCKS * (largest_block(spec) + largest_block(after))
        return max(peak, timed, comparison_memory(spec, after, width) if settings.max_cache is not None else 0)

    def prepare(self, checkpoint: Checkpoint, settings: LatentAttentionSettings, context: Context) -> None:
        """Refuse fewer tokens than channels: components of so few would be noise. The whole cache needs none to be chosen."""
        spec, data = checkpoint.spec, context.data("calibration")
        tokens = data.ids.numel() if data.mask is None else int(data.mask.sum())
        hidden = model_map(spec).hidden
        if tokens < hidden and (settings.max_cache is not None or shape_of(spec, settings) != whole_cache(spec)):
            raise PassError(
                f"calibration data has {tokens} tokens, and components of {hidden} channels cannot be told from fewer",
                key="max_cache" if settings.max_cache is not None else None,
                fix="use more samples, or longer ones",
            )

    def apply(self, checkpoint: Checkpoint, settings: LatentAttentionSettings, context: Context) -> Checkpoint:
        """Measure, choose and solve here; the result reads its tensors from the workspace."""
        from compress.passes.latent_attention.convert import convert

        self.plan(checkpoint.spec, settings)
        self.prepare(checkpoint, settings, context)
        return convert(checkpoint, settings, context)
