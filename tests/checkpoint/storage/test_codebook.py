"""Codebooks in files: planned parts are the written ones, every loader sees the same values, damage is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import compress
from compress.checkpoint.modeling import decoded_state_dict
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.storage import bits as packing
from compress.checkpoint.storage import codebook, encode, parts
from compress.checkpoint.storage.codebook import CODEBOOK
from compress.checkpoint.storage.compressed_tensors.loaders import stock_holds
from compress.checkpoint.storage.reading import decode, part_names
from compress.checkpoint.store import needs_code, with_storage
from compress.checkpoint.values import Codes, Derived, Value, torch_dtype
from compress.checkpoint.write import stored_form, write_checkpoint
from compress.errors import CheckpointError
from compress.inspection import diff, inspect
from compress.planning import size_of
from compress.solvers.quant_format import dequantize
from compress.spec.formats import CODEBOOKS, QuantFormat
from compress.spec.spec import FLOAT_DTYPES, Tensor
from tests import pico


def random_codes(shape, bits, dtype, seed, mask=None):
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)
    book = torch.randn(2 * half, generator=generator).sort().values.to(dtype)
    book[0] = 0.0  # kept weights that are zero
    return Codes(codes if mask is None else codes.masked_fill(~mask, 0), book)


@given(
    st.sampled_from(list(CODEBOOKS)), st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.sampled_from(list(FLOAT_DTYPES)), st.none() | st.floats(0, 1), st.integers(0, 10_000),
)  # fmt: skip
def test_decode_undoes_encode_of_codebooks(format_, shape, dtype, share, seed):
    quant_format, shape = QuantFormat(format_), tuple(shape)
    mask = None if share is None else torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    codes = random_codes(shape, quant_format.bits, torch_dtype(dtype), seed, mask)
    chain = CODEBOOK if mask is None else ("mask", *CODEBOOK)
    tensor = Tensor("a.w", shape, dtype, None if mask is None else int(mask.sum()), None, chain, quant_format)
    encoded = encode(Value(dequantize(codes, mask), mask, codes), tensor)
    assert {part.role for part in parts(tensor)} == encoded.keys()
    for part in parts(tensor):
        assert tuple(encoded[part.role].shape) == part.shape
        assert encoded[part.role].numel() * encoded[part.role].element_size() == part.bytes
        assert part_names("a.w", chain, quant_format.to_json())[part.role] == part.key
    data, found = decode(encoded, chain, shape, mask is not None, quant_format.to_json())
    numbers = codes.codes.long() + (1 << quant_format.bits - 1)
    expected = codes.scale[numbers] if mask is None else torch.where(mask, codes.scale[numbers], 0)
    assert data.dtype == torch_dtype(dtype)
    assert torch.equal(data, expected)
    assert torch.equal(found, mask) if mask is not None else found is None


def test_decode_of_long_codebook_tensors_by_parts(monkeypatch):
    codes = random_codes((9, 41), 3, torch.float32, 0)
    tensor = Tensor("w", (9, 41), "F32", storage=CODEBOOK, quant_format=QuantFormat("codebook3"))
    encoded = encode(Value(dequantize(codes), None, codes), tensor)
    monkeypatch.setattr(packing, "_AT_ONCE", 64)
    monkeypatch.setattr(codebook, "_LOOKUPS", 64)
    again = encode(Value(dequantize(codes), None, codes), tensor)
    assert torch.equal(encoded["codes"], again["codes"])
    data, _ = decode(again, CODEBOOK, (9, 41), False, tensor.quant_format.to_json())
    assert torch.equal(data, codes.scale[codes.codes.long() + 4])


def coded(folder, bits=3, share=None):
    """The checkpoint with random codes for every float tensor of two axes or more, masked with ``share``."""
    base = open_checkpoint(folder)
    values, tensors = {}, dict(base.spec.tensors)
    for seed, tensor in enumerate(base.spec.stored()):
        if tensor.dtype not in FLOAT_DTYPES or len(tensor.shape) < 2:
            continue
        random = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed))
        mask = None if share is None else random < share
        codes = random_codes(tensor.shape, bits, torch_dtype(tensor.dtype), seed, mask)
        values[tensor.name] = Value(dequantize(codes, mask), mask, codes)
        kept = None if mask is None else int(mask.sum())
        tensors[tensor.name] = replace(tensor, quant_format=QuantFormat(f"codebook{bits}"), kept=kept)
    spec = replace(base.spec, tensors=tensors)
    return Derived(base, spec, lambda name: values.get(name) or base.tensor(name)), values


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Family ▶ what was written, and the values; with embeddings, transposed and masked matrices among them."""
    root = tmp_path_factory.mktemp("coded")
    found = {}
    for family, options, share in (
        ("llama", {"dtype": torch.bfloat16}, 0.4), ("gpt2", {}, None), ("vit", {}, 0.95),
    ):  # fmt: skip
        folder = pico.save(root / family, family, with_tokenizer=False, **options)
        changed, values = coded(folder, share=share)
        planned, layout = stored_form(changed.spec, "compact", 10_000, changed.metadata)
        done = write_checkpoint(changed, root / f"{family}-out", store="compact", max_shard=10_000)
        assert done.bytes == layout.bytes == size_of(planned, layout).bytes
        assert done.bytes == sum(f.stat().st_size for f in done.folder.glob("*.safetensors"))
        assert len(layout.shards) > 1
        found[family] = done, values
    return found


