"""Store weights in another number format: floats tensor by tensor, codes (integers, small floats) also block by block."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.architectures.model_map import model_map
from compress.checkpoint.running import expert_note
from compress.errors import PassError
from compress.passes.base import EDITED, Context, InputMultiple, Mode, Pass, Storage
from compress.passes.cast.allocation import allocate_formats
from compress.passes.cast.budget import assumed
from compress.passes.cast.plan import (
    FINE,
    NO_SCALES,
    choices,
    encoder_note,
    group_note,
    left_note,
    planned,
    planned_cache,
    undecided,
    without_scales,
)
from compress.passes.cast.settings import DTYPES, CastSettings
from compress.passes.cast.transforms import plan as transforms
from compress.passes.memory import divergence_memory, runner_memory
from compress.passes.work import DataSizes, SampleSize, Tuning, divergence_work, runner_work
from compress.solvers.memory import GPTQ, GPTQ_CORRECTED, NO_SOLVER, ROUNDED, TRELLIS, SolverMemory
from compress.spec.formats import FIXED_GROUPS, INTEGERS, QuantFormat
from compress.spec.spec import Spec
from compress.work import Work

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value


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
        "arXiv 2102.05426; smoothing: SmoothQuant, arXiv 2211.10438; rotations: QuaRot, arXiv 2404.00456; formats: "
        "compressed-tensors"
    )

    def completed(
        self, settings: CastSettings, given: Collection[str], store: Literal["stock", "compact"]
    ) -> CastSettings:
        """Choose static scales of the cache if there is calibration data; fused experts and kernels if files can hold them."""
        update: dict[str, Any] = {}
        if settings.kv_cache is not None and settings.kv_cache_scales is None:
            update["kv_cache_scales"] = "tensor" if "calibration" in given else "none"
        if settings.fused_experts is None and settings.coded:
            update["fused_experts"] = store == "compact"
        if settings.convolutions is None and settings.coded:
            update["convolutions"] = store == "compact"
        return settings.model_copy(update=update).stored_in(store)

    def input_multiple(self, settings: CastSettings) -> InputMultiple:
        """The groups of mxfp4 and nvfp4, and those of `group_size`, are needed; groups of 64 by default are preferred."""
        coded = [settings.quant_format(f) for f in settings.formats_used - set(DTYPES)]
        asked = [f.group for f in coded if f.group and (_divides(settings) or f.format in FIXED_GROUPS)]
        return InputMultiple(lcm(*asked), lcm(*(f.group for f in coded if f.group)))

    def mode_for(self, settings: CastSettings) -> Mode:
        """``blockwise`` for `gptq`, a budget, `smoothing` and static scales; ``stream`` for floats, `rtn` and `mse`."""
        return "blockwise" if settings.solved or settings.budgeted or settings.measured else "stream"

    def required_data(self, settings: CastSettings) -> frozenset[str]:
        """Calibration data in mode ``blockwise``."""
        return self.needs if self.mode_for(settings) == "blockwise" else frozenset()

    def depends_on_effort(self, settings: CastSettings) -> bool:
        """With `gptq` to few bits: finer codes get no correction."""
        codes = settings.formats_used - set(DTYPES)
        return settings.solved and any(settings.quant_format(f).bits < FINE for f in codes)

    def output_storage(self, settings: CastSettings) -> frozenset[Storage]:
        """Floats, and integers (codes of any kind) if the settings ask for codes."""
        return frozenset({"float", "integer"} if settings.coded else {"float"})

    def plan(self, spec: Spec, settings: CastSettings) -> Spec:
        """Change dtypes and formats; shapes and keep-masks stay. ``config.dtype`` is the widest dtype that remains.

        Exact, except with a budget: then the plan assumes that all matrices matter alike.
        """
        spec = transforms.transformed_spec(spec, settings)
        mapped = model_map(spec)
        if not settings.budgeted:
            cast = planned(spec, settings, {})
            if settings.solved and mapped.known:
                coded = [
                    t.name
                    for t in cast.stored()
                    if t.quant_format is not None and spec.tensors[t.name].quant_format is None
                ]
                mapped.require_layers(coded, "use `method: rtn`")
                _require_own_scales(cast)
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
        """Bytes of the block runner; with a budget also of measuring divergences."""
        quant_formats = [t for t in self.plan(spec, settings).tensors.values() if t.quant_format is not None]
        measuring = 0
        if settings.budgeted:
            probes = len(set(settings.options.values()))
            measuring = divergence_memory(spec, undecided(spec, settings), width, ROUNDED, probes)
        if not settings.solved:
            return max(measuring, runner_memory(spec, [], width, NO_SOLVER) if settings.measured else 0) or None
        coarse = any(t.quant_format is not None and t.quant_format.bits < FINE for t in quant_formats)
        names = [t.name for t in quant_formats]
        bytewise = all(t.quant_format is not None and INTEGERS.get(t.quant_format.format, 8) < 8 for t in quant_formats)
        kept = GPTQ.kept - bytewise
        formats = [t.quant_format for t in quant_formats if t.quant_format is not None]
        correction = settings.correction(formats)
        if not coarse or not (correction or settings.reconstruction_epochs):
            return max(measuring, *(runner_memory(spec, names, width, each) for each in _solvers(formats, GPTQ, kept)))
        runners = (
            runner_memory(
                spec,
                names,
                width,
                solver,
                reconstruction="scales" if settings.reconstruction_epochs else None,
                output_curvature="curvature" in correction and model_map(spec).has_head,
            )
            for solver in _solvers(formats, GPTQ_CORRECTED, kept)
        )
        return max(measuring, *runners)

    def work(self, spec: Spec, settings: CastSettings, sizes: DataSizes) -> Work | None:
        """Work of the block runner, or of rounding; None for static scales, and for trellis codes without calibration.

        Of a budget also the work of measuring divergences; the formats are those that the plan assumes.
        """
        if settings.static_cache or settings.static_inputs or not model_map(spec).known:
            return None
        after = self.plan(spec, settings)
        coded = {t.name: t.quant_format for t in after.stored() if t.quant_format is not None}
        if not settings.solved and any(quant_format.is_trellis for quant_format in coded.values()):
            return None
        if (work := transforms.work(spec, settings, sizes.calibration)) is None:
            return None
        if settings.budgeted:
            if sizes.calibration is None:
                return None
            work.add_all(_budget_work(spec, settings, sizes.calibration))
        if settings.solved:
            if (solved := _solved_work(spec, settings, coded, sizes.calibration)) is None:
                return None
            work.add_all(solved)
            return work
        for tensor in after.stored():
            if tensor.name in coded:
                work.add("nearest" if settings.method == "rtn" else "searched", 1, tensor.count)
            elif tensor.is_float:
                work.add("values", 0, 1, tensor.count)
        return work

    def apply(self, checkpoint: Checkpoint, settings: CastSettings, context: Context) -> Checkpoint:
        """Run the block runner if needed. The result reads its tensors from the workspace and rounds others lazily."""
        from compress.checkpoint.values import Derived, Value
        from compress.passes.cast.block import cast_blocks
        from compress.passes.cast.convert import convert
        from compress.passes.cast.global_scales import GlobalScales
        from compress.passes.cast.kv_cache import cache_scales
        from compress.passes.cast.static_inputs import input_scales
        from compress.passes.cast.transforms.apply import transformed

        checkpoint = transformed(checkpoint, settings, context)
        if _lacks_scales(checkpoint.spec, settings):
            context.details["kv_cache"] = NO_SCALES
        chosen = allocate_formats(checkpoint, settings, context) if settings.budgeted else {}
        spec = planned(checkpoint.spec, settings, chosen)
        if (note := group_note(checkpoint.spec, settings, spec)) is not None:
            context.details["groups"] = note
        if (note := left_note(checkpoint.spec, settings)) is not None:
            context.details["left"] = note
        read, overall = checkpoint.tensor, GlobalScales(checkpoint, spec)
        if settings.solved:
            read = cast_blocks(checkpoint, spec, settings, context, overall)
        inputs: dict[str, dict[str, Any]] = {}

        def cast(name: str) -> Value:
            value = convert(name, read(name), checkpoint.spec, spec, overall, search=settings.method != "rtn")
            return value if name not in inputs else value.with_inputs(inputs[name])

        if settings.static_inputs:
            inputs |= input_scales(Derived(checkpoint, without_scales(spec), cast), spec, context)

        if spec.structure.kv_cache is None or not any(t.is_cache_scale for t in spec.stored()):
            return Derived(checkpoint, spec, cast)
        scales = cache_scales(Derived(checkpoint, without_scales(spec), cast), spec, context)
        return Derived(checkpoint, spec, lambda name: Value(scales[name]) if name in scales else cast(name))

    def plan_notes(self, spec: Spec, settings: CastSettings) -> list[str]:
        """Matrices that the default group size does not divide, and how servers treat a cache without scales."""
        scales = NO_SCALES if _lacks_scales(spec, settings) else None
        cast = self.plan(spec, settings)
        notes = (
            *transforms.notes(spec, settings),
            scales,
            left_note(spec, settings),
            group_note(spec, settings, cast),
            encoder_note(spec, settings, cast),
            expert_note(cast),
        )
        return [note for note in notes if note is not None]


def _divides(settings: CastSettings) -> bool:
    """Whether `group_size` is a number, which must divide the inputs of every matrix."""
    return isinstance(settings.group_size, int)


def _budget_work(spec: Spec, settings: CastSettings, size: SampleSize) -> Work:
    """Work of measuring what rounding to each format costs."""
    names, options = undecided(spec, settings), settings.options
    result = divergence_work(spec, dict.fromkeys(names, len(set(options.values()))), size)
    for name in names:
        result.add("nearest", 1, spec.tensors[name].count, len(options))
    return result


def _solved_work(
    spec: Spec, settings: CastSettings, coded: Mapping[str, QuantFormat], calibration: SampleSize | None
) -> Work | None:
    if calibration is None:
        return None
    record, coarse = model_map(spec).record, any(quant_format.bits < FINE for quant_format in coded.values())
    correction = settings.error_correction if coarse else []
    epochs = settings.reconstruction_epochs if coarse else 0
    result = runner_work(
        spec,
        {name for name in coded if record.block_index(name) is not None},
        calibration,
        ["gptq", *(["quantease"] if "alternating" in correction else [])],
        factor="factor",
        asymmetric="asymmetric" in correction,
        curvature=settings.curvature_tokens if "curvature" in correction else 0,
        tuning=Tuning(epochs, "scales") if epochs else None,
    )
    for name, quant_format in coded.items():
        if quant_format.is_trellis:
            result.add("trellis", *quant_format.rows(spec.tensors[name].shape))
    return result


def _solvers(formats: Collection[QuantFormat], integers: SolverMemory, kept: float) -> list[SolverMemory]:
    """The memory of the solvers that find codes of some formats."""
    trellises = {quant_format.is_trellis for quant_format in formats}
    return [TRELLIS if each else replace(integers, kept=kept) for each in trellises or {False}]


def _require_own_scales(cast: Spec) -> None:
    """Raise `PassError` for experts in one tensor whose scales have one scale of all, which are solved one by one."""
    coded = ((t.name, t.quant_format) for t in cast.stored() if t.quant_format is not None)
    if name := next((n for n, f in coded if f.experts and f.format == "nvfp4"), None):
        raise PassError(
            f"{name} has one nvfp4 scale for all experts, and `method: gptq` solves them one by one",
            key="weights",
            fix="use mxfp4 or `method: rtn`, or set `fused_experts: false`",
        )


def _lacks_scales(spec: Spec, settings: CastSettings) -> bool:
    """Whether the config will name a quantised cache for which the files hold no scales."""
    return settings.kv_cache is not None and planned_cache(spec, settings) == settings.kv_cache
