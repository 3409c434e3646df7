"""Parameter sharing: blocks that use the same tensors, each with a residual of low rank where asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.architectures.conversions import SharedBlocks, shared_blocks
from compress.architectures.model_map import model_map
from compress.checkpoint.structure import STORAGE, shared
from compress.errors import PassError
from compress.passes.base import EDITED, EDITS, Context, Pass, PassSettings, Storage, select, select_linears
from compress.passes.blockwise import open_runner, require_head, runner_memory
from compress.passes.share.codebooks import cluster, clustered
from compress.passes.share.conversion import convert
from compress.passes.share.embeddings import thin, thinned, tied
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.passes.share.solve import Solver
    from compress.workspace import Workspace

BlockGroups = list[list[int]]
#: Rank of residuals: without them dropping as many blocks is better, see the benchmarks.
DEFAULT_RANK = 8
#: Calibration samples that arrangements are judged by, the last ones.
_HELD_OUT = 16
Arrangement = Literal["best", "sequence", "cycle", "nearest"]


class ShareSettings(PassSettings):
    """Settings of `share`."""

    groups: int | BlockGroups | None = Field(
        default=None,
        description="Number of blocks to store; each is used by the same number of blocks. Or lists of block indices that "
        "share, such as [[1, 2], [3, 4]]; blocks in no list stay as they are.",
    )
    arrangement: Arrangement = Field(
        default="best",
        description="Which blocks share, if `groups` is a number. `sequence`: neighbours (0 1, 2 3). `cycle`: every n-th "
        "block (0 3, 1 4) (both in arXiv 2104.06022). `nearest`: the blocks whose outputs change least. `best`: the "
        "arrangement of these whose predictions on held-out calibration samples are nearest to the original's, with two "
        "models in memory. Where a BERT becomes an ALBERT, `best` is `sequence`.",
    )
    parts: Literal["matrices", "attention", "mlp", "all"] = Field(
        default="matrices",
        description="What the blocks share: all weight matrices, the matrices of attention or of the MLP, or all tensors "
        "with norms and biases. A BERT whose neighbours share `all` becomes a stock ALBERT (arXiv 1909.11942).",
    )
    init: Literal["least_squares", "mean", "fisher", "first"] = Field(
        default="least_squares",
        description="The shared matrix. `least_squares`: the matrix of least output error over all blocks of the group, on "
        "calibration data. `mean`: their mean. `fisher`: their mean weighted by the Fisher information (arXiv 2111.09832). "
        "`first`: the matrix of the group's first block.",
    )
    align: bool = Field(
        default=True,
        description="Before sharing, permute neurons and heads of each block to match the group's first block (Git "
        "Re-Basin, arXiv 2209.04836). This changes no output.",
    )
    residual_rank: int | None = Field(
        default=None,
        ge=0,
        description="Rank of the low-rank residual that each block adds to a shared matrix (Relaxed Recursive Transformers, "
        "arXiv 2410.20672). It is fitted to the error of sharing, and `distill` trains it too. 0 for none. By default 8, or "
        "0 with `parts: all`.",
    )
    embeddings: Literal["tie", "factorize"] | None = Field(
        default=None,
        description="`tie`: input and output embeddings become one matrix, fitted to both on calibration data (arXiv "
        "1608.05859). `factorize`: embeddings become two factors of rank `embedding_rank`, fitted on calibration data "
        "(ALBERT, arXiv 1909.11942); an OPT stays a stock model.",
    )
    embedding_rank: int | None = Field(default=None, ge=1, description="With `embeddings: factorize`: the rank.")
    codebook_bits: int | None = Field(
        default=None,
        ge=2,
        le=8,
        description="Each matrix gets a codebook of 2 to the power of this many values (Deep Compression, arXiv "
        "1510.00149). Values come from k-means weighted by the Hessian's diagonal (SqueezeLLM, arXiv 2306.07629); later "
        "columns compensate for rounding errors. Weights are stored as indices of this many bits and cannot be trained "
        "afterwards.",
    )

    @property
    def rank(self) -> int:
        """Rank of residuals."""
        if self.residual_rank is not None:
            return self.residual_rank
        return 0 if self.groups is None or self.parts == "all" else DEFAULT_RANK

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.groups is None and self.embeddings is None and self.codebook_bits is None:
            raise ValueError("give `groups`, `embeddings` or `codebook_bits`")
        if (self.embeddings == "factorize") != (self.embedding_rank is not None):
            raise ValueError("`embeddings: factorize` and `embedding_rank` go together")
        if self.groups is None and self.residual_rank:
            raise ValueError("`residual_rank` goes with `groups`")
        if self.groups is None:
            return self
        if isinstance(self.groups, int):
            if self.groups < 1:
                raise ValueError("`groups` is at least 1")
            return self
        numbers = [i for group in self.groups for i in group]
        if len(set(numbers)) != len(numbers) or min(numbers, default=-1) < 0:
            raise ValueError("`groups` names each block at most once, by its number from 0")
        if any(len(group) < 2 for group in self.groups):
            raise ValueError("each of `groups` has two blocks or more")
        if any(sorted(group) != group for group in self.groups):
            raise ValueError("each of `groups` is in ascending order")
        return self


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
    preserves = frozenset({"aliases"})
    source: ClassVar[str] = (
        "ALBERT, arXiv 1909.11942; Relaxed Recursive Transformers, arXiv 2410.20672; order of units as in Git Re-Basin, arXiv "
        "2209.04836; Fisher mean: arXiv 2111.09832; codebooks: Deep Compression, arXiv 1510.00149; SqueezeLLM, arXiv 2306.07629"
    )

    def output_storage(self, settings: ShareSettings) -> frozenset[Storage]:
        """Integers (numbers of values) with codebooks; shared tensors with groups; factors of embeddings."""
        found: set[Storage] = {"float"}
        if settings.codebook_bits is not None:
            found.add("integer")
        if settings.groups is not None:
            found.add("shared")
        if settings.embeddings == "factorize":
            found.add("factored")
        return frozenset(found)

    def plan(self, spec: Spec, settings: ShareSettings) -> Spec:
        """Exact but for names, where it is still open which blocks share."""
        result = spec
        if settings.groups is not None:
            parts = self._parts(spec, settings)
            if settings.init == "fisher":
                require_head(spec, "`init: fisher`", "init", "use `least_squares`")
            candidates = self._candidates(spec, settings, parts)
            planned = self._planned(spec, settings, parts, next(iter(candidates.values())))
            result = replace(planned, exact=spec.exact and not self._open(settings, candidates))
        if settings.embeddings == "tie":
            result = tied(result)
        if settings.embedding_rank is not None:
            result = thinned(result, settings.embedding_rank)
        if settings.codebook_bits is not None:
            result = clustered(result, self._clustered(result, settings), settings.codebook_bits)
        return result

    def _clustered(self, spec: Spec, settings: ShareSettings) -> list[str]:
        """Matrices that get codebooks: those of blocks, or the ones chosen."""
        names = [f"{m}.weight" for m in select_linears(spec, settings) if f"{m}.weight" in spec.tensors]
        found = sorted(n for n in names if spec.tensors[n].alias_of is None and len(spec.tensors[n].shape) >= 2)
        if not found:
            raise PassError("no weight matrix is left to cluster", key="only" if settings.only else "skip")
        return found

    def _open(self, settings: ShareSettings, candidates: Mapping[str, BlockGroups]) -> bool:
        """Whether calibration data say which blocks share."""
        return len(candidates) > 1 or (isinstance(settings.groups, int) and settings.arrangement == "nearest")

    def _conversion(self, spec: Spec, settings: ShareSettings, groups: BlockGroups) -> SharedBlocks | None:
        """The stock family that shares its blocks so, such as ALBERT; None where there is none."""
        conversion = shared_blocks(spec) if settings.parts == "all" and not settings.rank else None
        return conversion if conversion is not None and conversion.expresses(spec, groups) else None

    def memory(self, spec: Spec, settings: ShareSettings, width: int) -> int | None:
        """Of a sweep, and of the solver: a group's matrices and statistics; two whole models to choose the arrangement."""
        found = 0
        if settings.groups is not None:
            parts = self._parts(spec, settings)
            names = [path + part for path in model_map(spec).paths.values() for part in parts]
            names = [name for name in names if len(spec.tensors[name].shape) == 2]
            found = runner_memory(spec, names, width, factors=4.0, copies=12, moments=0, kept=0)
            if self._open(settings, self._candidates(spec, settings, parts)) or settings.init == "fisher":
                found = max(found, 2 * width * spec.parameters + 4 * spec.parameters)
        if settings.embeddings is not None:
            found = max(found, width * spec.parameters + 16 * max(t.count for t in spec.stored()))
        if settings.codebook_bits is not None:
            planned = self.plan(spec, settings)
            names = [t.name for t in planned.stored() if t.quant_format is not None]
            found = max(found, runner_memory(planned, names, width, factors=4.0, copies=8, moments=0, kept=5))
        return found

    def prepare(self, checkpoint: Checkpoint, settings: ShareSettings, context: Context) -> None:
        """A package that is not installed."""
        self._check_packages(settings)

    def _check_packages(self, settings: ShareSettings) -> None:
        if settings.groups is not None and settings.align and find_spec("scipy") is None:
            raise PassError(
                "putting units into one order needs the package scipy",
                key="align",
                fix="pip install scipy, or set `align: false`",
            )

    def apply(self, checkpoint: Checkpoint, settings: ShareSettings, context: Context) -> Checkpoint:
        """What calibration data tell is found here, into the work folder, and the result reads it."""
        result = checkpoint
        if settings.groups is not None:
            result = self._share_blocks(result, settings, context)
        if settings.embeddings == "tie":
            from compress.passes.share.fit_embeddings import tie

            result = tie(
                result,
                tied(result.spec),
                context.data("calibration"),
                device=context.device,
                dtype=context.dtype,
                progress=context.progress,
            )
        if settings.embedding_rank is not None:
            result = thin(result, settings.embedding_rank, context)
        if settings.codebook_bits is not None:
            names = self._clustered(result.spec, settings)
            result = cluster(result, clustered(result.spec, names, settings.codebook_bits), names, context, True)
        return result

    def _share_blocks(self, checkpoint: Checkpoint, settings: ShareSettings, context: Context) -> Checkpoint:
        """Statistics are gathered, the arrangement is chosen and shared tensors are solved for."""
        from compress.blockwise.saved_hessians import SavedHessians
        from compress.passes.share.solve import ShareOptions, Solver

        self._check_packages(settings)
        spec, parts = checkpoint.spec, self._parts(checkpoint.spec, settings)
        candidates = self._candidates(spec, settings, parts)
        paths = model_map(spec).paths
        blocks = sorted({i for groups in candidates.values() for group in groups for i in group})
        matrices = [part for part in parts if len(spec.tensors[paths[blocks[0]] + part].shape) == 2]
        read = SavedHessians(context.workspace.folder("read"), context.device)
        runner = open_runner(checkpoint, [], context, workspace=context.workspace.folder("sweep"), with_targets=False)
        wanted = {i: [paths[i] + part for part in matrices] for i in blocks}
        read.collect(
            runner.executor,
            wanted,
            activations=runner.workspace.path,
            progress=context.progress,
            title="reading what blocks multiply",
            check=True,
        )
        fisher = None
        if settings.init == "fisher" and not context.processes.rank:
            from compress.sensitivity.fisher import fisher_information

            names = [paths[i] + part for i in blocks for part in matrices]
            fisher = fisher_information(
                checkpoint,
                names,
                context.data("calibration"),
                device=context.device,
                seed=context.seed,
                progress=context.progress,
            )
        options = ShareOptions(parts, settings.init, settings.align, settings.rank, fisher)
        solver = Solver(checkpoint, read, options)
        found = context.workspace.cached(
            "groups", lambda: self._chosen(checkpoint, settings, solver, candidates, context)
        )
        groups = found["groups"]
        context.details["sharing"] = found
        if not context.processes.rank:
            context.details["sharing"] |= {"tensors": solver.solve(groups, _solved(context, groups))}
        runner.processes.barrier()
        result = _derived(checkpoint, settings, solver, groups, context)
        if (conversion := self._conversion(spec, settings, groups)) is not None:
            return convert(result, conversion, len(groups))
        return result

    def _chosen(
        self,
        checkpoint: Checkpoint,
        settings: ShareSettings,
        solver: Solver,
        candidates: dict[str, BlockGroups],
        context: Context,
    ) -> dict[str, Any] | None:
        """The groups, and what each arrangement that was tried gives; in the first process."""
        from compress.sensitivity.depth import divergence

        if context.processes.rank:
            return None
        if self._open(settings, candidates):
            nearest = solver.nearest(
                list(candidates.values()), lambda i, j: _unlike(checkpoint.spec, i, j, solver.options.parts)
            )
            candidates = {**candidates, "nearest": nearest} if settings.arrangement == "best" else {"nearest": nearest}
        rows: list[dict[str, Any]] = []
        data = context.data("calibration")
        for name, groups in candidates.items():
            row: dict[str, Any] = {"arrangement": name, "groups": groups}
            same = next((r for r in rows if r["groups"] == groups), None)
            if len(candidates) > 1 and same is None:
                solver.solve(groups, _solved(context, groups))
                shared_ = _derived(checkpoint, settings, solver, groups, context)
                held = data.last(min(_HELD_OUT, len(data.ids)))
                row["divergence"] = divergence(checkpoint, shared_, held, dtype=context.dtype, device=context.device)
            rows.append(row | ({"divergence": same["divergence"]} if same else {}))
        best = min(rows, key=lambda row: row.get("divergence", 0.0))
        return {"groups": best["groups"], "arrangement": best["arrangement"], "tried": rows}

    def _planned(self, spec: Spec, settings: ShareSettings, parts: Sequence[str], groups: BlockGroups) -> Spec:
        result = shared(spec, groups, parts, settings.rank)
        if (conversion := self._conversion(spec, settings, groups)) is not None:
            return conversion.converted(result, len(groups))[0]
        return result

    def _parts(self, spec: Spec, settings: ShareSettings) -> list[str]:
        """Tensors of a block that come to be shared, without the block's path. Raises `PassError`."""
        mapped = model_map(spec)
        mapped.require_nameable()
        mapped.require_blockwise("distill it to fewer blocks")
        if edit := next(iter(spec.structure.edits), None):
            raise PassError(
                f"{edit.module} {EDITS[STORAGE[edit.kind]]} already", key="groups", fix="share groups first, and once"
            )
        if mapped.has_experts and settings.parts != "attention":
            raise PassError(
                f"experts of {mapped.record.model_type} are not shared", key="parts", fix="set `parts: attention`"
            )
        roles = ("attention", "mlp") if settings.parts == "matrices" else (settings.parts,)
        first = mapped.blocks[0]
        inside = [part for part, tensor in first.tensors.items() if tensor.is_float]
        if settings.parts != "all":
            matrices = {x.name for x in first.linears if x.role in roles and len(x.tensor.shape) == 2}
            inside = [part for part in inside if first.path + part in matrices]
        chosen = select(
            [block.tensors[part].module for block in mapped.blocks for part in inside if part in block.tensors],
            settings,
            mapped.modules,
        )
        found = []
        for part in inside:
            module = part.rpartition(".")[0]
            picked = [block.path + module in chosen for block in mapped.blocks]
            if any(picked) and not all(picked):
                raise PassError(
                    f"{first.path}{module} is chosen in some blocks and not in others",
                    key="only" if settings.only else "skip",
                    fix="name the modules of all blocks (`*.mlp.*`); `groups: [[1, 2], …]` leaves blocks alone",
                )
            if all(picked):
                found.append(part)
        if not found:
            raise PassError(
                "nothing is left to share", key="only" if settings.only else "skip" if settings.skip else "parts"
            )
        return sorted(found)

    def _candidates(self, spec: Spec, settings: ShareSettings, parts: Sequence[str]) -> dict[str, BlockGroups]:
        """Groups by arrangement, `nearest` apart; those that `best` must leave out are left out. Raises `PassError`."""
        depth = model_map(spec).depth
        if isinstance(settings.groups, list):
            groups = [list(group) for group in settings.groups]
            if (wrong := next((i for group in groups for i in group if i >= depth), None)) is not None:
                raise PassError(f"there is no block {wrong}: they are numbered 0 to {depth - 1}", key="groups")
            self._check(spec, settings, groups, parts)
            return {"given": groups}
        assert settings.groups is not None
        count = settings.groups
        if depth % count or count == depth:
            possible = " or ".join(str(n) for n in range(1, depth) if depth % n == 0)
            raise PassError(
                f"{depth} blocks cannot be {count} groups of equal size, two or more in each",
                key="groups",
                fix=f"set groups to {possible}" if possible else None,
            )
        size = depth // count
        found: dict[str, BlockGroups] = {
            "sequence": [list(range(i * size, (i + 1) * size)) for i in range(count)],
            "cycle": [list(range(i, depth, count)) for i in range(count)],
        }
        if settings.arrangement in found:
            found = {settings.arrangement: found[settings.arrangement]}
        elif self._conversion(spec, settings, found["sequence"]):  # loads everywhere, as others would not
            found = {"sequence": found["sequence"]}
        good, problem = {}, None
        for name, groups in found.items():
            try:
                self._check(spec, settings, groups, parts)
                good[name] = groups
            except PassError as error:
                problem = error
        if problem is not None and not good:
            raise problem
        return good

    def _check(self, spec: Spec, settings: ShareSettings, groups: BlockGroups, parts: Sequence[str]) -> None:
        """The blocks of each group are alike, dense, and share more than residuals add. Raises `PassError`."""
        paths = model_map(spec).paths
        for first, *others in groups:
            for block in others:
                if (difference := _unlike(spec, first, block, parts)) is not None:
                    raise PassError(
                        f"blocks {first} and {block} are unlike: {difference}",
                        key="groups",
                        fix="name `groups` of like blocks",
                    )
            for name in (paths[block] + part for block in (first, *others) for part in parts):
                if spec.tensors[name].kept is not None:
                    raise PassError(
                        f"{name} has weights removed, and sharing would fill them in",
                        fix="share before pruning weights",
                    )
            users = len(others) + 1
            matrices = [t for t in (spec.tensors[paths[first] + part] for part in parts) if len(t.shape) == 2]
            saves = {t.name: ((users - 1) * t.count - 1) // (users * sum(t.shape)) for t in matrices}
            name = min(saves, key=lambda n: saves[n], default="")
            if name and settings.rank > saves[name]:
                raise PassError(
                    f"residuals of rank {settings.rank} are as large as what sharing {name} saves",
                    key="residual_rank",
                    fix=f"set residual_rank to {saves[name]}" + (" or less" if saves[name] else ""),
                )


def _unlike(spec: Spec, first: int, other: int, parts: Sequence[str]) -> str | None:
    """How two blocks differ that could not share; None where they can."""
    mapped = model_map(spec)
    for key, values in mapped.per_layer.items():
        if values[first] != values[other]:
            return f"{key} is {values[first]} and {values[other]}"
    for part in parts:
        one, two = (spec.tensors.get(mapped.paths[block] + part) for block in (first, other))
        if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
            return f"{mapped.paths[first]}{part} has another shape"
    return None


def _solved(context: Context, groups: BlockGroups) -> Workspace:
    """The workspace of the tensors that groups of blocks share; the first process alone solves for them."""
    return context.workspace.alone().folder("solved-" + "-".join("_".join(map(str, group)) for group in groups))


def _derived(
    checkpoint: Checkpoint, settings: ShareSettings, solver: Solver, groups: BlockGroups, context: Context
) -> Checkpoint:
    from compress.checkpoint.values import Derived, Value, torch_dtype

    after = shared(checkpoint.spec, groups, solver.options.parts, settings.rank)
    read = solver.read_solved(groups, _solved(context, groups))

    def value(name: str) -> Value:
        data = read(name).to(torch_dtype(after.tensors[name].dtype))
        return Value(data, checkpoint.tensor(name).mask if after.tensors[name].kept is not None else None)

    return Derived(checkpoint, after, value)
