"""Grids and GPTQ against slow, obvious twins, and against compressed-tensors."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.open import Codes
from compress.solvers.gptq import gptq, importance_order, ordered_factor
from compress.solvers.quant_format import Scales, code_range, fit, nearest, to_codes, weights
from compress.spec.formats import Grid


def layer(outputs=6, inputs=48, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    X = torch.randn(tokens, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), (X.T @ X).double()


@pytest.mark.parametrize("format_", ["int4", "int3", "fp8", "mxfp4", "nvfp4"])
def test_nearest_is_nearest(format_):
    grid = Grid(format_, {"mxfp4": 32, "nvfp4": 16}.get(format_, 0))
    low, high = code_range(grid)
    if grid.is_integer:
        values = torch.arange(low, high + 1.0)
    elif format_ == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = values[~values.isnan()]
    else:
        half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([half, -half])
    t = torch.randn(500, generator=torch.Generator().manual_seed(0)) * high / 2
    expected = (t[:, None] - values).abs().min(1).values
    assert torch.allclose((nearest(t.clone(), grid) - t).abs(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_stand_for_what_compressed_tensors_reads(bits, symmetric):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    W, _ = layer()
    grid = Grid(f"int{bits}", 16, symmetric)
    codes = to_codes(W, grid, fit(W, grid), torch.bfloat16)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=16)
    assert torch.equal(weights(codes), dequantize(codes.codes, codes.scale, codes.zero, args))


def test_four_bit_floats_are_what_compressed_tensors_reads():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    W, _ = layer(8, 64)
    for format_, args in {
        "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        "nvfp4": {"strategy": "tensor_group", "group_size": 16},
    }.items():
        grid = Grid(format_, args["group_size"])
        codes = to_codes(W, grid, fit(W, grid), torch.bfloat16)
        stored = {
            "weight_packed": codes.codes[:, 0::2] | (codes.codes[:, 1::2] << 4),
            "weight_scale": codes.scale,
            **({} if codes.overall is None else {"weight_global_scale": codes.overall}),
        }
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="float", **args))
        read = BaseCompressor.get_value_from_registry(f"{format_}-pack-quantized").decompress(stored, scheme)
        assert torch.equal(read["weight"], weights(codes))


def test_the_search_beats_the_extremes_and_weights_count():
    W, H = layer(12, 64)
    h = H.diagonal()
    for grid in (Grid("int3", 16), Grid("int3", 16, False), Grid("int2", 0)):

        def error(scales: Scales, h=h, grid=grid) -> float:
            return float(((weights(to_codes(W, grid, scales, torch.float32)) - W).square() * h).sum())

        assert error(fit(W, grid, h)) < error(fit(W, grid)) < error(fit(W, grid, search=False))


def twin(W, H, grid, scales, order, damp=0.01):
    """GPTQ with the inverse Hessian downdated column by column, in float64 (as Optimal Brain Compression has it)."""
    W, H = W.double().clone(), H.clone()
    H += damp * H.diagonal().mean() * torch.eye(len(H))
    inverse = torch.linalg.inv(H)
    size = grid.group or W.shape[1]
    result = torch.zeros_like(W)
    for j in order.tolist():
        g = j // size
        scale = scales.scale[:, g].double()
        zero = 0 if scales.zero is None else scales.zero[:, g].double()
        result[:, j] = (nearest(W[:, j] / scale + zero, grid) - zero) * scale
        error = (W[:, j] - result[:, j]) / inverse[j, j]
        W -= error[:, None] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize("grid", [Grid("int4", 16), Grid("int3", 0), Grid("int4", 12, False), Grid("fp8", 0)])
def test_gptq_is_the_slow_one(grid):
    W, H = layer()
    scales = fit(W, grid, H.diagonal())
    order, factor, damping = ordered_factor(H)
    assert damping == 0.01
    assert torch.equal(order, importance_order(H))
    latent = gptq(W.double(), factor, order, grid, Scales(scales.scale.double(), scales.zero), blocksize=16)
    found = weights(to_codes(latent.float(), grid, scales, torch.float32))
    assert torch.allclose(found.double(), twin(W, H, grid, scales, order), atol=1e-5)


def test_gptq_lowers_the_output_error_and_keeps_removed_weights():
    W, H = layer(16, 64, tokens=40)
    grid = Grid("int3", 16)
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    W = W * keep
    scales = fit(W, grid, H.diagonal(), keep)
    order, factor, _ = ordered_factor(H)

    def error(codes: Codes) -> float:
        difference = (weights(codes, keep) - W).double()
        return float(((difference @ H) * difference).sum())

    plain = to_codes(W, grid, scales, torch.float32, keep)
    solved = to_codes(gptq(W, factor.float(), order, grid, scales, keep), grid, scales, torch.float32, keep)
    assert error(solved) < 0.7 * error(plain)
    assert not weights(solved)[~keep].any()
