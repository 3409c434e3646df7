"""Files as they lie on the hub: what they hold beside the model is left out, and all that is read is what stock reads."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compress
from compress import architectures
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.errors import CheckpointError
from compress.models.loading import check_keys
from tests import pico

WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change, **config) -> Path:
    """Change the tensors and the config of a checkpoint in place."""
    state = load_file(folder / WEIGHTS)
    save_file({k: v.contiguous() for k, v in change(state).items()}, folder / WEIGHTS, {"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **config}))
    return folder


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def bert(folder):
    """bert-base-uncased: written by a class with more heads, by an older version."""
    pico.save(folder, "bert", class_name="BertForPreTraining")
    positions = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    return rewrite(
        folder, lambda s: {old_norms(k): v for k, v in s.items()} | positions, architectures=["BertForMaskedLM"]
    )


def roberta(folder):
    pico.save(folder, "roberta")

    def change(state):
        pooler = {"roberta.pooler.dense.weight": torch.randn(32, 32), "roberta.pooler.dense.bias": torch.randn(32)}
        copies = {"lm_head.decoder.weight": state["roberta.embeddings.word_embeddings.weight"].clone()}
        copies["lm_head.decoder.bias"] = state["lm_head.bias"].clone()
        return {**state, **pooler, **copies, "roberta.embeddings.position_ids": torch.arange(64)[None]}

    return rewrite(folder, change)


def albert(folder):
    pico.save(folder, "albert", class_name="AlbertForPreTraining")

    def change(state):
        return {**state, "predictions.decoder.weight": state["albert.embeddings.word_embeddings.weight"].clone()}

    return rewrite(folder, change, architectures=["AlbertForMaskedLM"])


def masks(start: str, **extra) -> dict[str, torch.Tensor]:
    result = {f"{start}{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(4)}
    return result | {f"{start}{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(4)}


def gpt2(folder):
    """Keys of the base class, and the tables of older versions."""
    pico.save(folder, "gpt2")
    return rewrite(folder, lambda s: {k.removeprefix("transformer."): v for k, v in s.items()} | masks("h."))


def gpt2_head(folder):
    pico.save(folder, "gpt2")
    return rewrite(
        folder, lambda s: {**s, "lm_head.weight": s["transformer.wte.weight"].clone()} | masks("transformer.h.")
    )


def llama(folder):
    pico.save(folder, "llama")
    return rewrite(folder, lambda s: s | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)})  # fmt: skip


def tied_llama(folder):
    pico.save(folder, "llama", tie_word_embeddings=True)
    return rewrite(folder, lambda s: {**s, "lm_head.weight": s["model.embed_tokens.weight"].clone()})


def pythia(folder):
    pico.save(folder, "gpt_neox")
    start = "gpt_neox.layers."
    tables = {f"{start}{i}.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool) for i in range(4)}
    tables |= {f"{start}{i}.attention.masked_bias": torch.tensor(-1e9) for i in range(4)}
    tables |= {f"{start}{i}.attention.rotary_emb.inv_freq": torch.ones(1) for i in range(4)}
    return rewrite(folder, lambda s: s | tables)


def sentences(folder):
    """all-MiniLM-L6-v2: the base class, with the positions of older versions."""
    pico.save(folder, "bert", class_name="BertModel")
    return rewrite(folder, lambda s: s | {"embeddings.position_ids": torch.arange(64)[None]})


def t5(folder):
    pico.save(folder, "t5")

    def change(state):
        shared, left = state["shared.weight"], "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        copies = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"))
        return {**state, **{name: shared.clone() for name in copies}, left: torch.randn(32, 4)}

    return rewrite(folder, change)


CASES = {f.__name__: f for f in (bert, roberta, albert, gpt2, gpt2_head, llama, tied_llama, pythia, sentences, t5)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Case ▶ its checkpoint; read only."""
    home = tmp_path_factory.mktemp("tidy")
    return {name: make(home / name) for name, make in CASES.items()}


def class_of(folder: Path):
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


