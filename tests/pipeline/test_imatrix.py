"""imatrix.gguf of a run: mean squares of the inputs of every matrix, as llama.cpp reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import compress
from compress.exports.gguf.imatrix import Importance, imatrix_bytes, read_imatrix
from compress.pipeline.folder import RunFolder
from compress.pipeline.housekeeping import clean
from tests import pico
from tools.runtimes import llama_cpp

gguf = pytest.importorskip("gguf")


def test_imatrix_is_read_back_by_the_library_of_llama_cpp(tmp_path):
    sums = np.arange(6, dtype=np.float32).reshape(2, 3)
    entries = {"blk.0.ffn_up_exps.weight": Importance(sums, np.array([4, 0]))}
    file = tmp_path / "imatrix.gguf"
    file.write_bytes(imatrix_bytes(entries, ["a.txt", "b.txt"], 3))
    reader = gguf.GGUFReader(file)
    assert {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "b.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 3,
    }
    assert {t.name: (t.shape.tolist(), t.data.flatten().tolist()) for t in reader.tensors} == {
        "blk.0.ffn_up_exps.weight.in_sum2": ([3, 2], [0, 1, 2, 3, 4, 5]),
        "blk.0.ffn_up_exps.weight.counts": ([1, 2], [4, 0]),
    }
    assert read_imatrix(file)["blk.0.ffn_up_exps.weight"].tolist() == [[0, 0.25, 0.5], [1, 1, 1]]


def test_calibrated_run_leaves_an_imatrix_of_every_matrix(recipe, tmp_path):
    calibrated = {"prune_unstructured": {"sparsity": "50%", "method": "wanda"}}
    passes = [calibrated, {"cast": {"weights": "int8", "method": "rtn"}}]
    compress.run(recipe(passes=passes, store="stock", evaluate=[], gates={}))
    means = read_imatrix(tmp_path / "out.run" / "imatrix.gguf")
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    depth = compress.load(tmp_path / "out").config.num_hidden_layers
    assert set(means) == {f"blk.{block}.{part}.weight" for block in range(depth) for part in parts}
    assert all((values > 0).all() for values in means.values())
    assert np.array_equal(means["blk.0.attn_q.weight"], means["blk.0.attn_v.weight"])
    compress.run(recipe(passes=[{"cast": {"weights": "int8", "method": "rtn"}}], evaluate=[], gates={}))
    assert not (tmp_path / "out.run" / "imatrix.gguf").exists()
    run = RunFolder.of(tmp_path / "out")
    kept = [key for key in run.finished() if run.inputs(key).exists()]
    assert len(kept) == 1
    clean(tmp_path / "out")
    assert not run.inputs(kept[0]).exists()


@pytest.mark.slow
@pytest.mark.skipif(not (llama_cpp.HOME / llama_cpp.VERSION).exists(), reason="llama.cpp's library is not there")
def test_llama_cpp_quantises_with_the_imatrix_of_a_run(texts, tmp_path):
    from tests.checkpoint.dequantize.fixtures.make_gguf import tokenizer

    pico.save(tmp_path / "in", "llama", hidden_size=256, intermediate_size=256, dtype=torch.bfloat16)
    tokenizer().save_pretrained(tmp_path / "in")
    data = {"calibration": {"files": [str(texts[0])], "samples": 4, "length": 32}}
    passes = [{"prune_unstructured": {"sparsity": "50%", "method": "wanda"}}]
    compress.run({"model": str(tmp_path / "in"), "output": str(tmp_path / "out"), "passes": passes, "data": data})
    compress.export(tmp_path / "out", tmp_path / "dense.gguf", to="gguf")
    imatrix = tmp_path / "out.run" / "imatrix.gguf"
    for name, means in {"with": read_imatrix(imatrix), "without": None}.items():
        llama_cpp.quantize(tmp_path / "dense.gguf", tmp_path / f"{name}.gguf", "Q4_K_S", means)
    with_, without = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("with", "without"))
    assert len(with_) >= len(without)
    assert with_ != without
    compress.export(tmp_path / "out", tmp_path / "ours.gguf", to="gguf", type="Q4_K", imatrix=str(imatrix))
