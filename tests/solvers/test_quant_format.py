"""Grids and GPTQ against slow, obvious twins, and against compressed-tensors."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.values import Codes
from compress.solvers.gptq import act_order, act_order_factor, gptq
from compress.solvers.quant_format import Scales, code_range, dequantize, fit, nearest, overflowing, to_codes
from compress.spec.formats import QuantFormat


def layer(outputs=6, inputs=48, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    X = torch.randn(tokens, inputs, generator=generator) @ mix
    return torch.randn(outputs, inputs, generator=generator), (X.T @ X).double()


@pytest.mark.parametrize("format_", ["int4", "int3", "fp8", "mxfp4", "nvfp4"])
def test_nearest_picks_nearest_code(format_):
    quant_format = QuantFormat(format_, {"mxfp4": 32, "nvfp4": 16}.get(format_, 0))
    low, high = code_range(quant_format)
    if quant_format.is_integer:
        values = torch.arange(low, high + 1.0)
    elif format_ == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = values[~values.isnan()]
    else:
        half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([half, -half])
    t = torch.randn(500, generator=torch.Generator().manual_seed(0)) * high / 2
    expected = (t[:, None] - values).abs().min(1).values
    assert torch.allclose((nearest(t.clone(), quant_format) - t).abs(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_dequantize_matches_compressed_tensors(bits, symmetric):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize as theirs

    W, _ = layer()
    quant_format = QuantFormat(f"int{bits}", 16, symmetric)
    codes = to_codes(W, quant_format, fit(W, quant_format), torch.bfloat16)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=16)
    assert torch.equal(dequantize(codes), theirs(codes.codes, codes.scale, codes.zero, args))


def test_dequantize_of_fp4_matches_compressed_tensors():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    W, _ = layer(8, 64)
    for format_, args in {
        "mxfp4": {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        "nvfp4": {"strategy": "tensor_group", "group_size": 16},
    }.items():
        quant_format = QuantFormat(format_, args["group_size"])
        codes = to_codes(W, quant_format, fit(W, quant_format), torch.bfloat16)
        stored = {
            "weight_packed": codes.codes[:, 0::2] | (codes.codes[:, 1::2] << 4),
            "weight_scale": codes.scale,
            **({} if codes.overall is None else {"weight_global_scale": codes.overall}),
        }
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="float", **args))
        read = BaseCompressor.get_value_from_registry(f"{format_}-pack-quantized").decompress(stored, scheme)
        assert torch.equal(read["weight"], dequantize(codes))


def test_fit_beats_range_of_extremes_and_uses_importance():
    W, H = layer(12, 64)
    h = H.diagonal()
    for quant_format in (QuantFormat("int3", 16), QuantFormat("int3", 16, False), QuantFormat("int2", 0)):

        def error(scales: Scales, h=h, quant_format=quant_format) -> float:
            return float(((dequantize(to_codes(W, quant_format, scales, torch.float32)) - W).square() * h).sum())

        assert error(fit(W, quant_format, h)) < error(fit(W, quant_format)) < error(fit(W, quant_format, search=False))


def twin(W, H, quant_format, scales, order, damp=0.01):
    """GPTQ with the inverse Hessian downdated column by column, in float64 (as Optimal Brain Compression has it)."""
    W, H = W.double().clone(), H.clone()
    H += damp * H.diagonal().mean() * torch.eye(len(H))
    inverse = torch.linalg.inv(H)
    size = quant_format.group or W.shape[1]
    result = torch.zeros_like(W)
    for j in order.tolist():
        g = j // size
        scale = scales.scale[:, g].double()
        zero = 0 if scales.zero is None else scales.zero[:, g].double()
        result[:, j] = (nearest(W[:, j] / scale + zero, quant_format) - zero) * scale
        error = (W[:, j] - result[:, j]) / inverse[j, j]
        W -= error[:, None] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize(
    "quant_format",
    [QuantFormat("int4", 16), QuantFormat("int3", 0), QuantFormat("int4", 12, False), QuantFormat("fp8", 0)],
)
def test_gptq_matches_slow_twin(quant_format):
    W, H = layer()
    scales = fit(W, quant_format, H.diagonal())
    order, factor, damping = act_order_factor(H)
    assert damping == 0.01
    assert torch.equal(order, act_order(H))
    updated_weights = gptq(
        W.double(), factor, order, quant_format, Scales(scales.scale.double(), scales.zero), blocksize=16
    )
    found = dequantize(to_codes(updated_weights.float(), quant_format, scales, torch.float32))
    assert torch.allclose(found.double(), twin(W, H, quant_format, scales, order), atol=1e-5)


def test_gptq_lowers_output_error_and_keeps_mask():
    W, H = layer(16, 64, tokens=40)
    quant_format = QuantFormat("int3", 16)
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    W = W * keep
    scales = fit(W, quant_format, H.diagonal(), keep)
    order, factor, _ = act_order_factor(H)

    def error(codes: Codes) -> float:
        difference = (dequantize(codes, keep) - W).double()
        return float(((difference @ H) * difference).sum())

    plain = to_codes(W, quant_format, scales, torch.float32, keep)
    solved = to_codes(
        gptq(W, factor.float(), order, quant_format, scales, keep), quant_format, scales, torch.float32, keep
    )
    assert error(solved) < 0.7 * error(plain)
    assert not dequantize(solved)[~keep].any()


def test_overflowing_counts_only_what_rounds_to_infinity():
    values = torch.tensor([65504.0, 65519.9, 65520.0, -70000.0, float("inf"), float("nan"), 1.0])
    assert overflowing(values, torch.float16) == 2


def test_codes_of_a_shared_global_scale_share_no_memory():
    """Results of blocks are saved with safetensors, which refuses tensors that share memory."""
    overall, nvfp4 = torch.tensor([700.0]), QuantFormat("nvfp4", 16)
    W = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    first, second = (to_codes(W, nvfp4, fit(W, nvfp4, overall=overall), torch.float32) for _ in range(2))
    assert torch.equal(first.overall, second.overall)
    assert first.overall.data_ptr() != second.overall.data_ptr()


def test_nearest_e4m3_is_torchs_conversion():
    """Every value of E4M3, the points between two, and those beside them."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    between = (values[1:] + values[:-1]) / 2
    ends = torch.full_like(between, 448)
    t = torch.cat([values, between, between.nextafter(ends), between.nextafter(-ends)])
    expected = t.to(torch.float8_e4m3fn).float()
    result = nearest(t.clone(), QuantFormat("fp8"))
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32))
