"""Quantised activations and caches: our models give stock transformers' logits, and figures say what they include."""

from __future__ import annotations

import json
import shutil

import jsonschema
import pytest
import torch

import compress
from compress import report as reports
from compress.checkpoint.open import open_checkpoint
from compress.data.documents import read_documents
from compress.errors import PassError
from compress.evaluation.language import score_documents
from compress.models.emulation import rounded_by_scale, rounded_by_token
from compress.models.processors import load_tokenizer
from tests import pico

FAMILIES = ("llama", "bert", "gpt_neox", "vit")
IDS = torch.arange(20)[None] + 5


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """Family and format ▶ a checkpoint whose inputs are to be rounded so."""
    root, made = tmp_path_factory.mktemp("rounded"), {}
    for family in FAMILIES:
        base = pico.save(root / family, family, with_tokenizer=family == "llama")
        for format_ in ("int8", "fp8"):
            settings = {"weights": format_, "activations": format_, "method": "rtn"}
            made[family, format_] = compress.apply("cast", base, root / f"{family}-{format_}", **settings)
    return made


@pytest.mark.slow
def test_emulated_inputs_match_stock_logits(rounded, stock_outputs, tmp_path):
    """In a process without the package; those without rounding are far from them."""
    cases, effects = {}, {}
    for (family, format_), folder in rounded.items():
        ours, name = compress.load(folder, dtype="float32"), f"{family} {format_}"
        pico.save_expected(ours, tmp_path / f"{name}.pt")
        cases[name] = (type(ours).__name__, folder, tmp_path / f"{name}.pt")
        logits = pico.logits(ours)
        without = pico.logits(compress.load(folder, dtype="float32", quantized_activations=False))
        effects[name] = float((logits - without).abs().max() / logits.abs().max())
        if family == "llama":  # the same tensors in a family without a record
            other = tmp_path / f"other {format_}"
            shutil.copytree(folder, other)
            config = json.loads((other / "config.json").read_text())
            config |= {"model_type": "helium", "architectures": ["HeliumForCausalLM"]}
            (other / "config.json").write_text(json.dumps(config))
            pico.save_expected(compress.load(other, dtype="float32"), tmp_path / f"other {format_}.pt")
            cases[f"other {format_}"] = ("HeliumForCausalLM", other, tmp_path / f"other {format_}.pt")
    found = stock_outputs(cases)
    assert {name: row.get("error") for name, row in found.items() if "error" in row} == {}
    assert max(row["difference"] for row in found.values()) <= 1e-6
    assert min(effects.values()) > 1e-3, effects


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_codes_with_bfloat16_scales_match_stock_logits(dtype, stock_outputs, tmp_path):
    """Stock transformers multiplies codes by scales in the dtype that it is asked for, and so do we."""
    base = pico.save(tmp_path / "base", "llama", dtype=torch.bfloat16, with_tokenizer=False)
    cases = {}
    for name, settings in {"int4": {"group_size": 16}, "fp8": {"activations": "fp8"}}.items():
        out = compress.apply("cast", base, tmp_path / name, weights=name, method="rtn", **settings)
        pico.save_expected(compress.load(out, dtype=dtype), tmp_path / f"{name}.pt")
        cases[name] = ("LlamaForCausalLM", out, tmp_path / f"{name}.pt")
    found = stock_outputs(cases, dtype=dtype)
    assert {name: row.get("difference") for name, row in found.items()} == {"int4": 0, "fp8": 0}


@pytest.mark.slow
def test_compact_codes_with_bfloat16_scales_match_stock_logits(stock_outputs, tmp_path):
    """The bundled file makes bfloat16 of them whatever is asked for; the check of what was written compares like with like."""
    base = pico.save(tmp_path / "base", "llama", dtype=torch.bfloat16, with_tokenizer=False)
    pruned = compress.apply(
        "prune_unstructured", base, tmp_path / "pruned", store="compact", method="magnitude", sparsity=0.5
    )
    how = {"store": "compact", "weights": "int4", "method": "rtn", "group_size": 16}
    out = compress.apply("cast", pruned, tmp_path / "out", **how)
    pico.save_expected(compress.load(out, dtype="float32"), tmp_path / "out.pt")
    cases = {"masked": ("AutoModelForCausalLM", out, tmp_path / "out.pt")}
    found = stock_outputs(cases, dtype="float32", trust_remote_code=True)
    assert found["masked"].get("difference", found["masked"]) == 0


