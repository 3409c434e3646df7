"""Group sizes of formats: as asked for, or by default the largest that divides a matrix's inputs. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NoReturn

from compress.architectures.model_map import Linear, model_map
from compress.errors import PassError
from compress.passes.cast.settings import DTYPES, CastSettings
from compress.spec.formats import BLOCK, FIXED_GROUPS, LEAST_OUTPUTS, QuantFormat
from compress.spec.spec import FLOAT_DTYPES, Spec

#: Group sizes to fall back to, those that the kernels of servers know; then a whole channel.
_SIZES = (128, 64, 32)


class GroupSizes:
    """The format of every matrix of a spec with the settings of `cast`.

    A group size that the settings name must divide the inputs of every matrix. Without one, a matrix that the default does not
    divide gets the next smaller size of 128, 64 and 32 that does, else one scale per output. Experts, which stock loaders fuse,
    get one size that divides the inputs of all of them.
    """

    def __init__(self, spec: Spec, settings: CastSettings) -> None:
        self._settings = settings
        self._linears, self._joined = model_map(spec).linears, model_map(spec).joined
        routers = {x.module for x in self._linears.values() if x.role == "router"}  # they stay as they are
        others = (t for t in spec.stored() if t.module not in routers)
        self._wide = next((t for t in others if t.dtype in ("F16", "F32", "F64")), None)

    @cached_property
    def _expert_inputs(self) -> int:
        """Greatest common divisor of the inputs of all experts' matrices."""
        return math.gcd(*(x.I for x in self._linears.values() if x.experts or (x.expert is not None and x.is_layer)))

    def check(self, formats: Mapping[str, str]) -> None:
        """Raise `PassError` that names all tensors whose inputs a fixed group size does not divide.

        Args:
            formats: option of the settings by tensor.
        """
        refused: dict[QuantFormat, list[Linear]] = {}
        for name, option in formats.items():
            if option not in DTYPES and _leftover(self._linears[name].I, quant_format := self._fitted(name, option)):
                refused.setdefault(quant_format, []).append(self._linears[name])
        for quant_format, linears in refused.items():
            _refuse(linears, quant_format)

    def quant_format(self, name: str, option: str) -> QuantFormat:
        """Format of a tensor with an option of the settings. Raises `PassError` where it does not fit."""
        quant_format, linear = self._fitted(name, option), self._linears[name]
        if linear.transposed:
            quant_format = replace(quant_format, transposed=True)
        if linear.experts:
            quant_format = replace(quant_format, experts=linear.experts)
        if linear.role == "embedding":  # it reads ids; of vLLM's kernels none reads zero points
            symmetric = quant_format.symmetric or self._settings.runtime == "vllm"
            quant_format = replace(quant_format, activations=None, symmetric=symmetric)
        if _leftover(linear.I, quant_format):
            _refuse([linear], quant_format)
        if quant_format.is_trellis:
            _require_trellis(linear, quant_format)
        if quant_format.format in FIXED_GROUPS and self._wide is not None:
            raise PassError(
                f"{quant_format.format} goes with bfloat16 weights beside it, and {self._wide.name} is "
                f"{FLOAT_DTYPES[self._wide.dtype]}",
                key="weights",
                fix="put `- cast: {weights: bf16}` before it",
            )
        return quant_format

    def note(self, quant_formats: Mapping[str, QuantFormat]) -> str | None:
        """A sentence on the matrices whose inputs the default group size does not divide; None where there are none.

        Args:
            quant_formats: format of each cast tensor.
        """
        if isinstance(self._settings.group_size, int):
            return None
        others, usual = dict[str, list[Linear]](), 0
        for name, quant_format in quant_formats.items():
            linear, wanted = self._linears[name], self._settings.quant_format(quant_format.format)
            if wanted.block and not quant_format.block:
                others.setdefault("one scale per output", []).append(linear)
            elif _leftover(linear.I, wanted):
                usual = wanted.group
                size = f"groups of {quant_format.group}" if quant_format.group else "one scale per output"
                others.setdefault(size, []).append(linear)
        if not others:
            return None
        parts = (f"{size} in {_names(linears)}" for size, linears in others.items())
        if not usual:
            return f"blocks of {BLOCK} x {BLOCK} do not fit some matrices, which get {'; '.join(parts)}"
        return (
            f"groups of {usual} do not divide the inputs of some matrices, which get other groups: {'; '.join(parts)}"
        )

    def _fitted(self, name: str, option: str) -> QuantFormat:
        """The option's format, with the group size that the tensor gets."""
        linear, quant_format = self._linears[name], self._settings.quant_format(option)
        if quant_format.activations == "fp8-group" and linear.I % BLOCK:
            quant_format = replace(quant_format, activations="fp8")
        if quant_format.block:
            return quant_format if self._blocks_fit(linear) else QuantFormat("fp8", activations=_by_token(quant_format))
        if quant_format.format in FIXED_GROUPS or not quant_format.group:
            return quant_format
        if self._settings.group_size is not None:
            # ranks need not be multiples of a group
            return replace(quant_format, group=0) if self._odd_factor(linear, quant_format) else quant_format
        inputs = linear.I if linear.expert is None and not linear.experts else self._expert_inputs
        sizes = (size for size in (quant_format.group, *_SIZES) if size <= quant_format.group)
        return replace(quant_format, group=next((size for size in sizes if inputs % size == 0), 0))

    def _blocks_fit(self, linear: Linear) -> bool:
        """Whether blocks of 128 x 128 fit a matrix, and those that servers may join with it; of experts, all of them."""
        if linear.experts or linear.transposed or linear.kernel:
            return False
        if linear.expert is not None:
            return self._expert_inputs % BLOCK == 0
        joined = self._joined(linear.name)
        return linear.I % BLOCK == 0 and (len(joined) == 1 or all(x.O % BLOCK == 0 for x in joined))

    @staticmethod
    def _odd_factor(linear: Linear, quant_format: QuantFormat) -> bool:
        return linear.role == "factor" and _leftover(linear.I, quant_format) > 0