def test_codebook_values_codes_and_masks_round_trip(written):
    for done, values in written.values():
        opened = open_checkpoint(done.folder)
        for name, value in values.items():
            tensor, found = opened.spec.tensors[name], opened.tensor(name)
            assert tensor == done.spec.tensors[name]
            assert tensor.storage == (CODEBOOK if value.mask is None else ("mask", *CODEBOOK))
            assert torch.equal(found.data, value.data)
            assert torch.equal(found.codes.codes, value.codes.codes)
            assert torch.equal(found.codes.scale, value.codes.scale)
            if value.mask is not None:
                assert torch.equal(found.mask, value.mask)
                assert (found.data[found.mask] == 0).any()
                assert not torch.signbit(found.data[~found.mask]).any()


@pytest.mark.slow
def test_codebook_loaders_match_dense_twin(written, stock_outputs, tmp_path):
    cases = {}
    for family, (done, values) in written.items():
        dense = compress.unpack(done.folder, tmp_path / family)
        twin = open_checkpoint(dense)
        for name, value in values.items():
            assert torch.equal(twin.tensor(name).data, value.data)
            assert value.mask is None or torch.equal(twin.tensor(name).mask, value.mask)
        ours, theirs = compress.load(done.folder), compress.load(dense)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        # the kernels of convolutions round by the alignment of what they read
        slack = 1e-5 if family == "vit" else 0.0
        torch.testing.assert_close(pico.logits(ours), pico.logits(theirs), rtol=slack, atol=slack)
        pico.save_expected(theirs, tmp_path / f"{family}.pt")
        auto = "AutoModelForImageClassification" if family == "vit" else "AutoModelForCausalLM"
        cases[family] = (auto, done.folder, tmp_path / f"{family}.pt")
    for family, row in stock_outputs(cases, trust_remote_code=True, dtype="auto").items():
        assert row.get("difference", 1.0) <= (1e-6 if family == "vit" else 0.0), (family, row)