@pytest.mark.parametrize("format_", ["int8", "fp8"])
def test_rounded_by_token_matches_compressed_tensors(format_):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from compressed_tensors.quantization.quant_config import QuantizationStatus

    module = torch.nn.Linear(16, 16)
    module.quantization_status = QuantizationStatus.COMPRESSED
    kind = "int" if format_ == "int8" else "float"
    args = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    for shape in ((2, 5, 16), (3, 16), (16,), (2, 3, 4, 16), (0, 3, 16)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
            if values.ndim == 3 and values.numel():
                values[0, 1] = 0
            expected = forward_quantize(module, values, "input", args)
            assert torch.equal(rounded_by_token(values, format_), expected), (shape, dtype)


def test_rounded_by_scale_uses_given_scale():
    values = torch.tensor([0.0, 1.0, -3.3, 500.0, 1e-9])
    expected = (values / 0.5).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.5
    assert torch.equal(rounded_by_scale(values, torch.tensor([0.5])), expected)
    assert expected[3] == 224


@pytest.mark.slow
def test_emulated_model_is_the_one_measured(rounded, texts, tmp_path, cli):
    """A gate judges the rounded model; report, card, terminal and `eval` say in a line what is rounded."""
    _, valid = texts
    base = rounded["llama", "fp8"].parent / "llama"
    made = {"weights": "fp8", "activations": "fp8", "method": "rtn"}
    result = compress.run(
        {
            "model": str(base),
            "output": str(tmp_path / "out"),
            "document_separator": "<|doc|>",
            "data": {"evaluation": {"files": [str(valid)], "window": 32, "max_documents": 3}},
            "passes": [{"cast": made}],
            "evaluate": ["bits_per_byte", "kl"],
            "gates": {"kl": {"max": 1e-4}},
        },
        publish_anyway=True,
    )
    documents = read_documents((str(valid),), "<|doc|>", "text")[:3]
    how = {"window": 32, "stride": 32, "reference": compress.load(base)}
    tokenizer = load_tokenizer(base)
    expected = score_documents(compress.load(result.checkpoint), tokenizer, documents, **how)
    without = compress.load(result.checkpoint, quantized_activations=False)
    evaluation = result.report["result"]["evaluation"]
    assert evaluation["kl"] == pytest.approx(expected.to_dict()["kl"], rel=1e-5)
    assert evaluation["kl"] > 1.5 * score_documents(without, tokenizer, documents, **how).to_dict()["kl"]
    assert result.verdict == "failed"
    assert evaluation["emulated"] == {"activations": {"fp8": 28}, "kv_cache": None}
    assert result.report["original"]["evaluation"]["emulated"] is None
    report = json.loads(reports.to_json(result.report))
    jsonschema.validate(report, reports.report_schema(), cls=jsonschema.Draft202012Validator)
    line = "with inputs of 28 linear layers in fp8, as a runtime computes"
    assert line in reports.render_markdown(result.report)
    assert line in (result.checkpoint / "README.md").read_text()
    out = cli(
        "eval", result.checkpoint, "--data", valid, "--separator", "<|doc|>", "--max-documents", 3, "--window", 32, "-q"
    )[1]
    assert line in " ".join(out.split())


@pytest.mark.slow
def test_compact_store_refuses_rounded_inputs(rounded, tmp_path):
    """Nothing would read it there: refused, as `kv_cache` is."""
    base = pico.save(tmp_path / "gpt2", "gpt2", with_tokenizer=False)
    settings = {"weights": "int8", "activations": "int8", "method": "rtn", "store": "compact"}
    with pytest.raises(PassError, match=r"`activations` belongs in the config of compressed-tensors") as caught:
        compress.apply("cast", base, tmp_path / "out", **settings)
    assert caught.value.key == "activations"
    again = compress.apply("cast", rounded["llama", "int8"].parent / "llama", tmp_path / "llama", **settings)
    assert not open_checkpoint(again).spec.structure.edits  # a stock file after all: nothing needs code


@pytest.mark.slow
def test_latency_leaves_emulation_out(rounded):
    """Emulation is slower than any runtime: the timed model does without, and a line says so."""
    from compress.checkpoint.running import emulated
    from compress.evaluation.latency_worker import _load
    from compress.report.figures import speed_note

    folder = rounded["llama", "int8"]
    settings = {"folder": str(folder), "dtype": "float32", "device": "cpu", "threads": 1}
    settings |= {"trust_remote_code": False, "ignore_auto_map": False, "allow_links": False}
    model, _ = _load(settings)
    assert not any(module._forward_pre_hooks for module in model.modules())
    left_out = emulated(open_checkpoint(folder).spec, kv_cache=True)
    said = speed_note({"result": {"latency": {"left_out": left_out}}})
    assert said.startswith("times and memory were measured without inputs of 28 linear layers in int8")
    assert speed_note({"result": {"latency": {"left_out": None}}}) is None
    assert speed_note({"result": {"latency": None}}) is None
