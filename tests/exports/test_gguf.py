"""Exports to GGUF: the package's own reader gives back codes times scales, bit for bit, and refusals name the setting."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import compress
from compress.api.recipes import read_recipe
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.storage.reading import READERS
from compress.cli import main
from compress.errors import CompressError
from compress.exports.base import ExportError
from compress.exports.gguf.layout import gguf_file
from compress.exports.gguf.settings import GgufSettings
from compress.pipeline.exports import exports_of_plan
from tests import pico, toolbox
from tests.checkpoint.dequantize.fixtures.make_gguf import tokenizer

pytest.importorskip("gguf")


def exact(checkpoint, name):
    """Values of a tensor in float32: codes times scales, without the rounding to the checkpoint's dtype."""
    value = checkpoint.tensor(name)
    if value.codes is None:
        return value.data.float()
    codes, scale = value.codes.codes, value.codes.scale
    if codes.dtype == torch.uint8:
        powers = scale if scale.dtype == torch.uint8 else torch.full_like(codes[:, ::16], 127)
        values = READERS["mxfp4-pack-quantized",].dequantize(codes, powers, None).float()
        if value.codes.overall is not None:  # nvfp4
            values = values * spread(scale.float(), codes) / value.codes.overall
    else:
        whole = codes.float() if value.codes.zero is None else codes.float() - spread(value.codes.zero.float(), codes)
        values = whole * spread(scale.float(), codes)
    transposed = checkpoint.spec.tensors[name].quant_format.transposed
    return values.T if transposed else values


def spread(groups, codes):
    return groups.repeat_interleave(codes.shape[1] // groups.shape[1], 1)


def saved(folder, family="llama", **changes):
    """A pico checkpoint whose tokenizer has merges."""
    pico.save(folder, family, hidden_size=64, intermediate_size=64, dtype=torch.bfloat16, **changes)
    tokenizer().save_pretrained(folder)
    return folder


def exported(source, tmp_path, **settings):
    """The plan, and the file as our reader opens it, with the tokenizer beside it."""
    (tmp_path / "out").mkdir()
    plan = compress.export(source, tmp_path / "out" / "m.gguf", to="gguf", **settings)
    assert plan["bytes"] == (tmp_path / "out" / "m.gguf").stat().st_size
    back = open_checkpoint(source)
    config = {k: v for k, v in back.spec.structure.config.items() if k != "quantization_config"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "out")
    return plan, open_checkpoint(tmp_path / "out")


def same(before, back):
    """Assert that the file has the tensors of the checkpoint, codes times scales rounded once to its dtype."""
    assert {t.name for t in back.spec.stored()} == {t.name for t in before.spec.stored()}
    for tensor in before.spec.stored():
        expected = exact(before, tensor.name).to(torch.bfloat16)
        assert torch.equal(back.tensor(tensor.name).data.to(torch.bfloat16), expected), tensor.name


FORMATS = {
    "*.q_proj": "int2", "*.k_proj": "int3", "*.v_proj": "int5", "*.o_proj": "int6", "*.up_proj": "int8", "*.down_proj": "mxfp4",
    "*layers.0.*.gate_proj": "nvfp4",
}  # fmt: skip


def test_codes_of_every_width_are_kept_bit_for_bit(tmp_path):
    source = saved(tmp_path / "source")
    options = {"weights": "int4", "method": "rtn", "overrides": FORMATS}
    compress.apply("cast", source, tmp_path / "in", **options)
    plan, back = exported(tmp_path / "in", tmp_path, embeddings="keep")
    assert {(row["source"], row["type"]) for row in plan["tensors"] if row["type"] != "F32"} == {
        ("BF16", "BF16"), ("int2", "Q4_0"), ("int3", "Q4_0"), ("int4", "Q4_0"), ("int5", "Q5_0"), ("int6", "Q8_0"),
        ("int8", "Q8_0"), ("mxfp4", "MXFP4"), ("nvfp4", "NVFP4"),
    }  # fmt: skip
    assert {row["source"] for row in plan["tensors"] if not row["exact"]} == {"nvfp4"}
    assert "one over nvfp4's global scales is rounded to float32" in plan["notes"]
    same(open_checkpoint(tmp_path / "in"), back)


def test_command_plans_writes_and_refuses(tmp_path, capsys, monkeypatch):
    source, target = saved(tmp_path / "in"), tmp_path / "m.gguf"

    def call(*more):
        monkeypatch.setattr("sys.argv", ["compress", "export", str(source), "--to", "gguf", "-o", str(target), *more])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, capsys.readouterr()

    status, planned = call("--dry-run", "--json")
    assert (status, target.exists()) == (0, False)
    status, written = call()
    assert (status, target.stat().st_size) == (0, json.loads(planned.out)["bytes"])
    assert "exact" in written.out
    status, refused = call()
    assert (status, "exists already; name another output" in refused.err) == (2, True)
    with pytest.raises(CompressError, match="there is no target `ggml`; did you mean `gguf`"):
        compress.export(source, tmp_path / "b", to="ggml")
    with pytest.raises(CompressError, match="gguf has no setting `kind`; its settings: type, embeddings, imatrix"):
        compress.export(source, tmp_path / "b", to="gguf", kind="Q4_K")


def test_what_gguf_has_not_is_refused_before_writing(tmp_path):
    source = saved(tmp_path / "source")
    compress.apply("cast", source, tmp_path / "in", weights="int4", group_size=16, method="rtn")
    with pytest.raises(ExportError, match=r"groups of 16 of 64 inputs; cast with `group_size: 32`"):
        compress.export(tmp_path / "in", tmp_path / "out.gguf", to="gguf")
    qwen2 = open_checkpoint(pico.folder("qwen2", hidden_size=64, intermediate_size=64, dtype=torch.bfloat16))
    with pytest.raises(
        ExportError, match="leaves out nvfp4's global scales in models of the type `qwen2`; cast to mxf"
    ):
        gguf_file(toolbox.plan(qwen2, "cast", weights="nvfp4", method="rtn"), source, GgufSettings())
    with pytest.raises(CompressError, match="models of the type `bert` are not written as GGUF; it writes gemma2,"):
        compress.export(pico.folder("bert"), tmp_path / "out.gguf", to="gguf")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_recipes_write_exports_beside_the_output_and_again_where_they_are_gone(tmp_path):
    source = saved(tmp_path / "source")
    passes = [{"cast": {"weights": "int4", "method": "rtn"}}]
    recipe = {"model": str(source), "output": str(tmp_path / "small"), "passes": passes, "export": ["gguf"]}
    file = tmp_path / "small.gguf"
    (planned,) = exports_of_plan(read_recipe(recipe), compress.plan(recipe), source)
    report = compress.run(recipe).report
    assert (planned["path"], planned["bytes"], planned["exact"]) == (str(file), file.stat().st_size, True)
    assert report["exports"] == [{"target": "gguf", "path": str(file), "bytes": file.stat().st_size}]
    first = file.read_bytes()
    file.unlink()
    assert compress.run(recipe).nothing_to_do
    assert file.read_bytes() == first
    recipe["export"] = [{"gguf": {"embeddings": "keep"}}]
    assert compress.run(recipe).report["exports"][0]["bytes"] > len(first)
    file.write_bytes(b"mine")
    with pytest.raises(CompressError, match="exists and is not of this run; move it away"):
        compress.run({**recipe, "seed": 1})
    with pytest.raises(CompressError, match="unknown target `ggml`"):
        compress.check({**recipe, "export": ["ggml"]})
