"""Store weights in another number format: floats tensor by tensor, codes (integers, small floats) also block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress import architectures
from compress.checkpoint.grids import FIXED_GROUPS, INTEGERS, Grid
from compress.checkpoint.spec import FLOAT_DTYPES, Spec, Structure, Tensor, widest
from compress.errors import PassError
from compress.passes.base import Context, Mode, Pass, PassSettings, Storage, matches, select
from compress.passes.budget import Choices, assumed
from compress.passes.sweeping import input_axis, once, open_sweep, sweep_memory
from compress.settings import Size

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.open import Checkpoint, Value

Format = Literal["bf16", "fp16", "fp32", "int8", "int6", "int5", "int4", "int3", "int2", "fp8", "mxfp4", "nvfp4"]
Code = Literal["int8", "int6", "int5", "int4", "int3", "int2", "fp8", "mxfp4", "nvfp4"]
#: Bits of a code from which rounding is so fine that tuning does not pay.
TUNED_BELOW = 6
_DTYPE: dict[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


class CastSettings(PassSettings):
    """Settings of `cast`."""

    weights: Format | None = Field(
        default=None,
        description="Format of the weights. Floats (bf16, fp16, fp32; rounded to nearest even) apply to every tensor. Codes "
        "(int8 … int2; fp8, which is E4M3; mxfp4, nvfp4) apply to the matrices of blocks, and leave embeddings and head alone "
        "unless `overrides` names them. Either this, or a budget: `bits` or `max_bytes`.",
    )
    bits: float | None = Field(
        default=None,
        gt=1,
        le=16,
        description="Average bits per weight over what is cast, scales included: each matrix gets one of `formats`, so that "
        "the model's output changes least (measured by gradients on 32 samples, with the whole model in memory).",
    )
    max_bytes: Size | None = Field(
        default=None, description="As `bits`, for the weight files of the whole checkpoint, embeddings and all: 500MB."
    )
    formats: list[Code] = Field(
        default=["int8", "int6", "int5", "int4", "int3", "int2"],
        min_length=2,
        description="What `bits` and `max_bytes` choose from. Matrices that read the same inputs get the same.",
    )
    overrides: dict[str, Format] = Field(
        default_factory=dict,
        description="Format by module pattern (glob, or `re:` expression); the first that matches wins over `weights`.",
    )
    group_size: int | Literal["channel"] | None = Field(
        default=None,
        description="Inputs that share a scale, or `channel`: one scale for each output. By default 64 for integers of less "
        "than 8 bits, and `channel` for int8 and fp8; mxfp4 and nvfp4 have groups of 32 and 16.",
    )
    symmetric: bool = Field(default=True, description="Integers without zero points.")
    method: Literal["rtn", "mse", "gptq"] = Field(
        default="gptq",
        description="How codes are chosen: `gptq` makes up for each rounding by the weights not yet rounded, and reads "
        "calibration data. Without data: `rtn` rounds to nearest between the extremes of each group, as fast as files are "
        "read; `mse` searches the ends of the range for the least squared error.",
    )
    tune_epochs: int = Field(
        default=3,
        ge=0,
        description="With `gptq`: passes over the calibration data in which each block's rounding, scales, norms and biases "
        "are moved by gradient towards the original's output; 0 for none. Takes most of the time; "
        "left out where all codes have 6 bits or more.",
    )
    tune_rate: float = Field(
        default=0.01, gt=0, lt=1, description="Step of the tuning, in units of the distance between two codes."
    )
    activations: Literal["int8", "fp8"] | None = Field(
        default=None,
        description="Say in the config that inputs are to be cast while running, token by token: with int8 or fp8 weights.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if sum(value is not None for value in (self.weights, self.bits, self.max_bytes)) != 1:
            raise ValueError("give one of `weights`, `bits` and `max_bytes`")
        formats = self.asked
        if isinstance(self.group_size, int) and self.group_size < 1:
            raise ValueError("`group_size` is a number from 1 up, or `channel`")
        if fixed := next((f for f in formats if f in FIXED_GROUPS and self.group_size is not None), None):
            raise ValueError(f"{fixed} has groups of {FIXED_GROUPS[fixed]}: leave `group_size` out")
        if self.activations is not None and formats - set(_DTYPE) != {self.activations}:
            raise ValueError(f"`activations: {self.activations}` goes with `weights: {self.activations}`")
        return self

    @property
    def budgeted(self) -> bool:
        """Whether formats are chosen within a budget."""
        return self.weights is None

    @property
    def asked(self) -> set[str]:
        """Every format that may come out."""
        return {*([self.weights] if self.weights is not None else self.formats), *self.overrides.values()}

    @property
    def coded(self) -> bool:
        """Whether any weight may become codes."""
        return bool(self.asked - set(_DTYPE))

    @property
    def solved(self) -> bool:
        """Whether codes are chosen block by block."""
        return self.coded and self.method == "gptq"

    def grid(self, format_: str) -> Grid:
        """The grid of a format with these settings."""
        group = FIXED_GROUPS.get(format_)
        if group is None:
            size = self.group_size
            group = (64 if INTEGERS.get(format_, 8) < 8 else 0) if size is None else 0 if size == "channel" else size
        symmetric = self.symmetric or format_ not in INTEGERS
        activations = self.activations if format_ == self.activations else None
        return Grid(format_, group, symmetric, activations=activations)


class Cast(Pass[CastSettings]):
    """Floats of other widths become the format asked; integers and buffers of other kinds stay.

    Removed weights stay zero. What compressed-tensors can express is stored so, and loads in stock transformers; with a
    keep-mask that saves bytes, or in modules that it does not know, the compact store holds the codes.
    """

    name: ClassVar[str] = "cast"
    summary: ClassVar[str] = "Store the weights in another number format."
    settings = CastSettings
    mode = "sweep"
    needs = frozenset({"calibration"})
    yields: ClassVar[frozenset[Storage]] = frozenset({"float", "integer"})
    preserves = frozenset({"masks", "aliases"})
    source: ClassVar[str] = (
        "IEEE 754-2019, 4.3.1 (round to nearest, ties to even); GPTQ, arXiv 2210.17323; learned rounding as in AutoRound, "
        "arXiv 2309.05516, scales as in LSQ, arXiv 1902.08153; formats of compressed-tensors"
    )

    def works(self, settings: CastSettings) -> Mode:
        """Tensor by tensor for floats and by `rtn` and `mse`; block by block, or with the whole model at first, else."""
        return "sweep" if settings.solved or settings.budgeted else "stream"

    def needed(self, settings: CastSettings) -> frozenset[str]:
        """Calibration data for codes by `gptq`, and to choose formats."""
        return self.needs if self.works(settings) == "sweep" else frozenset()

    def produced(self, settings: CastSettings) -> frozenset[Storage]:
        """Integers (codes of any kind) if any are asked for."""
        return frozenset({"float", "integer"} if settings.coded else {"float"})

    def plan(self, spec: Spec, settings: CastSettings) -> Spec:
        """Exact but for budgets: dtypes and codes change, shapes and keep-masks stay; ``config.dtype`` is the widest kept.

        With a budget, the formats are those of a model whose matrices all matter alike.
        """
        if not settings.budgeted:
            return self._planned(spec, settings, {})
        names = self._open(spec, settings)
        choices = self._choices(spec, settings, [[n] for n in names])
        losses = {n: {f: assumed(choices.grid(n, f)) * spec.tensors[n].count for f in choices.formats} for n in names}
        chosen = choices.allocate(losses, settings.bits, settings.max_bytes)
        return replace(self._planned(spec, settings, chosen), exact=False)

    def _planned(self, spec: Spec, settings: CastSettings, chosen: Mapping[str, Grid]) -> Spec:
        """The spec with these grids, and the formats that settings give the rest."""
        formats = self._formats(spec, settings)

        def change(tensor: Tensor) -> Tensor:
            if tensor.name in chosen:
                return replace(tensor, grid=chosen[tensor.name])
            format_ = formats.get(tensor.name)
            if format_ is None:
                return tensor
            if format_ in _DTYPE:
                return replace(tensor, dtype=_DTYPE[format_])
            return replace(tensor, grid=self._grid(spec, tensor, settings, format_))

        cast = spec.map(change)
        if cast.tensors == spec.tensors and not settings.allow_noop:
            raise PassError(f"every weight is {settings.weights} already", key="weights", fix="leave the pass out")
        dtypes = [t.dtype for t in cast.stored() if t.dtype in FLOAT_DTYPES]
        config = dict(spec.structure.config)
        if dtypes:
            config.pop("torch_dtype", None)
            config["dtype"] = FLOAT_DTYPES[widest(dtypes)]
        tensors = {
            n: replace(t, dtype=cast.tensors[t.alias_of].dtype) if t.alias_of else t for n, t in cast.tensors.items()
        }
        return replace(cast, structure=Structure(config, spec.structure.edits), tensors=tensors)

    def _open(self, spec: Spec, settings: CastSettings) -> list[str]:
        """Tensors whose format the budget chooses."""
        formats = self._formats(spec, settings)
        return [name for name, format_ in formats.items() if format_ is None]

    def _choices(self, spec: Spec, settings: CastSettings, groups: Sequence[Sequence[str]]) -> Choices:
        def grid(name: str, format_: str) -> Grid:
            return self._grid(spec, spec.tensors[name], settings, format_)

        return Choices(spec, groups, tuple(settings.formats), grid)

    def _formats(self, spec: Spec, settings: CastSettings) -> dict[str, Format | None]:
        """Format of every tensor that the pass touches; None where a budget chooses it."""
        modules = [tensor.module for tensor in spec.stored()]
        default = modules
        if settings.weights not in _DTYPE and not settings.only:
            record = architectures.of(spec.structure.config)
            default = [t.module for t in spec.stored() if len(t.shape) == 2 and record.is_block_matrix(t.name)]
        chosen = select(default, settings, modules)
        # a pattern that matches nothing is an error
        named = select(modules, PassSettings(only=list(settings.overrides)), modules) if settings.overrides else set()
        if settings.weights not in _DTYPE:
            chosen |= named
        result: dict[str, Format | None] = {}
        for tensor in spec.stored():
            if tensor.module not in chosen or tensor.dtype not in FLOAT_DTYPES or tensor.grid is not None:
                continue
            format_ = next((f for p, f in settings.overrides.items() if matches(p, tensor.module)), settings.weights)
            if format_ in _DTYPE or (len(tensor.shape) == 2 and tensor.name.endswith(".weight")):
                result[tensor.name] = format_
        if settings.weights not in _DTYPE and settings.weights not in result.values():
            raise PassError("no weight matrix is left to cast", key="only" if settings.only else "skip")
        return result

    def _grid(self, spec: Spec, tensor: Tensor, settings: CastSettings, format_: str) -> Grid:
        grid = settings.grid(format_)
        record = architectures.of(spec.structure.config)
        if input_axis(spec, tensor.shape) == 0 and record.block_index(tensor.name) is not None:
            grid = replace(grid, transposed=True)
        inputs = grid.rows(tensor.shape)[1]
        if grid.group and inputs % grid.group:
            sizes = [s for s in (256, 128, 64, 32, 16, 8) if inputs % s == 0]
            instead = f"group_size: {sizes[0]}" if sizes and sizes[0] < grid.group else "group_size: channel"
            fixed = format_ in FIXED_GROUPS
            raise PassError(
                f"{tensor.name} has {inputs} inputs, which groups of {grid.group} do not divide",
                key="weights" if fixed else "group_size",
                fix=f"skip it: skip: [{tensor.module}]"
                if fixed
                else f"{instead} would fit, or skip: [{tensor.module}]",
            )
        if format_ in FIXED_GROUPS and (
            wide := next((t for t in spec.stored() if t.dtype in ("F16", "F32", "F64")), None)
        ):
            raise PassError(
                f"{format_} goes with bfloat16 weights beside it, and {wide.name} is {FLOAT_DTYPES[wide.dtype]}",
                key="weights",
                fix="put `- cast: {weights: bf16}` before it",
            )
        return grid

    def memory(self, spec: Spec, settings: CastSettings, width: int) -> int | None:
        """Of a sweep: beside the statistics, their factor twice (ordered, and at work) and copies of one matrix.

        To choose formats within a budget: the model, and what each format changes of it in bfloat16.
        """
        grids = [t for t in self.plan(spec, settings).tensors.values() if t.grid is not None]
        measuring = (
            4 * spec.parameters + 2 * len(settings.formats) * sum(t.count for t in grids) if settings.budgeted else 0
        )
        if not settings.solved:
            return measuring or None
        moments = 7 if settings.tune_epochs else 0
        sweep = sweep_memory(spec, [t.name for t in grids], width, factors=2.0, copies=4, moments=moments, kept=4)
        return max(measuring, sweep)

    def apply(self, checkpoint: Checkpoint, settings: CastSettings, context: Context) -> Checkpoint:
        """Lazily; codes by `gptq` are made here, and the result reads what the sweep left in the work folder."""
        from compress.checkpoint.open import Derived

        chosen = self._allocate(checkpoint, settings, context) if settings.budgeted else {}
        spec = self._planned(checkpoint.spec, settings, chosen)
        read = checkpoint.tensor
        if settings.solved:
            read = self._sweep(checkpoint, spec, settings, context)
        return Derived(
            checkpoint, spec, lambda name: _cast(name, read(name), checkpoint.spec, spec, settings.method != "rtn")
        )

    def _allocate(self, checkpoint: Checkpoint, settings: CastSettings, context: Context) -> dict[str, Grid]:
        """Grids of least measured loss within the budget. Kept in the work folder, so that a resumed run has the same."""
        from compress.calibration.sensitivity import divergences, rounding

        spec = checkpoint.spec
        names = self._open(spec, settings)
        grid = self._choices(spec, settings, []).grid

        def measured() -> dict[str, Any] | None:
            if context.rank:
                return None
            batches = context.data("calibration")
            losses, groups = divergences(
                checkpoint,
                names,
                rounding(grid, settings.formats),
                batches.ids,
                batches.mask,
                setting=("a budget", "name the format with `weights`"),
                device=context.device,
                seed=context.seed,
                progress=context.progress,
            )
            choices = self._choices(spec, settings, groups)
            chosen = choices.allocate(losses, settings.bits, settings.max_bytes)
            return {
                "losses": losses,
                "formats": {n: g.format for n, g in chosen.items()},
                "curve": choices.curve(losses),
            }

        found = once(context, "formats", measured)
        context.details["formats"] = [
            {"tensor": n, "format": f, "divergence": found["losses"][n][f]} for n, f in found["formats"].items()
        ]
        context.details["curve"] = found["curve"]
        return {name: grid(name, format_) for name, format_ in found["formats"].items()}

    def _sweep(self, checkpoint: Checkpoint, spec: Spec, settings: CastSettings, context: Context) -> Any:
        """A function that reads the tensors as the sweep left them; those outside blocks as they were."""
        from compress.calibration.casting import Casting, cast_block
        from compress.calibration.tune import Tuning
        from compress.checkpoint.open import torch_dtype

        record = architectures.of(spec.structure.config)
        grids = {t.name: t.grid for t in spec.stored() if t.grid is not None and record.block_index(t.name) is not None}
        pays = any(grid.bits < TUNED_BELOW for grid in grids.values())
        tuning = Tuning(settings.tune_epochs, settings.tune_rate, batch=2) if settings.tune_epochs and pays else None
        how = Casting(tuning, grids, {n: torch_dtype(spec.tensors[n].dtype) for n in grids})
        sweep = open_sweep(checkpoint, grids, context, work=context.work, with_targets=tuning is not None)
        result = sweep.run(lambda block: cast_block(block, how), f"casting by {settings.method}")
        context.details["blocks"] = result.details
        return result.reader()


def _cast(name: str, value: Value, before: Spec, after: Spec, search: bool) -> Value:
    """One tensor in the format that the plan gave it."""
    from compress.checkpoint.open import Value, torch_dtype
    from compress.solvers.casting import overflowing

    tensor = after.tensors[name]
    target = torch_dtype(tensor.dtype)
    data: torch.Tensor = value.data
    if tensor.grid is not None:
        return value if value.codes is not None else _rounded(value, tensor, tensor.grid, target, search)
    if data.dtype == target:
        return value
    if tensor.dtype == "F16" and (count := overflowing(data, target)):
        raise PassError(
            f"{count} weights of {name} are beyond the range of fp16 (65504)",
            key="weights",
            fix=f"use bf16, or keep the module: skip: [{before.tensors[name].module}]",
        )
    return Value(data.to(target), value.mask)


def _rounded(value: Value, tensor: Tensor, grid: Grid, dtype: torch.dtype, search: bool) -> Value:
    """Rounded to the nearest codes of a grid fitted to the weights alone."""
    import torch

    from compress.checkpoint.open import Value
    from compress.errors import CheckpointError
    from compress.solvers.grids import fit, to_codes, weights

    if not torch.isfinite(value.data).all():
        raise CheckpointError(f"tensor {tensor.name} holds NaN or infinite values, which have no code")
    across = value.data.T if grid.transposed else value.data
    keep = value.mask.T if value.mask is not None and grid.transposed else value.mask
    across = across.float().contiguous()
    codes = to_codes(across, grid, fit(across, grid, None, keep, search=search), dtype, keep)
    data = weights(codes, keep)
    return Value(data.T.contiguous() if grid.transposed else data, value.mask, codes)
