"""Parameter sharing: several blocks use the same tensors, each with an optional low-rank residual."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.base import EDITED, Context, Pass, Storage
from compress.passes.blockwise import require_head
from compress.passes.memory import by_blocks, comparison_memory, gram_bytes, runner_memory
from compress.passes.selection import select_linears
from compress.passes.share.codebooks import cluster, clustered
from compress.passes.share.embeddings import thin, thinned, tied
from compress.passes.share.groups import candidate_groups, check_packages, is_open, shared_parts, shared_spec
from compress.passes.share.settings import ShareSettings
from compress.passes.share.work import share_work
from compress.passes.work import DataSizes
from compress.solvers.memory import CODEBOOK, MATCHED, NO_SOLVER, SHARED_MATRIX, THIN_TABLES, TIED_TABLES
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint


class Share(Pass[ShareSettings]):
    """Blocks share tensors, stored and held in memory once; each block keeps its place, its norms and its KV cache.

    Neurons and heads are aligned to the group's first block, then the shared matrix is solved for. `distill` after it trains
    shared tensors once and wins back most of the loss. The result is a compact checkpoint, or an ALBERT.

    Sample recipe::

        store: compact
        passes:
          - share: {groups: 3}
          - distill: {tokens: 2000000}
          - cast: {weights: int8}
    """

    name: ClassVar[str] = "share"
    summary: ClassVar[str] = "Let blocks share their parameters."
    settings = ShareSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Storage]] = EDITED | {"float"}
    yields: ClassVar[frozenset[Storage]] = frozenset({"float", "integer", "shared", "factored"})
    source: ClassVar[str] = (
        "ALBERT, arXiv 1909.11942; residuals: Relaxed Recursive Transformers, arXiv 2410.20672; align: Git Re-Basin, arXiv "
        "2209.04836; fisher: arXiv 2111.09832; codebooks: Deep Compression, arXiv 1510.00149, and SqueezeLLM, arXiv 2306.07629"
    )

    def depends_on_effort(self, settings: ShareSettings) -> bool:
        """Where the arrangement is chosen."""
        return isinstance(settings.groups, int)

    def output_storage(self, settings: ShareSettings) -> frozenset[Storage]:
        """Floats; integers with codebooks, shared tensors with groups, factors with thin embeddings."""
        storage: set[Storage] = {"float"}
        if settings.codebook_bits is not None:
            storage.add("integer")
        if settings.groups is not None:
            storage.add("shared")
        if settings.embeddings == "factorize":
            storage.add("factored")
        return frozenset(storage)

    def plan(self, spec: Spec, settings: ShareSettings) -> Spec:
        """Exact, except for names if calibration data decide which blocks share."""
        result = spec
        if settings.groups is not None:
            parts = shared_parts(spec, settings)
            if settings.init == "fisher":
                require_head(spec, "`init: fisher`", "init", "use `least_squares`")
            candidates = candidate_groups(spec, settings, parts)
            after = shared_spec(spec, settings, parts, next(iter(candidates.values())))
            result = replace(after, exact=spec.exact and not is_open(settings, candidates))
        if settings.embeddings == "tie":
            result = tied(result)
        if settings.embedding_rank is not None:
            result = thinned(result, settings.embedding_rank)
        if settings.codebook_bits is not None:
            result = clustered(result, self._clustered(result, settings), settings.codebook_bits)
        return result

    def _clustered(self, spec: Spec, settings: ShareSettings) -> list[str]:
        """Matrices that get codebooks: by default those of blocks."""
        names = [f"{m}.weight" for m in select_linears(spec, settings) if f"{m}.weight" in spec.tensors]
        matrices = sorted(n for n in names if spec.tensors[n].alias_of is None and len(spec.tensors[n].shape) >= 2)
        if not matrices:
            raise PassError("no weight matrix is left to cluster", key="only" if settings.only else "skip")
        return matrices

    def memory(self, spec: Spec, settings: ShareSettings, width: int) -> int | None:
        """Bytes of the block runner, of the solver without a block, and of what compares arrangements or fits tables."""
        peak = 0
        if settings.groups is not None:
            peak = self._sharing(spec, settings, width)
        if settings.embeddings is not None:
            table = max(t.count for t in spec.stored())
            fitting = table * (TIED_TABLES if settings.embeddings == "tie" else THIN_TABLES)
            states = runner_memory(spec, [], width, NO_SOLVER) if by_blocks(spec) else width * spec.parameters
            peak = max(peak, states + width * table, fitting)
        if settings.codebook_bits is not None:
            planned = self.plan(spec, settings)
            names = [t.name for t in planned.stored() if t.quant_format is not None]
            peak = max(peak, runner_memory(planned, names, width, CODEBOOK))
        return peak

    def work(self, spec: Spec, settings: ShareSettings, sizes: DataSizes) -> Work | None:
        """Work of Hessians, of solving for shared matrices, and of comparing arrangements."""
        return share_work(spec, settings, sizes.calibration)

    def _sharing(self, spec: Spec, settings: ShareSettings, width: int) -> int:
        """Bytes at the peak of sharing blocks."""
        parts = shared_parts(spec, settings)
        mapped = model_map(spec)
        names = {path + part for path in mapped.paths.values() for part in parts}
        own = [x for x in mapped.layers if x.name in names and len(x.tensor.shape) == 2]
        peak = runner_memory(spec, [x.name for x in own], width, NO_SOLVER)
        solving = max((SHARED_MATRIX.peak(gram_bytes(x.I), x.O, x.I) for x in own), default=0)
        if settings.align:
            units = max((max(x.O, x.I) for x in own), default=0)
            solving = max(solving, MATCHED * 8 * units**2 + 4 * 8 * max((x.O * x.I for x in own), default=0))
        peak = max(peak, solving)
        if is_open(settings, candidate_groups(spec, settings, parts)):
            peak = max(peak, comparison_memory(spec, self.plan(spec, settings), width))
        if settings.init == "fisher":
            peak = max(peak, 4 * (spec.parameters + 2 * sum(x.tensor.count for x in own)))
        return peak

    def prepare(self, checkpoint: Checkpoint, settings: ShareSettings, context: Context) -> None:
        """Refuse settings whose package is not installed."""
        check_packages(settings)

    def apply(self, checkpoint: Checkpoint, settings: ShareSettings, context: Context) -> Checkpoint:
        """Solve on calibration data here; the result reads the solved tensors from the workspace."""
        result = checkpoint
        if settings.groups is not None:
            from compress.passes.share.blocks import share_blocks

            result = share_blocks(result, settings, context)
        if settings.embeddings == "tie":
            from compress.passes.share.fit_embeddings import tie

            result = tie(
                result,
                tied(result.spec),
                context.data("calibration"),
                device=context.device,
                dtype=context.dtype,
                progress=context.progress,
                work=context.workspace.path,
            )
        if settings.embedding_rank is not None:
            result = thin(result, settings.embedding_rank, context)
        if settings.codebook_bits is not None:
            names = self._clustered(result.spec, settings)
            result = cluster(result, clustered(result.spec, names, settings.codebook_bits), names, context, True)
        return result
