"""GGUF files: blocks of every type, files of llama.cpp's converter, damaged headers, and a recipe from file to stock reload."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import compress
from compress.checkpoint.dequantize.ggml import TYPES, dequantize
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.errors import CheckpointError
from compress.inspection import inspect
from tests import pico

FOLDER = Path(__file__).parent / "fixtures"
CONVERTED = sorted(path.name.removesuffix("-expected.safetensors") for path in FOLDER.glob("*-expected.safetensors"))
CODES = [kind for kind in TYPES.values() if kind.dtype is None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", CODES, ids=[kind.name for kind in CODES])
def test_blocks_have_the_values_of_the_reference(kind):
    stored = load_file(FOLDER / "ggml.blocks")
    blocks, expected = stored[kind.name], stored[f"expected/{kind.name}"]
    assert blocks.shape[1] == kind.bytes
    assert torch.equal(dequantize(blocks.flatten(), kind, expected.shape, torch.float32), expected)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_files_give_back_the_model(name):
    """Tensors equal those that the converter was given, bit for bit, and the config gives the same logits."""
    expected = load_file(FOLDER / f"{name}-expected.safetensors")
    logits = expected.pop("logits")
    checkpoint = open_checkpoint(FOLDER / f"{name}.gguf")
    assert {tensor.name for tensor in checkpoint.spec.stored()} == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(checkpoint.tensor(key).data, value)] == []
    model = compress.load(FOLDER / f"{name}.gguf", dtype="float32")
    with torch.no_grad():
        values = model(torch.arange(5, 17)[None]).logits
    assert (values - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_inspect_reads_the_file_alone(tmp_path):
    facts = inspect(FOLDER / "llama.gguf")
    assert facts["size"]["bytes"] == (FOLDER / "llama.gguf").stat().st_size
    assert {row["storage"] for row in facts["tensors"] if not row["tied_to"]} == {"GGUF Q8_0", "GGUF F32"}
    assert "are read as bfloat16" in facts["notes"][0]
    assert not (tmp_path / "cache").exists()


def test_tokenizer_comes_from_the_file():
    tokenizer = transformers.AutoTokenizer.from_pretrained(open_checkpoint(FOLDER / "llama.gguf").folder)
    assert tokenizer("the a cat").input_ids == [257, 69, 259, 221, 67, 65, 84]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (258, 0)
    assert tokenizer.decode([257, 69]) == "the"


@pytest.mark.slow
def test_recipe_from_gguf_to_stock_reload(texts, stock_outputs, tmp_path):
    (tmp_path / "in").mkdir()
    file = shutil.copy(FOLDER / "llama.gguf", tmp_path / "in" / "m.gguf")
    for place in (file, tmp_path / "in"):  # the file, or the folder that has it
        output = tmp_path / "run" / ("file" if place.suffix else "folder")
        recipe = {
            "model": str(place),
            "output": str(output),
            "document_separator": "<|doc|>",
            "data": {
                "calibration": {"files": [str(texts[0])], "samples": 4, "length": 32},
                "evaluation": {"files": [str(texts[1])], "window": 32, "max_documents": 4},
            },
            "passes": [{"cast": {"effort": "fast", "weights": "int4", "group_size": 32}}],
            "evaluate": ["kl"] if place.suffix else [],
        }
        result = compress.run(recipe)
        assert result.report["original"]["size"]["bytes"] == file.stat().st_size
        assert not list(result.checkpoint.glob("*.gguf"))
        assert transformers.AutoTokenizer.from_pretrained(result.checkpoint)("the").input_ids == [257, 69]
    model = compress.load(result.checkpoint)
    pico.save_expected(model, tmp_path / "expected.pt")
    outputs = stock_outputs({"gguf": (type(model).__name__, result.checkpoint, tmp_path / "expected.pt")}, dtype="auto")
    assert outputs["gguf"].get("difference", outputs["gguf"]) <= 1e-5


def test_own_config_and_tokenizer_beside_the_file_win(tmp_path):
    shutil.copy(FOLDER / "llama.gguf", tmp_path / "m.gguf")
    config = json.loads((open_checkpoint(FOLDER / "llama.gguf").folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 77.0}))
    pico.tokenizer().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.folder == tmp_path
    assert checkpoint.spec.structure.config["rope_theta"] == 77
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(CheckpointError, match=r"is not the config of m.gguf, whose `hidden_size` is 32"):
        open_headers(tmp_path)
    shutil.copy(FOLDER / "qwen3.gguf", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files, such as m.gguf"):
        open_headers(tmp_path)


def test_unknown_rules_of_a_tokenizer_are_refused(tmp_path):
    data = (FOLDER / "llama.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"gpt-2", b"gpt-X", 1))
    open_headers(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"a tokenizer with the rules 'gpt-X', .*tokenizer.json beside it"):
        open_checkpoint(tmp_path / "m.gguf")


def replaced(old, new):
    """A change of bytes of the header; of one length, so that nothing else moves."""
    assert len(old) == len(new)
    return lambda data: data.replace(old, new, 1)


def type_of(name, number):
    """A change of a tensor's type."""

    def change(data):
        place = data.index(name) + len(name)
        axes = struct.unpack_from("<I", data, place)[0]
        place += 4 + 8 * axes
        return data[:place] + struct.pack("<I", number) + data[place + 4 :]

    return change


HEADERS = [
    (replaced(b"GGUF", b"GGML"), "is not a GGUF file"),
    (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "is GGUF of version 1"),
    (lambda data: data[:5000], "is truncated"),
    (lambda data: data[:-40], r"is truncated: tensor .* ends \d+ bytes after the end"),
    (lambda data: data[:8] + b"\xff" * 8 + data[16:], "has a tensor  with .* axes|truncated"),
    (lambda data: data[:8], "truncated, or its header is damaged"),
    (type_of(b"blk.0.ffn_up.weight", 19), "stores blk.0.ffn_up.weight as IQ1_S, which this version cannot read"),
    (type_of(b"blk.0.ffn_up.weight", 12), r"as Q4_K, whose blocks have 256 values"),
    (type_of(b"blk.0.attn_q.weight", 0), "in one place|truncated"),
    (replaced(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"), "has the tensor blk.0.ffn_xx.weight, which LlamaFor"),
    (replaced(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "has the tensor blk.0.ffn_up.weight twice"),
    (replaced(b"llama.embedding_length", b"llama.embedding_lengtx"), "has no usable `llama.embedding_length`"),
    (replaced(b"general.architecture", b"general.architecturx"), "the architecture `None`"),
    (replaced(b"token_embd", b"tokenXembd"), "has no table of embeddings"),
]


@pytest.mark.parametrize(("change", "message"), HEADERS, ids=[str(i) for i in range(len(HEADERS))])
def test_damaged_headers_are_refused_in_one_line(change, message, tmp_path):
    data = (FOLDER / "llama.gguf").read_bytes()
    (tmp_path / "bad.gguf").write_bytes(change(data))
    with pytest.raises(CheckpointError, match=message) as error:
        open_headers(tmp_path / "bad.gguf")
    assert "\n" not in str(error.value)


def test_values_that_are_none_are_refused_on_reading(tmp_path):
    data = bytearray((FOLDER / "llama.gguf").read_bytes())
    data[-2000:] = b"\xff" * 2000
    (tmp_path / "bad.gguf").write_bytes(data)
    checkpoint = open_checkpoint(tmp_path / "bad.gguf")
    last = list(checkpoint.spec.sources)[-1]
    with pytest.raises(CheckpointError, match="its values are NaN or infinite: the file is damaged"):
        checkpoint.tensor(last)
