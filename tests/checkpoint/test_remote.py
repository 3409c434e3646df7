"""Checkpoints that bring Python code: used where it is trusted, left out where it is to be ignored, never run otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import architectures
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.errors import CheckpointError, CompressError
from compress.models.loading import check_keys, load_model
from tests import pico
from tests.toolbox import edit_config

CONFIG = """from transformers import LlamaConfig


class MyConfig(LlamaConfig):
    {body}
"""
#: Twice the logits of Llama, so that it shows which class was taken.
MODEL = """from transformers import LlamaForCausalLM

from .configuration_my import MyConfig


class MyModel(LlamaForCausalLM):
    config_class = MyConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out
"""
MAP = {"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}
LOAD = """
import json, torch, transformers
torch.set_num_threads(1)
for folder, expected in {cases!r}:
    m, info = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32", output_loading_info=True)
    assert type(m).__name__ == "MyModel" and not any(info.values()), info
    inputs, y = torch.load(expected)
    with torch.no_grad():
        print(float((m(**inputs)[0] - y).abs().max() / y.abs().max()))
"""


def bring_code(folder: Path, model_type: str) -> Path:
    pico.save(folder, "llama")
    (folder / "configuration_my.py").write_text(CONFIG.format(body=f'model_type = "{model_type}"'))
    (folder / "modeling_my.py").write_text(MODEL)
    edit_config(folder, architectures=["MyModel"], auto_map=MAP, model_type=model_type)
    return folder


@pytest.fixture(scope="module", params=["my_llama", "llama"])
def foreign(request, tmp_path_factory):
    """A checkpoint with code, of a model type of its own and of a stock one; read only."""
    return bring_code(tmp_path_factory.mktemp("foreign") / request.param, request.param)


@pytest.fixture
def record(monkeypatch):
    """The record that a package would bring for the model type, so that every pass knows its blocks."""
    llama = architectures.of({"model_type": "llama"})
    known = {**architectures._by_type(), "my_llama": replace(llama, model_type="my_llama")}
    monkeypatch.setattr(architectures, "_by_type", lambda: known)


def recipe(model: Path, output: Path, texts, passes, **more):
    train, valid = map(str, texts)
    data = {
        "training": {"files": [train], "length": 16},
        "calibration": {"files": [train], "samples": 4, "length": 16},
        "evaluation": {"files": [valid], "window": 16, "max_documents": 2},
    }
    common = {"document_separator": "<|doc|>", "data": data, "evaluate": ["kl"]}
    return {"model": str(model), "output": str(output), "passes": passes, **common, **more}


@pytest.mark.slow
def test_remote_code_is_used_by_every_kind_of_pass(foreign, record, texts, tmp_path, stock):
    wide = {"prune_structured": {"mlp": "25%", "compensation": "none", "importance": "magnitude"}}
    steps = {"distill": {"steps": 2, "batch_size": 2, "validation_samples": 2, "learning_rate": 1e-3}}
    chains = {
        "cast": [{"cast": {"weights": "bf16"}}],
        "prune": [{"prune_unstructured": {"method": "wanda", "sparsity": "50%"}}],
        "distil": [wide, steps],
    }
    cases = []
    for name, passes in chains.items():
        out = tmp_path / name
        result = compress.run(recipe(foreign, out, texts, passes, trust_remote_code=True), publish_anyway=True)
        assert result.published
        assert result.report["result"]["evaluation"]["kl"] > 0
        model = compress.load(out, dtype="float32", trust_remote_code=True)
        assert type(model).__name__ == "MyModel"
        pico.save_expected(model, tmp_path / f"{name}.pt")
        cases.append((str(out), str(tmp_path / f"{name}.pt")))
    differences = [float(line) for line in stock(LOAD.format(cases=cases)).split()]
    assert len(differences) == len(chains)
    assert max(differences) <= 1e-4


def test_remote_code_is_refused_unless_trusted(foreign):
    for use in (open_headers, open_checkpoint, compress.load):
        with pytest.raises(
            CheckpointError, match=r"needs Python code that the checkpoint brings .* set trust_remote_code: true"
        ):
            use(foreign)
    once = pico.logits(load_model(foreign, trust_remote_code=True))
    assert torch.isfinite(once).all()


@pytest.mark.parametrize("architecture", [pytest.param("LlamaForCausalLM", marks=pytest.mark.slow), None])
def test_remote_code_when_ignored_gives_way_to_transformers(architecture, tmp_path, texts, stock_outputs):
    folder = bring_code(tmp_path / "in", "llama")
    if architecture is not None:
        edit_config(folder, architectures=[architecture])
    (folder / "modeling_my.py").unlink()
    passes = [{"cast": {"weights": "int8", "method": "rtn"}}]
    result = compress.run(recipe(folder, tmp_path / "out", texts, passes, ignore_auto_map=True, store="compact"))
    assert result.published
    compress.run(recipe(folder, tmp_path / "fp16", texts, [{"cast": {"weights": "fp16"}}], ignore_auto_map=True))
    assert "auto_map" not in json.loads((tmp_path / "fp16/config.json").read_text())
    pico.save_expected(compress.load(tmp_path / "fp16", dtype="float32"), tmp_path / "expected.pt")
    case = {"fp16": ("LlamaForCausalLM", tmp_path / "fp16", tmp_path / "expected.pt")}
    assert stock_outputs(case, dtype="float32")["fp16"]["difference"] <= 1e-4


def test_remote_code_trust_and_ignore_exclude_each_other(tmp_path, texts, pico_llama):
    asked = recipe(pico_llama, tmp_path / "out", texts, [{"cast": {"weights": "bf16"}}])
    with pytest.raises(CompressError, match="set one"):
        compress.plan({**asked, "trust_remote_code": True, "ignore_auto_map": True})


def test_remote_code_is_refused_in_compact_store(tmp_path, texts):
    folder = bring_code(tmp_path / "in", "llama")
    passes = [{"prune_unstructured": {"method": "magnitude", "sparsity": "60%"}}]
    with pytest.raises(CompressError, match="compact checkpoints stand for a class of transformers"):
        compress.plan(recipe(folder, tmp_path / "out", texts, passes, trust_remote_code=True, store="compact"))


@pytest.mark.parametrize(
    ("auto_map", "message"),
    [
        (
            {**MAP, "AutoModelForCausalLM": "modeling_gone.MyModel"},
            r"names modeling_gone.MyModel \(`auto_map`\), which cannot be loaded from the folder",
        ),
        (
            {**MAP, "AutoModelForCausalLM": "other/repo--modeling_my.MyModel"},
            r"needs code of another repository .*other/repo--modeling_my.MyModel.* download other/repo first",
        ),
        ({**MAP, "AutoModelForCausalLM": "configuration_my.MyConfig"}, "which is not a model class"),
        ({**MAP, "AutoConfig": "modeling_my.nothing"}, r"names modeling_my.nothing \(`auto_map`\)"),
        ({**MAP, "AutoModelForCausalLM": ["modeling_my.MyModel"]}, "has an `auto_map` that does not map"),
    ],
)
def test_remote_code_that_is_missing_is_refused(auto_map, message, tmp_path):
    folder = bring_code(tmp_path / "in", "llama")
    edit_config(folder, auto_map=auto_map)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_keys(open_checkpoint(folder, trust_remote_code=True))
    assert "\n" not in str(caught.value)


def test_remote_code_that_fails_is_one_line(tmp_path):
    folder = bring_code(tmp_path / "in", "llama")
    (folder / "modeling_my.py").write_text("raise SystemError('two\\nlines')\n")
    with pytest.raises(CheckpointError, match="two lines") as caught:
        load_model(folder, trust_remote_code=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["AutoModelForCausalLM", "TrainingArguments", "T5Tokenizer", "set_seed", "__version__"]
)
def test_remote_class_that_is_no_model_is_not_built(name, tmp_path):
    folder = pico.save(tmp_path / "in", "llama")
    edit_config(folder, architectures=[name])
    with pytest.raises(CheckpointError, match=f"has no model class {name}"):
        compress.load(folder)


def test_remote_code_is_not_run_by_compact_checkpoints(tmp_path):
    """Its base config may name code: it is neither asked for, nor run, nor carried on."""
    out = compress.apply("prune_unstructured", pico.save(tmp_path / "in"), tmp_path / "out", method="magnitude", sparsity=0.6, store="compact")  # fmt: skip
    expected = pico.logits(compress.load(out))
    (out / "evil.py").write_text("raise SystemExit('run')\n")
    data = json.loads((out / "config.json").read_text())
    data["base"]["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    (out / "config.json").write_text(json.dumps(data))
    for trust in (False, True):
        checkpoint = open_checkpoint(out, trust_remote_code=trust)
        assert "auto_map" not in checkpoint.spec.structure.config
        assert torch.equal(pico.logits(compress.load(out, trust_remote_code=trust)), expected)
    data["base"]["architectures"] = ["AutoModelForCausalLM"]
    (out / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="has no model class AutoModelForCausalLM"):
        compress.load(out)


CHOICES = {
    "_attn_implementation": "flash_attention_2",
    "attn_implementation": "kernels-community/flash-attn",
    "_attn_implementation_internal": "flash_attention_3",
    "experts_implementation": "nothing",
    "use_kernels": True,
}


def test_remote_kernels_of_a_config_are_left_out(tmp_path, stock_outputs):
    folder = pico.save(tmp_path / "in", "mixtral")
    expected = pico.logits(compress.load(folder))
    edit_config(folder, **CHOICES, extra={"attn_implementation": "flash_attention_2", "kept": 1})
    spec = open_headers(folder)[0]
    assert not spec.structure.config.keys() & CHOICES.keys()
    assert spec.structure.config["extra"] == {"kept": 1}
    assert (
        "`attn_implementation` of config.json is left out: it chooses kernels and is not part of the model"
        in spec.notes
    )
    assert torch.equal(pico.logits(compress.load(folder)), expected)
    out = compress.apply("cast", folder, tmp_path / "out", weights="fp16")
    assert not json.loads((out / "config.json").read_text()).keys() & CHOICES.keys()
    assert load_file(out / "model.safetensors")
    pico.save_expected(compress.load(out, dtype="float32"), tmp_path / "expected.pt")
    case = {"out": ("MixtralForCausalLM", out, tmp_path / "expected.pt")}
    assert stock_outputs(case, dtype="float32")["out"]["difference"] <= 1e-4


def test_known_classes_are_read_from_transformers_source():
    """As its auto classes give them."""
    import transformers
    from transformers.models.auto import modeling_auto

    from compress.checkpoint.remote import _stock_names

    tables = {
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    for auto, names in tables.items():
        assert hasattr(transformers, auto)
        assert _stock_names()[auto] == {k: v[0] if isinstance(v, tuple) else v for k, v in names.items()}


def test_remote_code_of_quantized_checkpoints_is_unpacked(tmp_path):
    """As fine-tunes of Phi-3 come quantised: the code is carried on, or left out."""
    coded = compress.apply("cast", pico.save(tmp_path / "in"), tmp_path / "coded", weights="int8", method="rtn")
    expected = pico.logits(compress.load(coded, dtype="float32"))
    edit_config(coded, auto_map=MAP)
    with pytest.raises(CheckpointError, match="needs Python code that the checkpoint brings"):
        compress.unpack(coded, tmp_path / "refused")
    for name, how in {"trusted": {"trust_remote_code": True}, "ignored": {"ignore_auto_map": True}}.items():
        out = compress.unpack(coded, tmp_path / name, **how)
        assert ("auto_map" in json.loads((out / "config.json").read_text())) is (name == "trusted")
    found = pico.logits(compress.load(tmp_path / "ignored", dtype="float32"))
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
