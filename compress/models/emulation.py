"""Quantised activations and key-value caches, computed in floats.

Inputs of linear layers are rounded by the exact steps of compressed-tensors 0.20 (``forward_quantize``), so a model has the
logits that it has in stock transformers. Keys and values are rounded as in vLLM's cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import CheckpointError
from compress.spec.formats import BLOCK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Smallest and largest code of a format.
_RANGES = {"int4": (-8.0, 7.0), "int8": (-128.0, 127.0), "fp8": (-448.0, 448.0)}
#: OCP MX format ▶ values that share a power of two, the exponent of its largest power of two, its largest value.
_MX = {"mxfp4": (32, 2, 6.0), "mxfp8": (32, 8, 448.0)}
#: Names of the cache among the arguments of attention modules, by version and family.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")


def rounded_by_token(values: torch.Tensor, format_: str) -> torch.Tensor:
    """Round values [batch, tokens, …] to codes times a scale for each token, from its largest value.

    Values of one or two axes have one scale for all, as in compressed-tensors.
    """
    if not values.numel():
        return values
    low, high = _RANGES[format_]
    axes = tuple(range(2, values.ndim))
    largest = values.abs().amax(axes, keepdim=True) if axes else values.abs().amax()
    # a tensor on the device: CUDA multiplies by the inverse of a Python number instead of dividing
    scale = largest / torch.tensor((high - low) / 2, dtype=values.dtype, device=values.device)
    scale = torch.where(scale == 0, torch.finfo(values.dtype).eps, scale)
    return _nearest(values / scale, format_).to(values.dtype) * scale


def rounded_inputs(values: torch.Tensor, format_: str, static_inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Round the inputs of a layer [batch, tokens, …] to a format of `ACTIVATIONS`.

    Args:
        static_inputs: the checkpoint's static scales, of one value each: ``input_scale``, ``input_zero_point``,
            ``input_global_scale``.
    """
    if not values.numel():
        return values
    kind, _, variant = format_.partition("-")
    if kind == "nvfp4":
        return _by_sixteen(values, static_inputs["input_global_scale"], variant == "wide")
    if kind in _MX:
        return _by_power(values, kind)
    if variant == "group":
        return _by_group(values, kind)
    if not variant:
        return rounded_by_token(values, kind)
    if static_inputs:
        scale, zero = static_inputs["input_scale"].to(values.dtype), static_inputs.get("input_zero_point")
    else:
        scale, zero = _dynamic_scale(values, kind, by_token=variant == "zero", symmetric=variant != "zero")
    if zero is None:
        return _nearest(values / scale, kind).to(values.dtype) * scale
    zero = zero.to(values.dtype)
    return (_nearest(values / scale + zero, kind) - zero) * scale


