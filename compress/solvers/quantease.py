"""Alternate codes and scales: coordinate descent on the codes (QuantEase), least squares for the scales.

Letters: O outputs, I inputs, B inputs of a block, G groups of inputs that share a scale, S inputs of a group, P outputs of a
part. Matrices are held transposed, [in, out], so that the weights of one input are contiguous.
"""

from __future__ import annotations

import torch

from compress.solvers.quant_format import Scales, codes_near, integer_codes
from compress.spec.formats import QuantFormat

#: Inputs whose gradients are computed in one product.
_BLOCK = 32
#: Largest factor by which a scale may change in a round: a group of almost only zero codes says little about its scale.
_MOST_CHANGE = 2.0
#: Values in memory at a time where scales are fitted: outputs are split into parts.
_VALUES = 1 << 22


def quantease(
    W_OI: torch.Tensor,
    start_OI: torch.Tensor,
    H_II: torch.Tensor,
    quant_format: QuantFormat,
    scales: Scales,
    keep_OI: torch.Tensor | None = None,
    rounds: int = 3,
) -> tuple[torch.Tensor, Scales]:
    """Return codes less zero points [O, I] and their scales, with an output error no larger than that of the start.

    The error is tr(E H Eᵀ) with E = W - Q. One weight that changes by δ changes it by -2 δ (E H)_oi + δ² H_ii, a parabola in
    δ with its minimum at (E H)_oi / H_ii, so the nearest code to that point is the best one. A round gives every weight in
    turn its best code while all others are fixed, then every row the best scales for these codes. No step raises the error.
    Zero points do not change, nor do the scales of mxfp4 and nvfp4.

    Args:
        W_OI: weights to match, [out, in], float32.
        start_OI: weights whose nearest codes are the start, such as `gptq` returns.
        H_II: sum of x xᵀ, [in, in], damped, float32.
        quant_format, scales: the format, and scales [O, G] with optional zero points.
        keep_OI: keep-mask; removed weights are zero.
        rounds: rounds over codes and scales; 0 returns the nearest codes to ``start_OI``.

    Source: QuantEase (arXiv 2309.01885) for the descent. Least-squares scales alternate with codes in BCQ and AQLM (arXiv
    2401.06118) too.
    """
    inputs = W_OI.shape[1]
    size = quant_format.group or inputs
    scale_GO = scales.scale.t().contiguous()
    zero_GO = None if scales.zero is None else scales.zero.t().contiguous()
    W_IO = W_OI.t().contiguous()
    keep_IO = None if keep_OI is None else keep_OI.t().contiguous()

    def code(value_O: torch.Tensor, i: int) -> torch.Tensor:
        """Return the nearest codes, less zero points, [O], of values of input ``i``."""
        g = i // size
        code_O = codes_near(value_O, scale_GO[g], None if zero_GO is None else zero_GO[g], quant_format)
        return code_O if keep_IO is None else code_O.masked_fill_(~keep_IO[i], 0)

    code_IO = integer_codes(start_OI, quant_format, scales, keep_OI).t().contiguous()
    diagonal_I = H_II.diagonal()
    for _ in range(rounds):
        value_IO = code_IO * scale_GO.repeat_interleave(size, 0)
        error_IO = W_IO - value_IO
        for start in range(0, inputs, _BLOCK):
            stop = min(start + _BLOCK, inputs)
            slope_BO = H_II[start:stop] @ error_IO
            for i in range(start, stop):
                code_O = code(torch.addcdiv(value_IO[i], slope_BO[i - start], diagonal_I[i]), i)
                step = code_O * scale_GO[i // size] - value_IO[i]
                slope_BO.addr_(H_II[start:stop, i], step, alpha=-1)
                value_IO[i] += step
                error_IO[i] -= step
                code_IO[i] = code_O
        if not quant_format.fixed_scales:
            scale_GO = fitted_scales(W_IO, code_IO, H_II, scale_GO)
    return code_IO.t().contiguous(), scales._replace(scale=scale_GO.t().contiguous())


def fitted_scales(
    W_IO: torch.Tensor, code_IO: torch.Tensor, H_II: torch.Tensor, scale_GO: torch.Tensor
) -> torch.Tensor:
    """Return the scales [G, O] of least output error for these codes.

    A row of weights is C s: column g of C [I, G] holds the codes of group g, and zeros for other inputs. The error
    (w - C s)ᵀ H (w - C s) is least at (Cᵀ H C) s = Cᵀ H w, which is solved in float64 for each row. A row keeps its scales if
    any of them would change its sign, or by more than a factor of 2.

    Args:
        W_IO: weights to match, [in, out]. code_IO: codes less zero points. H_II: sum of x xᵀ, damped.
        scale_GO: present scales, [groups, out].
    """
    groups, outputs = scale_GO.shape
    inputs = len(W_IO)
    size = inputs // groups
    result = torch.empty_like(scale_GO)
    part = max(1, _VALUES // max(inputs, 2 * groups * groups))
    for start in range(0, outputs, part):
        code_GSP = code_IO[:, start : start + part].reshape(groups, size, -1)
        HW_GSP = (H_II @ W_IO[:, start : start + part]).view(groups, size, -1)
        rhs_GP = HW_GSP.mul_(code_GSP).sum(1)
        gram_PGG = torch.empty(code_GSP.shape[2], groups, groups, dtype=torch.float64, device=W_IO.device)
        for g in range(groups):  # H times the codes of a group, for its inputs and those of later groups
            HC_GSP = (H_II[g * size :, g * size : (g + 1) * size] @ code_GSP[g]).view(groups - g, size, -1)
            row_PG = HC_GSP.mul_(code_GSP[g:]).sum(1).t()
            gram_PGG[:, g, g:] = row_PG
            gram_PGG[:, g:, g] = row_PG
        diagonal_PG = gram_PGG.diagonal(dim1=1, dim2=2)
        diagonal_PG += 1e-6 * diagonal_PG.mean(1, keepdim=True) + 1e-30
        solved_GP = torch.linalg.solve(gram_PGG, rhs_GP.t().double()).t().to(scale_GO.dtype)
        before_GP = scale_GO[:, start : start + part]
        ratio_GP = solved_GP / before_GP
        stable = ((ratio_GP > 1 / _MOST_CHANGE) & (ratio_GP < _MOST_CHANGE)).all(0)
        result[:, start : start + part] = torch.where(stable, solved_GP, before_GP)
    return result
