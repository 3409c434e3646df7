"""Own decoders against the values that the libraries themselves give, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compress.checkpoint import dequantize
from compress.checkpoint.files import read_bytes
from compress.checkpoint.headers import read_header
from compress.checkpoint.values import torch_dtype
from compress.errors import CheckpointError

FOLDER = Path(__file__).parent / "fixtures"
FILES = sorted(path.stem for path in FOLDER.glob("*.safetensors") if "-expected" not in path.stem)


def opened(name):
    """Config, entries of the checkpoint's arrays, a reader, and the expected values."""
    path = FOLDER / f"{name}.safetensors"
    header, read = read_header(path), read_bytes(FOLDER)
    entries = {key: entry for key, entry in header.entries.items() if not key.startswith("expected/")}

    def array(key):
        entry = entries[key]
        return read((path.name, header.data_start + entry.start), entry.end - entry.start)

    with safe_open(path, "pt") as file:
        expected = {key.removeprefix("expected/"): file.get_tensor(key) for key in file.keys() if "expected/" in key}  # noqa: SIM118
    return json.loads(header.metadata["config"]), entries, array, expected


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at_once", [1 << 24, 100])
def test_decoders_give_the_values_of_the_libraries(name, at_once, monkeypatch):
    monkeypatch.setattr("compress.checkpoint.dequantize.base.AT_ONCE", at_once)  # a few rows at a time
    config, entries, array, expected = opened(name)
    tensors, sources, left, notes = dequantize.parse(config, entries, array, "here")
    assert tensors.keys() == expected.keys()
    assert {*left} | {key for source in sources.values() for key in source.arrays.values()} == entries.keys()
    assert "read as" in notes[0]
    for key, source in sources.items():
        arrays = {
            role: torch.frombuffer(bytearray(array(part)), dtype=torch_dtype(entries[part].dtype)).reshape(
                entries[part].shape
            )
            for role, part in source.arrays.items()
        }
        values = source.decode(arrays, torch_dtype(tensors[key].dtype))
        assert values.shape == tensors[key].shape
        assert torch.equal(values, expected[key].to(values.dtype)), key
        assert source.bytes == sum(a.numel() * a.element_size() for a in arrays.values())


def test_missing_arrays_and_unknown_algorithms_are_refused():
    config, entries, array, _ = opened("modelopt_nvfp4")
    for gone, message in (
        ("a.weight_scale_2", r"has a.weight_scale \(F8_E4M3\), and nothing beside it"),
        ("a.weight_scale", "but not a.weight_scale, which its values need"),
        ("a.weight", "but not a.weight, which its values need"),
    ):
        with pytest.raises(CheckpointError, match=message):
            dequantize.parse(config, {key: entry for key, entry in entries.items() if key != gone}, array, "here")
    config["quantization_config"]["quant_algo"] = "W4A8_AWQ"
    with pytest.raises(CheckpointError, match=r"quant_algo`: 'W4A8_AWQ', which this version cannot"):
        dequantize.parse(config, entries, array, "here")
