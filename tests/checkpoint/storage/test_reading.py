"""Tensors are decoded from the parts that storages write, bit by bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.checkpoint.storage import CHAINS, encode, format_chain, parts
from compress.checkpoint.storage.mask import MASKED
from compress.checkpoint.storage.reading import decode, part_names
from compress.checkpoint.store import needs_code, with_storage
from compress.checkpoint.values import Codes, Value, canonical
from compress.solvers.quant_format import dequantize, fit, to_codes
from compress.solvers.trellis import trellis_nearest
from compress.spec.formats import QuantFormat
from compress.spec.spec import DENSE, Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@given(
    st.integers(0, 10_000), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from(list(DTYPES)),
    st.floats(0, 1), st.sampled_from([DENSE, MASKED]),
)  # fmt: skip
def test_decode_undoes_encode(seed, shape, dtype, share, storage):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).mul(2).round().to(DTYPES[dtype])  # many exact zeros
    mask = torch.rand(shape, generator=generator) < share
    tensor = Tensor("w", tuple(shape), dtype, kept=int(mask.sum()), storage=storage)
    encoded = encode(Value(canonical(values, mask), mask), tensor)
    for part in parts(tensor):
        assert tuple(encoded[part.role].shape) == part.shape
        assert encoded[part.role].numel() * encoded[part.role].element_size() == part.bytes
        assert part_names("w", storage)[part.role] == part.key
    data, found = decode(encoded, storage, tuple(shape), True)
    assert torch.equal(found, mask)
    assert torch.equal(data, torch.where(mask, values, 0))
    assert torch.equal(torch.signbit(data), torch.signbit(canonical(values, mask)))  # zeros too


GRIDS = [f"int{bits}" for bits in (8, 6, 5, 4, 3, 2)] + ["fp8", "mxfp4", "nvfp4"]


@given(
    st.sampled_from(GRIDS), st.booleans(), st.booleans(), st.integers(1, 6), st.integers(1, 3), st.sampled_from([0, 5, 8]),
    st.floats(0.05, 1), st.integers(0, 10_000),
)  # fmt: skip
def test_codes_round_trip_in_every_store(format_, symmetric, transposed, outputs, groups, size, share, seed):
    """Planned parts are the written ones; values, mask and codes come back bit by bit; removed weights are zero."""
    fixed = {"mxfp4": 32, "nvfp4": 16}.get(format_)
    symmetric = symmetric or not format_.startswith("int")
    quant_format = QuantFormat(format_, fixed if fixed else size, symmetric, transposed)
    inputs = groups * (fixed or size or 7)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    keep = torch.rand(outputs, inputs, generator=generator) < share
    dtype = torch.bfloat16 if fixed else torch.float32
    codes = to_codes(weight, quant_format, fit(weight, quant_format, None, keep), dtype, keep)
    values = dequantize(codes, keep)
    assert values.dtype == dtype
    assert not values[~keep].any()
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    whole = Tensor(
        "a.weight",
        shape,
        "BF16" if fixed else "F32",
        kept=int(keep.sum()),
        quant_format=quant_format,
        storage=format_chain(quant_format),
    )
    chains = [whole.storage] + ([("mask", *whole.storage)] if quant_format.is_integer else [])
    value = Value(values.T if transposed else values, keep.T if transposed else keep, codes)
    for chain in chains:
        tensor = Tensor(whole.name, shape, whole.dtype, whole.kept, None, chain, quant_format)
        encoded = encode(value, tensor)
        assert {part.role for part in parts(tensor)} == encoded.keys()
        for part in parts(tensor):
            assert tuple(encoded[part.role].shape) == part.shape, part
            assert encoded[part.role].numel() * encoded[part.role].element_size() == part.bytes
            assert part_names(whole.name, chain, quant_format.to_json())[part.role] == part.key
        data, found = decode(encoded, chain, shape, chain[0] == "mask", quant_format.to_json())
        assert torch.equal(data, value.data)
        assert found is None or torch.equal(found, value.mask)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(20, 24), (300, 7), (16, 3, 5)])
def test_trellis_codes_round_trip(bits, shape):
    quant_format = QuantFormat(f"trellis{bits}")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    states, scale = trellis_nearest(weight.flatten(1), bits)
    codes = Codes(states, scale.bfloat16())
    tensor = Tensor("w", shape, "BF16", quant_format=quant_format, storage=format_chain(quant_format))
    encoded = encode(Value(dequantize(codes).view(shape), None, codes), tensor)
    for part in parts(tensor):
        assert tuple(encoded[part.role].shape) == part.shape
        assert encoded[part.role].nbytes == part.bytes
    data, mask = decode(encoded, tensor.storage, shape, False, quant_format.to_json())
    assert mask is None
    assert torch.equal(data, dequantize(codes).view(shape))


def test_mask_chain_is_taken_when_smaller():
    from compress.spec.spec import Spec, Structure

    tensors = {f"t{kept}": Tensor(f"t{kept}", (10, 16), "BF16", kept=kept) for kept in (160, 150, 149, 10)}
    spec = with_storage(Spec(Structure({"model_type": "x"}), tensors), "compact")
    chosen = {name: t.storage for name, t in spec.tensors.items()}
    # bf16: 16 kept / 16 + 1 bit per weight: pays below 15/16 of 160 = 150 weights
    assert chosen == {"t160": DENSE, "t150": DENSE, "t149": MASKED, "t10": MASKED}
    assert not needs_code(with_storage(spec, "stock"))


@pytest.mark.parametrize("chain", [chain for chain in CHAINS if "int-quantized" in chain])
@pytest.mark.parametrize("activations", ["int8", "int8-tensor", "int8-tensor-zero"])
def test_static_scales_of_inputs_lie_beside_the_codes_of_every_chain(chain, activations, tmp_path):
    from compress.checkpoint.open import open_checkpoint
    from compress.checkpoint.values import Derived
    from compress.checkpoint.write import write_checkpoint
    from tests import pico

    base = open_checkpoint(pico.save(tmp_path / "in", dtype=torch.float32, with_tokenizer=False))
    name = "model.layers.0.mlp.up_proj.weight"
    quant_format = QuantFormat("int8", activations=activations)
    weight = base.tensor(name).data
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < (0.3 if chain[0] == "mask" else 1.1)
    codes = to_codes(weight, quant_format, fit(weight, quant_format, None, keep), torch.float32, keep)
    beside = {"input_scale": torch.tensor([0.5]), "input_zero_point": torch.tensor([3], dtype=torch.int8)}
    codes = replace(codes, static_inputs={end: beside[end] for end in quant_format.static_inputs})
    mask = keep if chain[0] == "mask" else None
    kept = None if mask is None else int(keep.sum())
    tensors = {**base.spec.tensors, name: replace(base.spec.tensors[name], quant_format=quant_format, kept=kept)}
    value = Value(dequantize(codes, keep), mask, codes)
    changed = Derived(base, replace(base.spec, tensors=tensors), lambda n: value if n == name else base.tensor(n))
    written = write_checkpoint(changed, tmp_path / "out", store="compact")
    assert written.spec.tensors[name].storage == chain
    opened = open_checkpoint(tmp_path / "out")
    assert opened.spec.tensors.keys() == base.spec.tensors.keys()
    assert opened.static_inputs(name) == codes.static_inputs
    assert torch.equal(opened.tensor(name).data, value.data)