def test_codebook_inspect_and_diff(written, tmp_path):
    done, values = written["llama"]
    found = inspect(done.folder)
    assert found["compact"]
    rows = {row["name"]: row for row in found["tensors"]}
    assert {rows[name]["storage"] for name in values} == {"mask ∘ codebook3"}
    tensor = done.spec.tensors["model.embed_tokens.weight"]
    words = -(-3 * tensor.kept // 32)
    assert rows[tensor.name]["bytes"] == 300 * 32 // 8 + 4 * words + 2 * 8
    assert rows[tensor.name]["sparsity"] == 1 - tensor.kept / (300 * 32)
    assert diff(done.folder, done.folder)["same"]
    twin = diff(done.folder, compress.unpack(done.folder, tmp_path / "dense"))
    assert all(row["max_difference"] == 0 for row in twin["tensors"])


def test_codebook_values_are_written_in_stock_store(tmp_path):
    changed, values = coded(pico.save(tmp_path / "in", "llama", with_tokenizer=False), share=0.9)
    assert needs_code(with_storage(changed.spec, "compact"))
    stock = with_storage(changed.spec, "stock")
    assert not needs_code(stock)
    assert not any(stock_holds(changed.spec)(changed.spec.tensors[name]) for name in values)
    done = write_checkpoint(changed, tmp_path / "out", store="stock")
    opened = open_checkpoint(done.folder)
    assert all(torch.equal(opened.tensor(name).data, value.data) for name, value in values.items())
    assert "quantization_config" not in json.loads((done.folder / "config.json").read_text())


def damaged(folder, tmp_path, change):
    """A copy of a one-file checkpoint whose arrays and table were changed."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file is not a dict
        table = json.loads(file.metadata()["compress.tensors"])
    change(arrays, table)
    other = tmp_path / "damaged"
    other.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    metadata = {"format": "pt", "compress.tensors": json.dumps(table)}
    save_file(arrays, other / "model.safetensors", metadata=metadata)
    return other


def test_codebook_damage_is_refused_in_one_line(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folders = {}
    for kind, share in (("plain", None), ("masked", 0.5)):
        changed, _ = coded(pico.save(tmp_path / f"{kind}-in", "llama", with_tokenizer=False), share=share)
        folders[kind] = write_checkpoint(changed, tmp_path / kind, store="compact").folder

    def cut(part):
        return lambda arrays, table: arrays.update({f"{name}.{part}": arrays[f"{name}.{part}"][:-1].clone()})

    def lose(part):
        return lambda arrays, table: arrays.pop(f"{name}.{part}")

    def say(**row):
        return lambda arrays, table: table[name].update(row)

    quant_format = QuantFormat("codebook3").to_json()
    cases = [
        ("plain", cut("codes"), f"array {name}.codes does not match the metadata"),
        ("plain", cut("codebook"), f"array {name}.codebook does not match the metadata"),
        ("plain", lose("codebook"), f"damaged table of stored tensors: KeyError\\('{name}.codebook'"),
        ("plain", lose("codes"), f"damaged table of stored tensors: KeyError\\('{name}.codes'"),
        ("plain", say(kept=7), "damaged table of stored tensors"),
        ("plain", say(grid={**quant_format, "format": "int3"}), "damaged table of stored tensors"),
        (
            "plain",
            say(grid={**quant_format, "format": "codebook9", "bits": 9}),
            "damaged table of stored tensors",
        ),
        ("plain", say(grid={**quant_format, "transposed": True}), "damaged table of stored tensors"),
        ("plain", say(storage=["pack-quantized"]), "damaged table of stored tensors"),
        ("masked", say(storage=["codebook"]), "damaged table of stored tensors"),
        ("masked", lose("keep"), f"damaged table of stored tensors: KeyError\\('{name}.keep'"),
        ("masked", cut("codes"), f"array {name}.codes does not match the metadata"),
        ("masked", lambda arrays, table: arrays[f"{name}.keep"].fill_(255), r"the keep-mask keeps 2048 weights"),
    ]
    for kind, change, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            compress.load(damaged(folders[kind], tmp_path, change))
        assert "\n" not in str(caught.value)
    bundled = [
        (cut("codes"), "there are 2048 weights, 191 words of codes are stored"),
        (cut("codebook"), "a codebook of 3 bits has 8 values, 7 are stored"),
        (lose("codebook"), f"{name}.codebook"),
    ]
    for change, message in bundled:
        with pytest.raises((ValueError, SafetensorError), match=message) as found:
            decoded_state_dict(damaged(folders["plain"], tmp_path, change))
        assert "\n" not in str(found.value)
