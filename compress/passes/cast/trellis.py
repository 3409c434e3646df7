"""Trellis codes of one matrix of a block: rotation of weights and Hessian, GPTQ by columns, scales for reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compress.blockwise.correction import InputMismatch, corrected
from compress.blockwise.hessians import InputStatistics
from compress.blockwise.linears import TargetLinear
from compress.checkpoint.storage.trellis import rotate
from compress.checkpoint.values import Codes
from compress.solvers.gptq import act_order_factor
from compress.solvers.hessian import damped
from compress.solvers.quant_format import dequantize
from compress.solvers.trellis import trellis_gptq, trellis_nearest, values_of
from compress.spec.formats import QuantFormat


class TrellisRounded:
    """A matrix as trellis codes and scales. Reconstruction trains the scales; `block.Rounded` describes the methods."""

    keep: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    overall: torch.Tensor | None = None

    def __init__(
        self, linear: TargetLinear, quant_format: QuantFormat, states: torch.Tensor, scale: torch.Tensor
    ) -> None:
        self.linear, self.quant_format, self.codes, self.scale = linear, quant_format, states, scale
        self._stored: Codes | None = None

    def project(self) -> None:
        """Write the weights into the block."""
        self.linear.weight.copy_(rotate(values_of(self.codes) * self.scale, back=True))

    def chain_gradients(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Set the gradients of the scales from those of the weights: a rotation turns the gradient as it turns the weights."""
        gradient = self.linear.gradient(parameters)
        if gradient is not None:
            self.scale.grad = (rotate(gradient) * values_of(self.codes)).sum(1, keepdim=True)

    def finish(self, dtype: torch.dtype) -> Codes:
        """Return the codes with stored scales, and write the weights that a loader will see into the block."""
        if self._stored is None:
            self._stored = Codes(self.codes, self.scale.to(dtype))
            self.linear.weight.copy_(dequantize(self._stored).to(self.linear.weight.dtype))
        return self._stored


def solve_trellis(
    linear: TargetLinear,
    statistics: InputStatistics,
    mismatch: InputMismatch | None,
    quant_format: QuantFormat,
    shared: dict[str, Any],
) -> tuple[TrellisRounded, dict[str, Any]]:
    """Trellis codes of a matrix, and the row for the report. ``shared``: what linears with the same inputs compute once."""
    weight, bits = linear.weight.float().contiguous(), quant_format.bits
    if statistics.tokens == 0:
        note = "no token reached it: rounded to nearest"
        return TrellisRounded(linear, quant_format, *trellis_nearest(weight, bits)), {"error": None, "note": note}
    H = statistics.hessian
    if mismatch is not None:
        weight = corrected(linear, weight, H, mismatch, shared)
    if "turned" not in shared:
        turned = rotate(rotate(H).t()).contiguous()
        order, factor, damping = act_order_factor(turned)
        shared["turned"] = damped(turned, min(damping, 1.0))[0].float(), order, factor.float(), damping
    turned, order, factor, damping = shared["turned"]
    target = rotate(weight)
    states, scale = trellis_gptq(target, factor, order, bits)
    # the scale of least error, given the codes
    values = values_of(states)
    seen = values @ turned
    scale = (target * seen).sum(1, keepdim=True) / (values * seen).sum(1, keepdim=True).clamp(min=1e-30)
    rounded = TrellisRounded(linear, quant_format, states, scale)
    row: dict[str, Any] = {"error": statistics.relative_error(weight, rotate(values * scale, back=True))}
    if damping != 0.01:
        row["damping"] = damping
    return rounded, row
