"""Storage chains: planned parts are the written ones, and decoding undoes encoding, bit by bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.checkpoint import bundle, codecs
from compress.checkpoint.decode import decode, part_names, unpack_bits
from compress.checkpoint.spec import DENSE, MASKED, Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from(list(DTYPES)),
    st.floats(0, 1), st.sampled_from([DENSE, MASKED]),
)  # fmt: skip
def test_decode_undoes_encode(seed, shape, dtype, share, storage):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).mul(2).round().to(DTYPES[dtype])  # many exact zeros
    mask = torch.rand(shape, generator=generator) < share
    tensor = Tensor("w", tuple(shape), dtype, kept=int(mask.sum()), storage=storage)
    canonical = codecs.canonical(values, mask)
    encoded = codecs.encode(canonical, mask, tensor)
    for part in codecs.parts(tensor):
        assert tuple(encoded[part.role].shape) == part.shape
        assert encoded[part.role].numel() * encoded[part.role].element_size() == part.bytes
        assert part_names("w", storage)[part.role] == part.key
    data, found = decode(encoded, storage, tuple(shape), True)
    assert torch.equal(found, mask)
    assert torch.equal(data, torch.where(mask, values, 0))
    assert torch.equal(torch.signbit(data), torch.signbit(canonical))  # zeros too


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 100), st.integers(0, 10_000))
def test_bits(count, seed):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = codecs.pack_bits(mask)
    expected = [sum(bool(b) << i for i, b in enumerate(mask.tolist()[s : s + 8])) for s in range(0, count, 8)]
    assert packed.tolist() == expected
    assert torch.equal(unpack_bits(packed, (count,)), mask)


def test_the_mask_chain_is_taken_where_it_is_smaller():
    from compress.checkpoint.spec import Spec, Structure

    tensors = {f"t{kept}": Tensor(f"t{kept}", (10, 16), "BF16", kept=kept) for kept in (160, 150, 149, 10)}
    spec = codecs.with_storage(Spec(Structure({"model_type": "x"}), tensors), "compact")
    chosen = {name: t.storage for name, t in spec.tensors.items()}
    # bf16: 16 kept / 16 + 1 bit per weight: pays below 15/16 of 160 = 150 weights
    assert chosen == {"t160": DENSE, "t150": DENSE, "t149": MASKED, "t10": MASKED}
    assert not codecs.needs_code(codecs.with_storage(spec, "stock"))


def test_the_bundled_file_needs_torch_and_transformers_alone():
    import ast

    tree = ast.parse(bundle.source())
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else name.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert roots <= {"__future__", "json", "pathlib", "torch", "transformers", "safetensors", "huggingface_hub"}
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {"decode", "unpack_bits", "part_names", "CompressConfig", "CompressForCausalLM"} <= defined
    for auto in bundle._AUTO.values():
        assert auto.replace("AutoModel", "Compress") in defined