def _by_token(quant_format: QuantFormat) -> str | None:
    """The inputs' format where groups do not fit: with a scale per token."""
    return quant_format.activations and "fp8"


def _require_trellis(linear: Linear, quant_format: QuantFormat) -> None:
    """Raise `PassError` for a tensor that has no trellis codes: few outputs, experts in one tensor, a keep-mask."""
    tensor = linear.tensor
    if tensor.kept is not None:
        what, key, fix = "a keep-mask, which trellis codes do not hold", "weights", "use an integer format"
    elif linear.experts:
        what, key, fix = "all experts, which trellis codes do not hold", "fused_experts", "set `fused_experts: false`"
    elif not quant_format.fits(tensor.shape):
        what, key = f"{linear.O} outputs, and trellis codes need {LEAST_OUTPUTS}", "weights"
        fix = f"skip it: skip: [{linear.module}]"
    else:
        return
    raise PassError(f"{linear.name} has {what}", key=key, fix=fix)


def _leftover(inputs: int, quant_format: QuantFormat) -> int:
    """Number of inputs that do not fill a group of the format; 0 where groups divide them."""
    return inputs % quant_format.group if quant_format.group else 0


def _names(linears: Sequence[Linear]) -> str:
    """Short names of matrices, with their number and their inputs."""
    patterns = ", ".join(_patterns(linears))
    widths = ", ".join(map(str, sorted({linear.I for linear in linears})))
    return f"{len(linears)} matrices with {widths} inputs ({patterns})"


def _patterns(linears: Iterable[Linear]) -> list[str]:
    """Globs for the modules of matrices, without numbers of blocks."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", linear.module) for linear in linears))


def _refuse(linears: Sequence[Linear], quant_format: QuantFormat) -> NoReturn:
    """Raise `PassError` that names these tensors, and a group size that divides their inputs."""
    widths = [linear.I for linear in linears]
    patterns = ", ".join([linears[0].module] if len(linears) == 1 else _patterns(linears))
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
