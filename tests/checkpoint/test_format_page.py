"""docs/format.md says enough to read a compact checkpoint: its own Python blocks do, with numpy alone, bit by bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import compress
from compress.checkpoint import bundle
from compress.checkpoint.edits import EDIT_KINDS, to_json
from compress.checkpoint.edits.twin import dense
from compress.checkpoint.headers import read_header
from compress.checkpoint.layout import METADATA_KEY
from compress.checkpoint.modeling import INPUT_ARRAYS
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.storage import CHAINS, parts
from compress.checkpoint.storage.compressed_tensors import write as compressed_tensors
from compress.checkpoint.store import with_storage
from compress.spec.formats import ACTIVATIONS, CODEBOOKS, FLOATS, INTEGERS, TRELLISES, QuantFormat
from tests.checkpoint import golden

PAGE = (Path(__file__).resolve().parents[2] / "docs/format.md").read_text(encoding="utf-8")
NAMES = sorted(json.loads((golden.FOLDER / golden.EXPECTED).read_text()))


@pytest.fixture(scope="module")
def reader():
    """The names that the Python blocks of the page define, which import nothing but json, pathlib and numpy."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks)
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE)) == {"json", "pathlib", "numpy"}
    names: dict[str, object] = {}
    exec(compile(code, "docs/format.md", "exec"), names)
    return names


def as_float(data):
    return (data.float() if data.dtype == torch.bfloat16 else data).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_format_page_reads_what_the_package_reads(reader, name):
    tensors, config = reader["read"](golden.FOLDER / name)
    opened = open_checkpoint(golden.FOLDER / name)
    assert config["edits"] == to_json(opened.spec.structure.edits)
    assert tensors.keys() == {tensor.name for tensor in opened.spec.stored()}
    for key, (values, mask) in tensors.items():
        value = opened.tensor(key)
        np.testing.assert_array_equal(values, as_float(value.data), err_msg=key, strict=True)
        assert (mask is None) == (value.mask is None), key
        if mask is not None:
            np.testing.assert_array_equal(mask, value.mask.numpy(), err_msg=key)
            assert mask.sum() == opened.spec.tensors[key].kept
    if any(edit["kind"] in ("sized", "local", "linformer") for edit in config["edits"]):
        with pytest.raises(compress.errors.PassError, match="no stock class"):
            dense(opened)
        return
    unpacked = dense(opened)
    twin = reader["twin"](tensors, config["edits"])
    assert twin.keys() == {tensor.name for tensor in unpacked.spec.stored()}
    for key, values in twin.items():
        expected = unpacked.tensor(key).data
        found = torch.from_numpy(np.ascontiguousarray(values)).to(expected.dtype)
        assert torch.equal(found, expected), key


def test_format_page_rounds_as_torch_does(reader):
    bytes_ = np.arange(256, dtype=np.uint8)
    finite = bytes_[(bytes_ & 127) != 127]
    floats = torch.from_numpy(finite.copy()).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(reader["e4m3"](finite), floats)
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 100
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0])  # ties
    for each in (values, halves):
        np.testing.assert_array_equal(reader["to_dtype"](each.numpy(), "BF16"), each.bfloat16().float().numpy())


def keys_of(data):
    """All keys of JSON objects within a value."""
    if isinstance(data, dict):
        return {*data, *(key for value in data.values() for key in keys_of(value))}
    return {key for value in data for key in keys_of(value)} if isinstance(data, list) else set()


def test_format_page_has_every_name_that_is_written(tmp_path):
    quoted = " ".join(re.findall(r"`([^`\n]+)`", PAGE))
    named = {*re.findall(r"[\w.\-]+", quoted), *re.findall(r"[\w\-]+", quoted)}
    named |= {f"int{bits}" for bits in range(2, 7)} | {*CODEBOOKS, *TRELLISES}  # the page gives first and last
    written, suffixes = (
        {METADATA_KEY, "mask", *INPUT_ARRAYS, *INTEGERS, *FLOATS, *ACTIVATIONS, *EDIT_KINDS},
        set(),
    )
    written |= {codec for chain in CHAINS for codec in chain} | {bundle.FILE_NAME, bundle.CLASS_NAME}
    for name in NAMES:
        config = json.loads((golden.FOLDER / name / "config.json").read_text())
        written |= config.keys() | set(config["auto_map"]) | set(config["auto_map"].values())
        written |= {key for edit in config["edits"] for key in (*edit, *edit["values"])}
        for path in (golden.FOLDER / name).glob("*.safetensors"):
            metadata = read_header(path).metadata
            rows = json.loads(metadata.get(METADATA_KEY, "{}")).values()
            written |= metadata.keys() | {key for row in rows for key in keys_of(row)}
        spec = open_checkpoint(golden.FOLDER / name).spec
        for tensor in spec.stored():
            suffixes |= {part.key.removeprefix(tensor.name) for part in parts(tensor)}
    index = json.loads((golden.FOLDER / "widths/model.safetensors.index.json").read_text())
    written |= {*index, *index["metadata"]}
    base = golden.base(tmp_path)
    for quant_formats in (
        {
            "q_proj": QuantFormat("int8", activations="int8"),
            "k_proj": QuantFormat("fp8", whole=True),
            "v_proj": QuantFormat("int4", 8),
        },
        {"_proj": QuantFormat("mxfp4", 16)},
        {"_proj": QuantFormat("nvfp4", 16)},
        {"_proj": QuantFormat("fp8", 128, block=True, activations="fp8-group")},
    ):
        tensors = {
            name: replace(
                tensor,
                quant_format=next((g for end, g in quant_formats.items() if name.endswith(f"{end}.weight")), None),
            )
            for name, tensor in base.spec.tensors.items()
        }
        config = compressed_tensors.render(with_storage(replace(base.spec, tensors=tensors), "stock"))
        groups = config["config_groups"].values()
        written |= {*config, compressed_tensors.KEY, config["quant_method"], config["format"]}
        written |= {key for group in groups for key in keys_of(group)} | {group["format"] for group in groups}
        written |= {group["weights"][key] for group in groups for key in ("type", "strategy")}
    assert sorted(written - named) == []
    stored = {suffix for suffix in suffixes if suffix and not suffix.startswith("model.")}
    assert sorted(part for part in stored if f"name{part}" not in PAGE) == []
    assert stored > {"_packed", ".keep", ".codebook"}


def test_format_page_has_every_chain_and_edit():
    for chain in CHAINS:
        assert f"`{json.dumps(list(chain))}`" in PAGE, chain
    for kind in EDIT_KINDS:
        assert re.search(rf"^\| `{kind}` \|", PAGE, re.MULTILINE), kind
        assert f"\n**`{kind}`**" in PAGE, kind
    for activations in ACTIVATIONS:
        assert f"`{activations}`" in PAGE, activations
