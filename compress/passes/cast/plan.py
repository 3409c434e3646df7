"""Plan of `cast`: the format of every tensor. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compress.architectures.model_map import Linear, model_map
from compress.errors import PassError
from compress.evaluation.tasks import LANGUAGE, is_seq2seq, task_of
from compress.passes.cast.budget import Choices
from compress.passes.cast.group_sizes import GroupSizes
from compress.passes.cast.settings import DTYPES, CastSettings, Format
from compress.passes.selection import matching, select
from compress.spec.formats import QuantFormat
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
    spec = _untied(spec, settings)
    sizes = GroupSizes(spec, settings)
    sizes.check({n: f for n, f in formats.items() if f is not None and n not in chosen})

    def change(tensor: Tensor) -> Tensor:
        if tensor.name in chosen:
            return replace(tensor, quant_format=chosen[tensor.name])
        format_ = formats.get(tensor.name)
        if format_ is None:
            return tensor
        if format_ in DTYPES:
            return replace(tensor, dtype=DTYPES[format_])
        return replace(tensor, quant_format=sizes.quant_format(tensor.name, format_))

    cast = spec.map(change)
    if cast.tensors == spec.tensors and not settings.allow_noop and not settings.rotations:
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
    structure = replace(spec.structure, config=config, kv_cache=cached, runtime=settings.runtime)
    return replace(cast, structure=structure, tensors=tensors)


def _untied(spec: Spec, settings: CastSettings) -> Spec:
    """The spec with a head of its own, where the table that it shares gets codes for vLLM, which reads no shared ones."""
    head = model_map(spec).head_weight
    if settings.runtime != "vllm" or head is None or head.alias_of is None:
        return spec
    coded = [p for p, format_ in settings.overrides.items() if format_ not in DTYPES]
    coded += settings.only if settings.weights not in DTYPES else []
    modules = [*(tensor.module for tensor in spec.stored()), head.module]
    named = {module for pattern in coded for module in matching(pattern, modules, "overrides")}
    if not named & {head.module, spec.tensors[head.alias_of].module}:
        return spec
    return untied(spec, head)


def untied(spec: Spec, tensor: Tensor) -> Spec:
    """The spec in which head and embeddings share no weights. ``tensor``: the one of them that is an alias."""
    structure = replace(spec.structure, config={**spec.structure.config, "tie_word_embeddings": False})
    return replace(spec, structure=structure, tensors={**spec.tensors, tensor.name: replace(tensor, alias_of=None)})


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


def takes_codes(spec: Spec, settings: CastSettings) -> set[str]:
    """Tensors that get codes, those of a budget too."""
    return {name for name, format_ in _formats(spec, settings).items() if format_ not in DTYPES}


def choices(spec: Spec, settings: CastSettings, groups: Sequence[Sequence[str]]) -> Choices:
    """Options of the budget. Tensors of a group get the same format, and so do all experts, as stock loaders fuse them.

    Raises:
        PassError: a fixed group size does not divide some inputs.
    """
    sizes, names = GroupSizes(spec, settings), undecided(spec, settings)
    for option in settings.options:
        sizes.check(dict.fromkeys(names, option))
    is_expert = model_map(spec).is_expert
    apart = [list(group) for group in groups if not is_expert(group[0])]
    experts = list(dict.fromkeys(name for group in groups if is_expert(group[0]) for name in group))
    grouped = [*apart, *([experts] if experts else [])]
    return Choices(
        spec,
        grouped,
        tuple(settings.options),
        sizes.quant_format,
        lambda formats: planned(spec, settings, formats),
        settings.store,
    )


def left_note(spec: Spec, settings: CastSettings) -> str | None:
    """A sentence on experts and kernels that keep their format as stock loaders read no codes of them; None without such."""
    if settings.only or settings.weights in DTYPES:
        return None
    targets = model_map(spec).targets
    experts = sorted({x.module for x in targets if x.experts and not settings.fused_experts})
    kernels = sorted({x.module for x in targets if x.kernel and not settings.convolutions})
    parts = [
        f"{left[0]} and its like keep their format: stock loaders read no codes of {what}"
        for left, what in ((experts, "experts that files hold in one tensor"), (kernels, "convolutions"))
        if left
    ]
    return "; ".join([*parts, "`store: compact` casts them"]) if parts else None


def encoder_note(spec: Spec, settings: CastSettings, cast: Spec) -> str | None:
    """A sentence where the matrices of an encoder get no gradients, which go back through the decoder alone; None elsewhere."""
    coarse = any(t.quant_format is not None and t.quant_format.bits < FINE for t in cast.tensors.values())
    if not (settings.solved and coarse and "curvature" in settings.error_correction and is_seq2seq(spec.structure)):
        return None
    return "`curvature` weighs the errors of the decoder's matrices; those of the encoder are rounded without it"


def group_note(spec: Spec, settings: CastSettings, cast: Spec) -> str | None:
    """A sentence on matrices that the default group size does not divide; None where there are none.

    Args:
        spec, cast: before and after the pass.
    """
    quant_formats = {
        t.name: t.quant_format
        for t in cast.stored()
        if t.quant_format is not None and spec.tensors[t.name].quant_format is None
    }
    return GroupSizes(spec, settings).note(quant_formats)


def _formats(given: Spec, settings: CastSettings) -> dict[str, Format | None]:
    """Format of every tensor that the pass touches; None where a budget chooses it. A head that is untied gets its table's."""
    spec = _untied(given, settings)
    mapped, modules = model_map(spec), [tensor.module for tensor in spec.stored()]
    routers = _routers(spec)
    default = [module for module in modules if module not in routers]
    if settings.weights not in DTYPES and not settings.only:
        default = [x.module for x in mapped.targets if _takes(x, settings)]
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
        linear = mapped.linears.get(tensor.name)
        matrix = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
        if format_ in DTYPES or matrix or (linear is not None and (linear.experts or linear.kernel)):
            result[tensor.name] = format_
    if spec is not given and mapped.head_weight is not None and mapped.embedding in result:
        result.setdefault(mapped.head_weight.name, result[mapped.embedding])
    if settings.weights not in DTYPES and settings.weights not in result.values():
        raise _nothing_left(spec, settings)
    return result


def _takes(linear: Linear, settings: CastSettings) -> bool:
    """Whether it gets codes by default: linear layers; where the store can hold them, experts in one tensor and kernels."""
    if linear.kernel:
        return bool(settings.convolutions)
    return len(linear.tensor.shape) == 2 or bool(settings.fused_experts and linear.experts)


def _nothing_left(spec: Spec, settings: CastSettings) -> PassError:
    """The error for a model of which no matrix gets codes."""
    if (
        not settings.only
        and not settings.convolutions
        and (kernels := [x for x in model_map(spec).targets if x.kernel])
    ):
        return PassError(
            f"the weights of {spec.structure.class_name or spec.structure.model_type} are kernels of convolutions, such as "
            f"{kernels[0].name}, and stock loaders read no codes of these",
            key="weights",
            fix="use `store: compact`",
        )
    return PassError("no weight matrix is left to cast", key="only" if settings.only else "skip")


def _routers(spec: Spec) -> set[str]:
    """Modules that choose experts: rounded, they would choose others, and they have few weights."""
    return {linear.module for linear in model_map(spec).linears.values() if linear.role == "router"}
