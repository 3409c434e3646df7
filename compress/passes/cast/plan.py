"""Plan of `cast`: the format of every tensor. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from compress.architectures.model_map import Linear, model_map
from compress.errors import PassError
from compress.evaluation.tasks import LANGUAGE, task_of
from compress.passes.cast.budget import Choices
from compress.passes.cast.settings import DTYPES, CastSettings, Format
from compress.passes.selection import matching, select
from compress.spec.formats import FIXED_GROUPS, QuantFormat
from compress.spec.spec import FLOAT_DTYPES, Spec, Tensor, widest

#: Remark about a cache without stored scales.
NO_SCALES = (
    "the fp8 cache has no calibrated scales: vLLM takes 1, SGLang does not quantise; `data.calibration` gives it scales"
)
#: Bits per code from which no step after GPTQ pays.
FINE = 6


def planned(spec: Spec, settings: CastSettings, chosen: Mapping[str, QuantFormat]) -> Spec:
    """Spec with the formats ``chosen`` for some tensors, and those of the settings for the rest."""
    formats = _formats(spec, settings)
    _check_groups(spec, settings, {n: f for n, f in formats.items() if f is not None and n not in chosen})

    linears = model_map(spec).linears

    def change(tensor: Tensor) -> Tensor:
        if tensor.name in chosen:
            return replace(tensor, quant_format=chosen[tensor.name])
        format_ = formats.get(tensor.name)
        if format_ is None:
            return tensor
        if format_ in DTYPES:
            return replace(tensor, dtype=DTYPES[format_])
        return replace(tensor, quant_format=_grid(spec, linears[tensor.name], settings, format_))

    cast = spec.map(change)
    if cast.tensors == spec.tensors and not settings.allow_noop:
        raise PassError(f"every weight is {settings.weights} already", key="weights", fix="leave the pass out")
    routers = _routers(spec)
    dtypes = [t.dtype for t in cast.stored() if t.dtype in FLOAT_DTYPES and t.module not in routers]
    config = dict(spec.structure.config)
    if dtypes:
        config.pop("torch_dtype", None)
        config["dtype"] = FLOAT_DTYPES[widest(dtypes)]
    tensors = {
        n: replace(t, dtype=cast.tensors[t.alias_of].dtype) if t.alias_of else t for n, t in cast.tensors.items()
    }
    cached, scales = _cached(spec, settings)
    tensors |= {s.name: s for s in scales}
    return replace(cast, structure=replace(spec.structure, config=config, kv_cache=cached), tensors=tensors)


def _cached(spec: Spec, settings: CastSettings) -> tuple[str | None, list[Tensor]]:
    """Format of cached keys and values, and their static scales. Raises `PassError` without a cache."""
    if settings.kv_cache is not None and task_of(spec.structure.class_name) is not LANGUAGE:
        raise PassError(
            f"{spec.structure.class_name or 'this model'} caches no keys and values", key="kv_cache", fix="leave it out"
        )
    if settings.kv_cache is None:
        return spec.structure.kv_cache, []
    mapped = model_map(spec)
    names = mapped.cache_scales
    if settings.static_cache is None or not names:
        if settings.static_cache == "head":
            what = f"servers read no scales of {spec.structure.model_type}'s cache"
            raise PassError(what, key="kv_cache_scales", fix="leave it out")
        return settings.kv_cache, []
    shape = (mapped.kv_heads, 1, 1) if settings.static_cache == "head" else (1,)
    scales = [Tensor(name, shape, "F32") for pair in names.values() for name in pair]
    return f"{settings.kv_cache}-{settings.static_cache}", scales


def planned_cache(spec: Spec, settings: CastSettings) -> str | None:
    """Format of the cache after the pass."""
    return _cached(spec, settings)[0]


def without_scales(spec: Spec) -> Spec:
    """Spec without static scales of the cache."""
    return replace(spec, tensors={n: t for n, t in spec.tensors.items() if not t.is_cache_scale})


def undecided(spec: Spec, settings: CastSettings) -> list[str]:
    """Tensors whose format the budget chooses."""
    formats = _formats(spec, settings)
    return [name for name, format_ in formats.items() if format_ is None]


def choices(spec: Spec, settings: CastSettings, groups: Sequence[Sequence[str]]) -> Choices:
    """Options of the budget; the tensors of a group get the same format. Raises `PassError`."""
    if settings.group_size is not None:
        names = undecided(spec, settings)
        for option in settings.options:
            _check_groups(spec, settings, dict.fromkeys(names, option))

    linears = model_map(spec).linears

    def quant_format(name: str, option: str) -> QuantFormat:
        linear, format_ = linears[name], option.partition("/")[0]
        if settings.group_size is None and format_ not in FIXED_GROUPS:  # the first group size that divides the width
            among = (option, format_, f"{format_}/channel")
            option = next(o for o in among if not _leftover(linear, settings.quant_format(o)))
        return _grid(spec, linear, settings, option)

    return Choices(spec, groups, tuple(settings.options), quant_format)


def _formats(spec: Spec, settings: CastSettings) -> dict[str, Format | None]:
    """Format of every tensor that the pass touches; None where a budget chooses it."""
    modules = [tensor.module for tensor in spec.stored()]
    routers = _routers(spec)
    default = [module for module in modules if module not in routers]
    if settings.weights not in DTYPES and not settings.only:
        default = [linear.module for linear in model_map(spec).targets if len(linear.tensor.shape) == 2]
    chosen = select(default, settings, modules)
    overrides: dict[str, Format] = {}
    for pattern, override in reversed(settings.overrides.items()):  # the first pattern that matches wins
        overrides |= dict.fromkeys(matching(pattern, dict.fromkeys(modules), "overrides"), override)
    if settings.weights not in DTYPES:
        chosen |= overrides.keys()
    result: dict[str, Format | None] = {}
    for tensor in spec.stored():
        if tensor.module not in chosen or tensor.dtype not in FLOAT_DTYPES or tensor.quant_format is not None:
            continue
        format_ = overrides.get(tensor.module, settings.weights)
        if format_ in DTYPES or (len(tensor.shape) == 2 and tensor.name.endswith(".weight")):
            result[tensor.name] = format_
    if settings.weights not in DTYPES and settings.weights not in result.values():
        raise PassError("no weight matrix is left to cast", key="only" if settings.only else "skip")
    return result


def _routers(spec: Spec) -> set[str]:
    """Modules that choose experts: rounded, they would choose others, and they have few weights."""
    return {linear.module for linear in model_map(spec).linears.values() if linear.role == "router"}


def _leftover(linear: Linear, quant_format: QuantFormat) -> int:
    """Number of inputs that do not fill a group of the format; 0 where groups divide them."""
    return linear.I % quant_format.group if quant_format.group else 0


def _check_groups(spec: Spec, settings: CastSettings, formats: Mapping[str, str]) -> None:
    """Raise `PassError` that names all tensors whose inputs the group size does not divide."""
    linears = model_map(spec).linears
    by_grid: dict[QuantFormat, list[Linear]] = {}
    for name, option in formats.items():
        format_ = option.partition("/")[0]
        if format_ in DTYPES:
            continue
        quant_format, linear = settings.quant_format(option), linears[name]
        if _leftover(linear, quant_format) and (format_ in FIXED_GROUPS or linear.role != "factor"):
            by_grid.setdefault(quant_format, []).append(linear)
    for quant_format, refused in by_grid.items():
        _refuse_groups(refused, quant_format)


def _refuse_groups(linears: Sequence[Linear], quant_format: QuantFormat) -> NoReturn:
    """Raise `PassError` that names these tensors, and a group size that divides their inputs."""
    widths = [linear.I for linear in linears]
    modules = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", linear.module) for linear in linears)
    patterns = ", ".join([linears[0].module] if len(linears) == 1 else modules)
    common = math.gcd(*widths)
    size = next((s for s in (256, 128, 64, 32, 16, 8) if common % s == 0 and s < quant_format.group), None)
    fixed = quant_format.format in FIXED_GROUPS
    others = f", nor those of {len(linears) - 1} others ({', '.join(map(str, sorted(set(widths))))})"
    raise PassError(
        f"{linears[0].name} has {widths[0]} inputs, which groups of {quant_format.group} do not divide"
        + (others if len(linears) > 1 else ""),
        key="weights" if fixed else "group_size",
        fix=(
            f"skip {'it' if len(linears) == 1 else 'them'}: "
            if fixed
            else f"group_size: {size or 'channel'} would fit, or "
        )
        + f"skip: [{patterns}]",
    )


def _grid(spec: Spec, linear: Linear, settings: CastSettings, option: str) -> QuantFormat:
    quant_format, format_ = settings.quant_format(option), option.partition("/")[0]
    if linear.transposed:
        quant_format = replace(quant_format, transposed=True)
    if _leftover(linear, quant_format) and format_ not in FIXED_GROUPS and linear.role == "factor":
        quant_format = replace(quant_format, group=0)  # ranks need not be multiples of a group
    if _leftover(linear, quant_format):
        _refuse_groups([linear], quant_format)
    if format_ in FIXED_GROUPS and (wide := next((t for t in spec.stored() if t.dtype in ("F16", "F32", "F64")), None)):
        raise PassError(
            f"{format_} goes with bfloat16 weights beside it, and {wide.name} is {FLOAT_DTYPES[wide.dtype]}",
            key="weights",
            fix="put `- cast: {weights: bf16}` before it",
        )
    return quant_format
