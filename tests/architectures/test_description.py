"""What was inferred is shown, and can be saved as a record."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import transformers

from compress import inspection
from compress.architectures import Architecture
from compress.architectures.inferred import Inferred
from compress.architectures.model_map import ModelMap, model_map
from compress.checkpoint.open import open_checkpoint
from compress.cli.tables import print_architecture
from compress.errors import CompressError
from tests import pico


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("olmo2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    transformers.Olmo2ForCausalLM(transformers.Olmo2Config(vocab_size=300, **sizes)).save_pretrained(folder)
    return folder


def test_architecture_of_an_inferred_model(olmo2):
    data, _ = inspection.architecture(olmo2)
    assert (data["source"], data["head"], data["embeddings"]) == ("inferred", "lm_head", ["model.embed_tokens"])
    assert data["lists"] == [{"path": "model.layers", "kind": "main", "blocks": 3}]
    assert {row["part"]: row["role"] for row in data["parts"]} == {
        **{f"mlp.{name}_proj": "mlp" for name in ("gate", "up", "down")},
        **{f"self_attn.{name}_proj": "attention" for name in "qkvo"},
    }
    assert data["groups"][0] == "neurons: mlp.gate_proj, mlp.up_proj ▶ mlp.down_proj"


def test_saved_record_is_the_inferred_one(olmo2):
    spec = open_checkpoint(olmo2).spec
    _, text = inspection.architecture(olmo2, text=True)
    names: dict[str, object] = {}
    exec(text, names)
    saved, inferred = names["RECORD"], model_map(spec).record
    assert isinstance(saved, Inferred)
    assert isinstance(saved, Architecture)
    differing = {f.name for f in fields(saved) if getattr(saved, f.name) != getattr(inferred, f.name)}
    assert differing <= {"defaults"}  # the config gives its sizes
    other = ModelMap(spec)
    other.__dict__["record"] = saved
    assert other.depth == 3
    assert [x.name for x in other.targets] == [x.name for x in model_map(spec).targets]


def test_written_record_is_shown_but_not_saved():
    folder = pico.folder("llama")
    assert inspection.architecture(folder)[0]["source"] == "written"
    with pytest.raises(CompressError, match="the record of llama is written already"):
        inspection.architecture(folder, text=True)


@pytest.mark.parametrize("width", [80, 120])
def test_architecture_fits_the_terminal(olmo2, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    for folder in (olmo2, pico.folder("t5"), pico.folder("qwen3_moe")):
        print_architecture(inspection.architecture(folder)[0])
    lines = capsys.readouterr().out.splitlines()
    # a path is never broken
    assert all(len(line) <= width or " " not in line or line.startswith("/") for line in lines)
    assert any("model.embed_tokens" in line for line in lines)
