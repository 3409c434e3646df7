"""Linformer: an encoder's keys and values are projected along the text, so attention costs tokens times rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.linformer import PROJECTIONS, attentions, projected_attention
from compress.errors import DataError, PassError
from compress.passes.base import Context, Mode, Pass, Storage
from compress.passes.blockwise import open_runner
from compress.passes.low_rank_attention.settings import LowRankAttentionSettings
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value


class LowRankAttention(Pass[LowRankAttentionSettings]):
    """Every head compares its tokens with `rank` mixtures of keys in place of all keys (Linformer), for encoders.

    Both projections begin as means of neighbouring tokens. The one of values is fitted by least squares to the original's
    outputs. That alone loses much: let `distill` follow. Texts of at most `rank` tokens are computed as before.

    Sample recipe::

        store: compact
        data:
          calibration: {files: [train.txt], length: 64}
          training: {files: [train.txt], length: 64}
        passes:
          - low_rank_attention: {rank: 32}
          - distill: {epochs: 1}
    """

    name: ClassVar[str] = "low_rank_attention"
    summary: ClassVar[str] = "Project the keys and values of an encoder along the text."
    settings = LowRankAttentionSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    yields: ClassVar[frozenset[Storage]] = frozenset({"float", "factored"})
    source: ClassVar[str] = "Linformer, arXiv 2006.04768; conjugate gradients: Hestenes and Stiefel 1952"

    def required_data(self, settings: LowRankAttentionSettings) -> frozenset[str]:
        """Calibration data, unless the projections stay means of neighbours."""
        return self.needs if settings.iterations else frozenset()

    def mode_for(self, settings: LowRankAttentionSettings) -> Mode:
        """``stream`` without calibration data, else ``blockwise``."""
        return "blockwise" if settings.iterations else "stream"

    def check_samples(self, settings: LowRankAttentionSettings, name: str, length: int) -> None:
        """Refuse samples that the projections leave as they are, and longer ones than they read."""
        if length <= settings.rank:
            raise DataError(
                f"samples of {length} tokens are no longer than the rank {settings.rank}, so nothing would differ on them",
                where=f"data.{name}",
                fix=f"set data.{name}.length to {settings.rank + 1} or more",
            )
        if settings.positions is not None and length > settings.positions:
            raise DataError(
                f"samples of {length} tokens are longer than the {settings.positions} positions of the longest text",
                where=f"data.{name}",
                fix=f"set data.{name}.length to {settings.positions} or less, or `positions` to {length} or more",
            )

    def plan(self, spec: Spec, settings: LowRankAttentionSettings) -> Spec:
        """Exact: two matrices [rank, positions] for each block."""
        modules = attentions(spec)
        return projected_attention(spec, settings.rank, _positions(spec, settings), modules)

    def apply(self, checkpoint: Checkpoint, settings: LowRankAttentionSettings, context: Context) -> Checkpoint:
        """Fit the projections; the result reads them from the workspace, and all other weights as they are."""
        from compress.checkpoint.edits.linformer import neighbour_means
        from compress.checkpoint.values import Derived, Value, torch_dtype

        spec = checkpoint.spec
        after, rank, positions = self.plan(spec, settings), settings.rank, _positions(spec, settings)
        record, modules = model_map(spec).record, attentions(spec)
        assert record.attention is not None
        last = record.attention.query.rpartition(".")[2]
        result = None
        if settings.iterations:
            from compress.passes.low_rank_attention.block import fit_block

            names = [f"{module}.{last}.weight" for module in modules]
            runner = open_runner(
                checkpoint, names, context, workspace=context.workspace.folder("runner"), with_targets=False
            )
            result = runner.run(lambda block: fit_block(block, rank, positions, settings.iterations), "projecting")
            context.details["blocks"] = result.details

        def value(name: str) -> Value:
            module, _, part = name.rpartition(".")
            if module not in modules or part not in PROJECTIONS:
                return checkpoint.tensor(name)
            if result is None:
                projection = neighbour_means(rank, positions)
            else:
                projection = result.factors(f"{module}.{last}.weight")[PROJECTIONS.index(part)]
            return Value(projection.to(torch_dtype(after.tensors[name].dtype)))

        return Derived(checkpoint, after, value)


def _positions(spec: Spec, settings: LowRankAttentionSettings) -> int:
    """Longest text of the projections. Raises `PassError` for a rank that is not below it, or one beyond the model's."""
    if settings.only or settings.skip:
        raise PassError("every block is projected", key="only" if settings.only else "skip", fix="leave it out")
    known = model_map(spec).positions or spec.structure.config.get("max_position_embeddings")
    positions = settings.positions or (known if isinstance(known, int) else None)
    if positions is None:
        raise PassError("the config has no number of positions", key="positions", fix="set `positions`")
    if isinstance(known, int) and positions > known:
        raise PassError(f"the model has {known} positions", key="positions", fix=f"set {known} or less")
    if settings.rank >= positions:
        raise PassError(
            f"a rank of {settings.rank} is no less than the {positions} positions of the longest text",
            key="rank",
            fix="set a smaller one",
        )
    return positions