@pytest.fixture(scope="module")
def expected(folders):
    """Case ▶ what stock transformers computes with the checkpoint as it is."""
    return {name: pico.logits(class_of(folder).from_pretrained(folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("case", CASES)
def test_open_headers_reads_untidy_files_as_stock_does(case, folders, expected):
    folder = folders[case]
    checkpoint = open_checkpoint(folder)
    check_keys(checkpoint)
    torch.testing.assert_close(pico.logits(compress.load(folder)), expected[case], rtol=0, atol=1e-4)
    model = class_of(folder).from_pretrained(folder)
    assert checkpoint.spec.parameters == sum(p.numel() for p in model.parameters())
    assert checkpoint.spec.notes == open_headers(folder)[0].notes != ()


def test_open_headers_says_what_it_leaves_out(folders):
    notes = {case: open_headers(folder)[0].notes for case, folder in folders.items()}
    (note,) = notes["bert"]
    assert note.startswith("5 tensors are left out, which BertForMaskedLM does not read: bert.")
    assert note.endswith(" and more")
    assert notes["llama"] == (
        "4 tensors are left out, which LlamaForCausalLM does not read: model.layers.*.self_attn.rotary_emb.inv_freq",
    )
    assert notes["tied_llama"] == (
        "lm_head.weight is stored once: it is model.embed_tokens.weight, to which the config ties it",
    )
    assert len(notes["t5"]) == 4


@pytest.mark.slow
def test_run_of_untidy_files_matches_plan_and_loads_in_stock(folders, tmp_path, stock_outputs):
    outputs = {}
    for case, folder in folders.items():
        out = tmp_path / case
        recipe = {"model": str(folder), "output": str(out), "passes": [{"cast": {"weights": "bf16"}}]}
        plan = compress.plan(recipe)
        planned = plan.stages[-1].size
        result = compress.run(recipe)
        names = 200 * len(load_file(folder / WEIGHTS))  # the headers hold those of what is left out
        assert 0 <= result.report["original"]["size"]["bytes"] - plan.original.bytes < names
        assert result.report["result"]["size"] == {**result.report["result"]["size"], **{"bytes": planned.bytes, "parameters": planned.parameters}}  # fmt: skip
        assert set(open_headers(folder)[0].notes) <= set(result.report["notes"])
        assert open_headers(out)[0].notes == ()
        pico.save_expected(compress.load(out, dtype="float32"), tmp_path / f"{case}.pt")
        outputs[case] = (class_of(out).__name__, out, tmp_path / f"{case}.pt")
    found = stock_outputs(outputs, dtype="float32")
    assert {case: row.get("error") or row["difference"] <= 1e-4 for case, row in found.items()} == dict.fromkeys(CASES, True)  # fmt: skip


@functools.cache
def _names_of_transformers():
    return dir(transformers)


@pytest.mark.parametrize(
    "family", pico.families((r.model_type for r in architectures.RECORDS), tier=("llama", "gpt2", "bert", "t5"))
)
def test_leftovers_of_records_are_read_by_no_class(family):
    """Every class of transformers of that model type, built on the meta device."""
    config = pico.config(family, tie_word_embeddings=False)
    record = next(each for each in architectures.RECORDS if each.model_type == family)
    start = type(config).__name__.removesuffix("Config").removesuffix("Text")
    names = [n for n in _names_of_transformers() if re.fullmatch(rf"{start}(?:For\w+|\w*Model)", n)]
    classes = [c for c in (getattr(transformers, n) for n in names if "PreTrained" not in n) if c.config_class is type(config)]  # fmt: skip
    assert classes
    for cls in classes:
        with torch.device("meta"):
            model = cls(config)
        read = [n for n, _ in [*model.named_parameters(), *model.named_buffers()] if n in model.state_dict()]
        assert not [n for n in read if record.is_leftover(n, cls.__name__)], cls


def test_open_headers_keeps_an_untied_head_when_config_ties(tmp_path, stock_outputs):
    """Stock transformers keeps both; so does what is written, whatever its loader makes of the config."""
    heads = {"llama": "lm_head.weight", "gpt2": "lm_head.weight", "electra": "generator_lm_head.weight"}
    cases = {}
    for family, name in heads.items():
        folder = pico.save(tmp_path / family, family, tie_word_embeddings=True)
        source = open_checkpoint(folder).spec.tensors[name].alias_of
        rewrite(folder, lambda s, name=name, source=source: {**s, name: s[source] + 0.5})
        expected = pico.logits(class_of(folder).from_pretrained(folder))
        torch.testing.assert_close(pico.logits(compress.load(folder)), expected, rtol=0, atol=1e-4)
        spec = open_headers(folder)[0]
        assert spec.structure.config["tie_word_embeddings"] is False
        assert spec.notes[0].startswith(f"{name} is kept beside {source}, whose values differ")
        out, path = compress.unpack(folder, tmp_path / f"{family}-out"), tmp_path / f"{family}.pt"
        torch.save((pico.inputs(compress.load(out)), expected), path)
        cases[family] = (class_of(out).__name__, out, path)
    assert all(row["difference"] <= 1e-4 for row in stock_outputs(cases).values())


@pytest.mark.parametrize(
    ("family", "name", "source"),
    [
        ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("t5", "lm_head.weight", "shared.weight"),
        ("t5", "encoder.embed_tokens.weight", "shared.weight"),
    ],
)
def test_open_headers_refuses_copies_that_differ(family, name, source, tmp_path):
    folder = pico.save(tmp_path / "in", family)
    rewrite(folder, lambda s: {**s, name: s[source] + 0.5})
    with pytest.raises(CheckpointError, match=f"ties {re.escape(name)} to {re.escape(source)} in its config, but has"):
        open_headers(folder)


def test_check_keys_refuses_unknown_tensors(tmp_path):
    folder = rewrite(pico.save(tmp_path / "in", "bert"), lambda s: s | {"bert.stray.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"1 weights are unknown to the model .* such as bert\.stray\.weight"):
        check_keys(open_checkpoint(folder))
