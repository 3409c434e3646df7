"""Static scales of quantised inputs: the largest input of every layer over the calibration samples."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from compress.checkpoint.values import Checkpoint, torch_dtype
from compress.passes.base import Context
from compress.passes.cast.largest_inputs import largest_inputs
from compress.spec.formats import QuantFormat
from compress.spec.spec import Spec

#: Largest codes of E4M3, and of E2M1 times those of its scales.
_E4M3, _E2M1 = 448.0, 6.0 * 448.0


def input_scales(checkpoint: Checkpoint, spec: Spec, context: Context) -> dict[str, dict[str, torch.Tensor]]:
    """Static input scales of a cast checkpoint, by tensor and name suffix; magnitudes are kept in the workspace.

    Args:
        checkpoint: with the cast weights, and without static scales. spec: the planned one.

    Raises:
        PassError: the model cannot be run block by block, or a cast layer is outside its blocks.
    """
    formats = {t.name: t.quant_format for t in spec.stored() if t.quant_format is not None}
    static = {name: quant_format for name, quant_format in formats.items() if quant_format.static_inputs}
    magnitudes = context.workspace.cached("inputs", lambda: _largest_inputs(checkpoint, list(static), context))
    context.details["quantised inputs"] = (
        f"a static scale for each of {len(static)} layers; largest magnitudes over the calibration data: "
        f"{min(magnitudes.values()):.3g} to {max(magnitudes.values()):.3g}"
    )
    return {
        name: _scale(magnitudes[name], quant_format, torch_dtype(spec.tensors[name].dtype))
        for name, quant_format in static.items()
    }


def _scale(largest: float, quant_format: QuantFormat, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The scale [1] that maps the largest input to the largest code; of nvfp4 the one that scales are multiplied with."""
    if quant_format.activations == "nvfp4":
        return {"input_global_scale": torch.tensor([_E2M1 / largest if largest else 1.0])}
    return {"input_scale": torch.tensor([largest / _E4M3 if largest else 1.0]).to(dtype)}


def _largest_inputs(checkpoint: Checkpoint, names: list[str], context: Context) -> dict[str, float]:
    """Largest magnitude of the inputs of each layer; see `largest_inputs`."""
    by_channel = largest_inputs(checkpoint, names, context, "inputs")
    return _of_unreached({name: float(largest.max()) for name, largest in by_channel.items()})


def _of_unreached(largest: Mapping[str, float]) -> dict[str, float]:
    """The same, with the largest of the other experts for those that no token reached."""
    alike: dict[str, float] = {}
    for name, value in largest.items():
        alike[_any_expert(name)] = max(alike.get(_any_expert(name), 0.0), value)
    return {name: value or alike[_any_expert(name)] for name, value in largest.items()}


def _any_expert(name: str) -> str:
    """A name without its last number, which is that of an expert where it has one."""
    return re.sub(r"\.\d+\.(?!.*\.\d+\.)", ".*.", name)