def _dynamic_scale(
    values: torch.Tensor, kind: str, *, by_token: bool, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale, and zero point of asymmetric codes, that cover all values, or the values of each token."""
    low, high = _RANGES[kind]
    axes = tuple(range(2, values.ndim)) if by_token else ()
    least, most = (values.amin(axes, True), values.amax(axes, True)) if axes else torch.aminmax(values)
    least, most = least.clamp(max=0), most.clamp(min=0)
    codes = torch.tensor(high - low, dtype=values.dtype, device=values.device)
    if symmetric:
        scale = torch.maximum(least.abs(), most) / (codes / 2)
        return torch.where(scale == 0, torch.finfo(values.dtype).eps, scale), None
    scale = (most - least) / codes
    zero = (low - least / scale).clamp(low, high)
    return torch.where(scale == 0, torch.finfo(values.dtype).eps, scale), zero.round().nan_to_num(0)


def _by_group(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Round to codes times a scale for each `BLOCK` values, from the largest of them."""
    low, high = _RANGES[kind]
    groups = values.reshape(*values.shape[:-1], -1, BLOCK)
    scale = groups.abs().amax(-1, keepdim=True) / torch.tensor(
        (high - low) / 2, dtype=values.dtype, device=values.device
    )
    scale = torch.where(scale == 0, torch.finfo(values.dtype).eps, scale)
    return (_nearest(groups / scale, kind).to(values.dtype) * scale).flatten(-2)


def _by_power(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Round to an OCP MX format: codes times a power of two for each 32 values.

    The largest of them, of at least 7/8 of the next power of two, counts as that power.
    """
    size, top, most = _MX[kind]
    groups = values.reshape(*values.shape[:-1], -1, size)
    share, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True).float())  # share in [0.5, 1)
    power = (exponent - 1 + (share >= 0.875).to(exponent.dtype) - top).clamp(-127, 128)
    power = torch.where(share == 0, -127, power)
    scale = torch.exp2(power.float()).to(values.dtype)
    parts = (groups / scale).clamp(-most, most)
    codes = _e2m1(parts) if kind == "mxfp4" else parts.to(torch.float8_e4m3fn).to(values.dtype)
    return (codes * scale).flatten(-2)


def _e2m1(values: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 1/2, 1, 3/2, 2, 3, 4 and 6 with either sign, of values up to 6; ties go to the even mantissa."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(values.dtype)
    return (values / step).round() * step


def _by_sixteen(values: torch.Tensor, overall: torch.Tensor, wide: bool) -> torch.Tensor:
    """Round to E2M1, ties to even, with a scale per 16 values, which is divided by one for all; in E4M3 unless ``wide``."""
    groups = values.reshape(*values.shape[:-1], -1, 16)
    scale = overall * (groups.abs().amax(-1) / torch.tensor(6.0, dtype=values.dtype, device=values.device))
    if not wide:
        scale = scale.clamp(-448, 448).to(torch.float8_e4m3fn).to(scale.dtype)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps if wide else 0.125, scale)
    scale = (scale / overall)[..., None]
    result: torch.Tensor = _e2m1((groups / scale).clamp(-6, 6)) * scale
    return result.flatten(-2).to(values.dtype)


def rounded_by_scale(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round values to fp8 (E4M3) codes times a scale, float32, that broadcasts to them; values beyond the range are clamped."""
    return (_nearest(values.float() / scale, "fp8").float() * scale).to(values.dtype)


def _nearest(values: torch.Tensor, format_: str) -> torch.Tensor:
    """The nearest code, ties to even."""
    low, high = _RANGES[format_]
    values = values.clamp(low, high)
    return values.round() if format_.startswith("int") else values.to(torch.float8_e4m3fn)


def round_inputs(
    model: PreTrainedModel,
    formats: Mapping[str, str],
    static_inputs: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """Round the inputs of linear layers in every forward pass from now on.

    Args:
        formats: a format of `ACTIVATIONS` by the layer's name in memory.
        static_inputs: static scales by that name, as `Codes.static_inputs`.

    Raises:
        CheckpointError: the model has no such linear layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, format_ in formats.items():
        if name not in linears:
            raise CheckpointError(
                f"has quantised inputs of {name}, which is not a linear layer of {type(model).__name__}"
            )
        module = linears[name]
        beside = {end: value.to(module.weight.device) for end, value in (static_inputs or {}).get(name, {}).items()}
        module.register_forward_pre_hook(_rounding(format_, beside))


def _rounding(
    format_: str, static_inputs: Mapping[str, torch.Tensor]
) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        with torch.no_grad():
            return (rounded_inputs(args[0], format_, static_inputs), *args[1:])

    return hook


def round_cache(
    model: PreTrainedModel, scales: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None
) -> None:
    """Round keys and values to fp8 before attention reads them, from now on, whether they are cached or not.

    Args:
        scales: a block's number ▶ the scales of its keys and of its values, float32 [1] or [heads, 1, 1]; None for 1.

    Raises:
        CheckpointError: the model has no attention that takes a cache.
    """
    attentions = cached_attentions(model)
    if not attentions:
        raise CheckpointError(
            f"has a quantised cache, and no attention of {type(model).__name__} caches keys and values"
        )
    for argument, module in attentions:
        one = torch.ones(1, device=model.device)
        pair = (one, one) if scales is None else tuple(s.to(model.device) for s in scales(int(module.layer_idx)))
        tap_cache(argument, module, lambda key, value, pair=pair: _both(key, value, pair))  # type: ignore[misc]


def _both(
    key: torch.Tensor, value: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return rounded_by_scale(key, scales[0]), rounded_by_scale(value, scales[1])


def cached_attentions(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """Attention modules that put keys and values into a cache, each with the name of the cache's argument."""
    attentions = []
    for part in module.modules():
        if "attention" not in type(part).__name__.lower() or not hasattr(part, "layer_idx"):
            continue
        taken = inspect.signature(part.forward).parameters
        if (argument := next((name for name in _CACHE_ARGUMENTS if name in taken), None)) is not None:
            attentions.append((argument, part))
    return attentions


def tap_cache(
    argument: str, module: Any, change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> Any:
    """Apply ``change`` to an attention's keys and values [samples, heads, tokens, width] before its cache, or without one.

    Returns:
        The handle of a hook.
    """

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, argument: _Tapped(kwargs.get(argument), change)}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


class _Tapped:
    """Stands in for a cache, or for none: then attention gets its own keys and values back, changed."""

    def __init__(self, cache: Any, change: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._cache, self._change = cache, change

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = self._change(key, value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
