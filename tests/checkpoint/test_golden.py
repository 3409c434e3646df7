"""Committed checkpoints of format 1, one for each codec and each edit, still open, unpack and compute what is recorded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from compress import architectures
from compress.checkpoint import bundle
from compress.checkpoint.edits import EDIT_KINDS
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.checkpoint.storage import CHAINS
from compress.checkpoint.write import write_checkpoint
from compress.spec.formats import ACTIVATIONS, CODEBOOKS, FLOATS, INTEGERS, TRELLISES
from tests.checkpoint import golden

RECORDED = json.loads((golden.FOLDER / golden.EXPECTED).read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_golden_opens_unpacks_and_computes_as_recorded(name):
    found = golden.expected(golden.FOLDER / name)
    logits = torch.tensor(found.pop("logits")), torch.tensor(RECORDED[name]["logits"])
    assert found == {key: value for key, value in RECORDED[name].items() if key != "logits"}
    assert logits[1].std() > 0.05  # a model whose weights matter
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RECORDED)
def test_golden_written_again_has_the_same_bytes(name, tmp_path):
    limit = golden.SHARDED.get(name, 1 << 30)
    write_checkpoint(open_checkpoint(golden.FOLDER / name), tmp_path / "again", store="compact", max_shard=limit)
    files = sorted(path.name for path in (golden.FOLDER / name).iterdir())
    assert {"config.json"} < set(files)
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (golden.FOLDER / name / file).read_bytes(), file


def test_golden_covers_each_codec_and_edit():
    assert RECORDED.keys() == golden.MAKERS.keys()
    specs = [open_headers(golden.FOLDER / name)[0] for name in RECORDED]
    tensors = [tensor for spec in specs for tensor in spec.stored()]
    assert {tensor.storage for tensor in tensors} == set(CHAINS)
    quant_formats = {tensor.quant_format for tensor in tensors if tensor.quant_format is not None}
    formats = {*INTEGERS, *FLOATS, *CODEBOOKS, *TRELLISES}
    assert {quant_format.format for quant_format in quant_formats} == formats
    assert {quant_format.activations for quant_format in quant_formats} == {None, *ACTIVATIONS}
    assert {edit.kind for spec in specs for edit in spec.structure.edits} == EDIT_KINDS.keys()
    turned = {architectures.of(spec.structure.config).input_axis == 0 for spec in specs if spec.structure.edits}
    assert turned == {True, False}
    assert all(spec.structure.compact for spec in specs)


@pytest.mark.parametrize(
    "names", [[*RECORDED][::4], pytest.param([*RECORDED], marks=pytest.mark.slow)], ids=["a fourth", "all"]
)
def test_golden_is_read_by_the_bundled_file(names, stock, tmp_path):
    for name in names:
        shutil.copytree(golden.FOLDER / name, tmp_path / name)
        (tmp_path / name / bundle.FILE_NAME).write_bytes(bundle.source())
    code = (
        "import json, torch\nfrom transformers import AutoModelForCausalLM, AutoModelForMaskedLM\n"
        f"ids, result = torch.tensor({golden.IDS.tolist()}), {{}}\n"
        f"for name in {names}:\n"
        "    auto = AutoModelForMaskedLM if name in ('projections', 'kernels') else AutoModelForCausalLM\n"
        f"    model = auto.from_pretrained('{tmp_path}/' + name, trust_remote_code=True, dtype='float32')\n"
        "    with torch.no_grad():\n"
        "        result[name] = model(input_ids=ids).logits[0, -1].tolist()\n"
        "print(json.dumps(result))\n"
    )
    found = json.loads(stock(code).splitlines()[-1])
    assert [*found] == names
    for name, logits in found.items():
        recorded = torch.tensor(RECORDED[name]["logits"])
        torch.testing.assert_close(torch.tensor(logits), recorded, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_golden_changed_byte_is_noticed(tmp_path):
    shutil.copytree(golden.FOLDER / "packed", tmp_path / "packed")
    path = tmp_path / "packed/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert golden.digest(open_checkpoint(tmp_path / "packed")) != RECORDED["packed"]["tensors"]
