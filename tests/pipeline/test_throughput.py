"""Throughput in runtimes: what is refused before work, how gates judge it, and a run in llama.cpp itself."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.errors import CompressError, RecipeError
from compress.gates import judge
from tests import pico
from tools.runtimes import llama_cpp

HERE = llama_cpp.HOME / llama_cpp.VERSION


def test_run_refuses_a_runtime_that_is_not_there(recipe, tmp_path):
    asked = {"throughput": {"path": str(tmp_path / "none")}}
    with pytest.raises(
        CompressError, match=r"throughput needs llama.cpp, which is not in .*none; npm install --ignore-"
    ):
        compress.run(recipe(evaluate=[asked]))
    asked = {"throughput": {"runtime": "onnxruntime", "path": str(tmp_path / "none")}}
    with pytest.raises(CompressError, match=r"; python3 -m venv .*none && .*none/bin/pip install onnxruntime-genai=="):
        compress.run(recipe(evaluate=[asked]))
    with pytest.raises(CompressError, match="measured by `compress run`; write it below `evaluate` of a recipe"):
        compress.evaluate(recipe()["model"], metrics=["throughput"])
    assert not (tmp_path / "out.run").exists()


def test_throughput_gates_need_a_bound(recipe):
    for gate, message in (
        ({}, "a gate needs a bound: `prefill` or `decode`"),
        ({"decode": {}}, "a gate needs a bound"),
    ):
        with pytest.raises(RecipeError, match=message):
            compress.check(recipe(gates={"throughput": gate}))
    assert compress.check(recipe(gates={"throughput": {"decode": {"min_ratio": 1.5}}}))


@pytest.mark.parametrize(("bound", "expected"), [(1.5, "pass"), (2.0, "inconclusive"), (2.6, "fail")])
def test_throughput_gate_compares_the_interval_with_the_bound(bound, expected):
    sides = [{"throughput": {"decode": {"samples": [low, low + 2] * 6}}} for low in (9.0, 19.0)]
    (result,) = judge({"throughput": {"decode": {"min_ratio": bound}}}, *sides)
    assert (result.gate, result.verdict) == ("throughput.decode.min_ratio", expected)
    assert result.lower <= result.value <= result.upper


@pytest.mark.slow
@pytest.mark.skipif(not HERE.exists(), reason="llama.cpp's library is not there")
def test_run_measures_tokens_per_second_in_llama_cpp(tmp_path):
    from tests.checkpoint.dequantize.fixtures.make_gguf import tokenizer

    pytest.importorskip("gguf")
    pico.save(tmp_path / "in", "llama", hidden_size=64, intermediate_size=64, dtype=torch.bfloat16)
    tokenizer().save_pretrained(tmp_path / "in")
    settings = {"path": str(HERE), "prompt": 16, "generated": 4, "rounds": 10}
    recipe = {
        "model": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "passes": [{"cast": {"weights": "int4", "group_size": 32, "method": "rtn"}}],
        "evaluate": [{"throughput": settings}],
        "gates": {"throughput": {"decode": {"min_ratio": 0.001}}},
    }
    report = compress.run(recipe).report
    assert report["gates"][0]["verdict"] == "pass"
    before, after = (report[side]["throughput"] for side in ("original", "result"))
    assert after["bytes"] < before["bytes"]
    for side in (before, after):
        assert (side["runtime"], side["version"], side["prompt"], side["generated"]) == ("llama.cpp", "0.5.0", 16, 4)
        assert len(side["decode"]["samples"]) == len(side["prefill"]["samples"]) == 10
    assert "llama.cpp decode |" in (tmp_path / "out.run" / "report.md").read_text()
    again = compress.run(recipe)
    assert again.nothing_to_do
    assert again.report["result"]["throughput"] == after
    assert again.report["original"]["throughput"]["decode"]["samples"] == before["decode"]["samples"]
    assert not list((tmp_path / "out.run").glob("*.gguf"))
