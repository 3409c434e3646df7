"""Store weights in another number format: floats tensor by tensor, codes (integers, small floats) also block by block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from compress.architectures.model_map import model_map
from compress.errors import CheckpointError, PassError
from compress.passes.base import EDITED, Context, Mode, Pass, Storage
from compress.passes.blockwise import (
    measured_divergences,
    open_runner,
    runner_memory,
)
from compress.passes.cast.budget import assumed
from compress.passes.cast.plan import choices, planned, planned_cache, undecided, without_scales
from compress.passes.cast.settings import CastSettings
from compress.solvers.memory import GPTQ, GPTQ_CORRECTED, NO_SOLVER
from compress.spec.formats import QuantFormat
from compress.spec.spec import Spec, Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Checkpoint, Value

#: Of a cache whose scales the files do not hold.
NO_SCALES = (
    "the fp8 cache has no calibrated scales: vLLM takes 1, SGLang does not quantise; `data.calibration` gives it scales"
)
#: Bits of a code from which rounding is so fine that nothing after GPTQ pays.
FINE = 6


class Cast(Pass[CastSettings]):
    """Other floats become the chosen format; integers, and buffers of other kinds, stay.

    Removed weights stay zero. Codes are stored as compressed-tensors where it can express them, and load in stock
    transformers. The compact store holds the codes instead if a mask saves bytes there, or if compressed-tensors does not
    know the module.

    Sample recipe::

        passes:
          - cast: {weights: int4}
    """

    name: ClassVar[str] = "cast"
    summary: ClassVar[str] = "Store the weights in another number format."
    settings = CastSettings
    mode = "blockwise"
    needs = frozenset({"calibration"})
    accepts: ClassVar[frozenset[Storage]] = EDITED | {"float"}
    yields: ClassVar[frozenset[Storage]] = frozenset({"float", "integer"})
    source: ClassVar[str] = (
        "IEEE 754-2019, 4.3.1 (round to nearest, ties to even); gptq: GPTQ, arXiv 2210.17323; asymmetric: GPTAQ, arXiv "
        "2504.02692; alternating: QuantEase, arXiv 2309.01885; curvature: YAQA, arXiv 2505.22988; block reconstruction: BRECQ, "
        "arXiv 2102.05426; formats: compressed-tensors"
    )

    def completed(self, settings: CastSettings, given: Collection[str]) -> CastSettings:
        """Static scales of a cache where there are calibration data to find them on."""
        if settings.kv_cache is None or settings.kv_cache_scales is not None:
            return settings
        return settings.model_copy(update={"kv_cache_scales": "tensor" if "calibration" in given else "none"})

    def mode_for(self, settings: CastSettings) -> Mode:
        """Tensor by tensor for floats and by `rtn` and `mse`; block by block, or with the whole model at first, else.

        Static scales of a cache are found block by block.
        """
        return "blockwise" if settings.solved or settings.budgeted or settings.static_cache else "stream"

    def required_data(self, settings: CastSettings) -> frozenset[str]:
        """Calibration data for codes by `gptq`, to choose formats, and for static scales of a cache."""
        return self.needs if self.mode_for(settings) == "blockwise" else frozenset()

    def output_storage(self, settings: CastSettings) -> frozenset[Storage]:
        """Integers (codes of any kind) if any are asked for."""
        return frozenset({"float", "integer"} if settings.coded else {"float"})

    def plan(self, spec: Spec, settings: CastSettings) -> Spec:
        """Exact but for budgets: dtypes and codes change, shapes and keep-masks stay; ``config.dtype`` is the widest kept.

        With a budget, the formats are those of a model whose matrices all matter alike.
        """
        mapped = model_map(spec)
        if self.required_data(settings) and mapped.known:
            mapped.require_blockwise("set `weights` and `method: rtn`")
        if not settings.budgeted:
            cast = planned(spec, settings, {})
            if settings.solved and mapped.known:
                coded = [
                    t.name
                    for t in cast.stored()
                    if t.quant_format is not None and spec.tensors[t.name].quant_format is None
                ]
                mapped.require_layers(coded, "use `method: rtn`")
            return cast
        from compress.passes.allocation import require_divergence

        names = undecided(spec, settings)
        key = "bits" if settings.bits is not None else "max_bytes"
        require_divergence(spec, names, ("a budget", "name the format with `weights`"), key)
        among = choices(spec, settings, [[n] for n in names])
        losses = {
            n: {o: assumed(among.quant_format(n, o)) * spec.tensors[n].count for o in among.options} for n in names
        }
        chosen = among.allocate(losses, settings.bits, settings.max_bytes)
        return replace(planned(spec, settings, among.quant_formats(chosen)), exact=False)

    def memory(self, spec: Spec, settings: CastSettings, width: int) -> int | None:
        """Of a sweep: statistics, drift, factor and damped copies of them, curvatures by outputs, and copies of one matrix.

        To choose formats within a budget: the model, and what each format changes of it in bfloat16.
        """
        quant_formats = [t for t in self.plan(spec, settings).tensors.values() if t.quant_format is not None]
        measuring = (
            4 * spec.parameters + 2 * len(settings.formats) * sum(t.count for t in quant_formats)
            if settings.budgeted
            else 0
        )
        if not settings.solved:
            cached = runner_memory(spec, [], width, NO_SOLVER) if settings.static_cache else 0
            return max(measuring, cached) or None
        coarse = any(t.quant_format is not None and t.quant_format.bits < FINE for t in quant_formats)
        names = [t.name for t in quant_formats]
        if not coarse or not (settings.error_correction or settings.reconstruction_epochs):
            return max(measuring, runner_memory(spec, names, width, GPTQ))
        runner = runner_memory(
            spec,
            names,
            width,
            GPTQ_CORRECTED,
            reconstruction="scales" if settings.reconstruction_epochs else None,
            output_curvature="curvature" in settings.error_correction and model_map(spec).has_head,
        )
        return max(measuring, runner)

    def apply(self, checkpoint: Checkpoint, settings: CastSettings, context: Context) -> Checkpoint:
        """Lazily; codes by `gptq` are made here, and the result reads what the sweep left in the work folder."""
        from compress.checkpoint.values import Derived, Value

        if self.plan_notes(checkpoint.spec, settings):
            context.details["kv_cache"] = NO_SCALES
        chosen = self._allocate(checkpoint, settings, context) if settings.budgeted else {}
        spec = planned(checkpoint.spec, settings, chosen)
        read = checkpoint.tensor
        if settings.solved:
            read = self._sweep(checkpoint, spec, settings, context)

        def cast(name: str) -> Value:
            return _cast(name, read(name), checkpoint.spec, spec, settings.method != "rtn")

        if spec.structure.kv_cache is None or not any(t.is_cache_scale for t in spec.stored()):
            return Derived(checkpoint, spec, cast)
        scales = _cache_scales(Derived(checkpoint, without_scales(spec), cast), spec, context)
        return Derived(checkpoint, spec, lambda name: Value(scales[name]) if name in scales else cast(name))

    def plan_notes(self, spec: Spec, settings: CastSettings) -> list[str]:
        """What servers make of a cache without scales."""
        if settings.kv_cache is None or planned_cache(spec, settings) != settings.kv_cache:
            return []
        return [NO_SCALES]

    def _allocate(self, checkpoint: Checkpoint, settings: CastSettings, context: Context) -> dict[str, QuantFormat]:
        """Grids of least measured loss within the budget. Kept in the work folder, so that a resumed run has the same."""
        from compress.sensitivity.matrices import RoundingDelta

        spec = checkpoint.spec
        names = undecided(spec, settings)
        known = choices(spec, settings, [])

        def measured() -> dict[str, Any] | None:
            if context.processes.rank:
                return None
            rounding = RoundingDelta(known.quant_format, settings.options)
            found, groups = measured_divergences(
                checkpoint, names, rounding, ("a budget", "name the format with `weights`"), context
            )
            losses = rounding.scaled(found)
            among = choices(spec, settings, groups)
            chosen = among.allocate(losses, settings.bits, settings.max_bytes)
            return {"losses": losses, "formats": chosen, "curve": among.curve(losses)}

        found = context.workspace.cached("formats", measured)
        context.details["formats"] = [
            {"tensor": n, "format": f, "divergence": found["losses"][n][f]} for n, f in found["formats"].items()
        ]
        context.details["curve"] = found["curve"]
        return known.quant_formats(found["formats"])

    def _sweep(self, checkpoint: Checkpoint, spec: Spec, settings: CastSettings, context: Context) -> Any:
        """A function that reads the tensors as the sweep left them; those outside blocks as they were."""
        from compress.blockwise.reconstruct import Reconstruction
        from compress.checkpoint.values import torch_dtype
        from compress.passes.cast.block import CastOptions, cast_block
        from compress.sensitivity.output_curvature import Gradients

        record = model_map(spec).record
        quant_formats = {
            t.name: t.quant_format
            for t in spec.stored()
            if t.quant_format is not None and record.block_index(t.name) is not None
        }
        if not quant_formats:  # tables alone, which are rounded as they are read
            return checkpoint.tensor
        coarse = any(quant_format.bits < FINE for quant_format in quant_formats.values())
        reconstruction = (
            Reconstruction(settings.reconstruction_epochs, settings.reconstruction_lr, batch=2)
            if settings.reconstruction_epochs and coarse
            else None
        )
        dtypes = {n: torch_dtype(spec.tensors[n].dtype) for n in quant_formats}
        correction = settings.error_correction if coarse else []
        with_targets = "asymmetric" in correction or "curvature" in correction or reconstruction is not None
        runner = open_runner(
            checkpoint,
            quant_formats,
            context,
            workspace=context.workspace,
            with_targets=with_targets,
        )
        gradients = None
        if "curvature" in correction:
            gradients = Gradients(runner.executor, context.workspace.folder("gradients"), context.progress)
        options = CastOptions(
            reconstruction, quant_formats, dtypes, "asymmetric" in correction, "alternating" in correction, gradients
        )
        result = runner.run(
            lambda block: cast_block(block, options),
            f"casting by {settings.method}",
            gradients.measure if gradients is not None else None,
        )
        context.details["blocks"] = result.details
        return result.reader()


def _cache_scales(checkpoint: Checkpoint, spec: Spec, context: Context) -> dict[str, torch.Tensor]:
    """Static scales of the cache of a cast checkpoint, by name; kept in the work folder, so that a resumed run has the same."""
    from compress.blockwise.executor import Inputs
    from compress.passes.cast.kv_cache import largest_cached, to_scales

    batches = context.data("calibration")
    found = context.workspace.cached(
        "cache",
        lambda: largest_cached(
            checkpoint,
            Inputs(batches.values, batches.mask),
            workspace=context.workspace.folder("cache"),
            dtype=context.dtype,
            device=context.device,
            progress=context.progress,
            seed=context.seed,
        ),
    )
    by_head = spec.structure.kv_cache == "fp8-head"
    scales: dict[str, torch.Tensor] = {}
    for names, pair in zip(model_map(spec).cache_scales.values(), found, strict=True):
        scales |= {name: to_scales(largest, by_head=by_head) for name, largest in zip(names, pair, strict=True)}
    largest = [[max(x) for x in side] for side in zip(*found, strict=True)]
    context.details["cached keys and values"] = (
        f"{'a scale per head' if by_head else 'a scale per layer'}; largest magnitudes over the calibration data, by layer: "
        f"keys {min(largest[0]):.3g} to {max(largest[0]):.3g}, values {min(largest[1]):.3g} to {max(largest[1]):.3g}"
    )
    return scales


def _cast(name: str, value: Value, before: Spec, after: Spec, search: bool) -> Value:
    """One tensor in the format that the plan gave it."""
    from compress.checkpoint.values import Value, torch_dtype
    from compress.solvers.quant_format import overflowing

    tensor = after.tensors[name]
    target = torch_dtype(tensor.dtype)
    data: torch.Tensor = value.data
    if tensor.quant_format is not None:
        return value if value.codes is not None else _rounded(value, tensor, tensor.quant_format, target, search)
    if data.dtype == target:
        return value
    if tensor.dtype == "F16" and (count := overflowing(data, target)):
        raise PassError(
            f"{count} weights of {name} are beyond the range of fp16 (65504)",
            key="weights",
            fix=f"use bf16, or keep the module: skip: [{before.tensors[name].module}]",
        )
    return Value(data.to(target), value.mask)


def check_finite(name: str, data: torch.Tensor) -> None:
    """Raises `CheckpointError` for a tensor with values that have no code."""
    import torch

    # the extremes are NaN where any value is: faster than to look at every weight
    if data.numel() and not torch.isfinite(torch.stack(torch.aminmax(data))).all():
        raise CheckpointError(f"tensor {name} holds NaN or infinite values, which have no code")


def _rounded(value: Value, tensor: Tensor, quant_format: QuantFormat, dtype: torch.dtype, search: bool) -> Value:
    """Rounded to the nearest codes of a grid fitted to the weights alone."""
    from compress.checkpoint.values import Value
    from compress.solvers.quant_format import dequantize, rounded

    check_finite(tensor.name, value.data)
    across = value.data.T if quant_format.transposed else value.data
    keep = value.mask.T if value.mask is not None and quant_format.transposed else value.mask
    codes = rounded(across, quant_format, dtype, keep, search=search)

    def data() -> torch.Tensor:
        found = dequantize(codes, keep)
        return found.T.contiguous() if quant_format.transposed else found

    return Value(data, value.mask, codes)
