"""`check` refuses what a run would refuse without having worked, and needs no torch for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

import compress
from compress.errors import CompressError
from tests import pico
from tests.conftest import ROOT


@pytest.fixture
def check(recipe, tmp_path, cli):
    """Exit status and output of `check` for a recipe with changes; and that `run` refuses the same with nothing written."""

    def call(*options, run=True, **changes):
        made = recipe(**changes)
        with (tmp_path / "r.yaml").open("w") as file:
            YAML().dump(made, file)
        status, text = cli("check", tmp_path / "r.yaml", *options)
        if status and run:
            with pytest.raises(CompressError) as caught:
                compress.run(made)
            said = str(caught.value).splitlines()[0]  # the place is that of the file, or that of the keys
            assert said in text or said.partition(": ")[2] in text or caught.value.what in text
            assert not (tmp_path / "out.run" / "stages").exists()
        return status, text

    return call


def test_check_passes_a_good_recipe(check):
    assert check() == (0, check()[1])
    assert "no mistakes found" in check()[1]


def test_check_refuses_outputs_that_a_run_reads(check, pico_llama, tmp_path):
    model = pico.save(tmp_path / "m" / "model")
    for output, message in (
        (model, "output and model are the same folder"),
        (model / "out", "the output lies inside the model's folder"),
        (tmp_path / "m", "the model lies inside the output's folder"),
        (tmp_path / "r.yaml", "exists and is not a folder"),
    ):
        status, text = check(model=str(model), output=str(output))
        assert (status, message in text) == (2, True), text
    teacher = {
        "passes": [{"distill": {"steps": 1, "teacher": [{"checkpoint": str(tmp_path / "gone")}]}}],
        "gates": None,
    }
    data = {"training": {"files": [str(tmp_path / "t.txt")], "length": 8}}
    (tmp_path / "t.txt").write_text("some text " * 40)
    status, text = check(**teacher, data=data, evaluate=[])
    assert (status, f"{tmp_path}/gone: there is no such folder" in text) == (2, True), text
    assert "r.yaml:" in text
    teacher["passes"][0]["distill"]["teacher"] = [{"checkpoint": str(model)}]
    status, text = check(**teacher, data=data, evaluate=[], output=str(model / "x"))
    assert (status, "the output lies inside the teacher's folder" in text) == (2, True), text


def test_check_refuses_the_same_file_or_its_copy(check, texts, tmp_path):
    train, valid = map(str, texts)
    calibration = {"files": [train], "samples": 4, "length": 32}
    evaluation = {"files": [valid, train], "window": 32}
    status, text = check(data={"calibration": calibration, "evaluation": evaluation})
    assert (status, f"{train}: is in data.calibration too" in text) == (2, True), text
    (tmp_path / "copy.txt").write_bytes(texts[1].read_bytes())
    calibration["files"] = [str(tmp_path / "copy.txt")]
    status, text = check(data={"calibration": calibration, "evaluation": {"files": [valid], "window": 32}})
    assert (status, f"{valid}: holds the same as {tmp_path}/copy.txt" in text) == (2, True), text
    rows = "\n".join(json.dumps({"a": f"one {i}", "b": f"two {i}"}) for i in range(40))
    (tmp_path / "two.jsonl").write_text(rows)
    two = {"files": [str(tmp_path / "two.jsonl")]}
    sets = {
        "calibration": {**two, "field": "a", "samples": 2, "length": 8},
        "evaluation": {**two, "field": "b", "window": 8},
    }
    assert check(data=sets)[0] == 0  # two columns of one file have nothing in common


def test_check_names_missing_columns(check, texts, tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nwhy?,so\n")
    (tmp_path / "b.jsonl").write_text('[{"question": "why?"}]')
    for file, keys, message in (
        ("a.csv", {"template": "{question} {reply}"}, "a.csv:1: has no field `reply`; there are: question, answer"),
        ("b.jsonl", {"template": "{question} {reply}"}, "b.jsonl:1: has no field `reply`; there are: question"),
        ("a.csv", {}, "a.csv:1: has no field `text`; set `field` to one of: question, answer"),
        ("a.csv", {"text": ["question", "reply"]}, "a.csv:1: has no field `reply`; set `text` to one of"),
    ):
        section = {"files": [str(tmp_path / file)], "samples": 1, "length": 8, **keys}
        status, text = check(data={"calibration": section, "evaluation": {"files": [str(texts[1])]}})
        assert (status, message in text) == (2, True), text
    for template, message in (
        ("no column", "the template names no column"),
        ("{a!r}", "the template names a column as"),
    ):
        section = {"files": [str(tmp_path / "a.csv")], "template": template}
        status, text = check(data={"calibration": section}, evaluate=[], run=False)
        assert (status, message in text, "r.yaml:" in text) == (2, True, True), text
    for keys, message in (
        ({"template": "{a}", "field": "b"}, "`template` names the columns, so leave out `field`"),
        ({"template": "{a}", "text": "b"}, "`template` makes one plain text of a row: it does not go with `text`"),
        ({"template": "{a}", "files": [str(texts[0])]}, f"`template` names columns, and {texts[0]} has none"),
    ):
        section = {"files": [str(tmp_path / "a.csv")], **keys}
        status, text = check(data={"calibration": section}, evaluate=[], run=False)
        assert (status, message in " ".join(text.split())) == (2, True), text


def test_check_refuses_gates_that_cannot_hold(check):
    status, text = check(gates={"size": {"max_ratio": 0}}, run=False)
    assert (status, "expected a ratio above 0 and up to 2, such as 0.4 or 40%, got 0" in text) == (2, True)
    status, text = check(gates={"kl": {}}, run=False)
    assert (status, "a gate needs a bound" in text) == (2, True)
    status, text = check(gates={"accuracy": {"min": 0.9}}, run=False)
    assert (status, "accuracy" in text) == (2, True)
    status, text = check(gates={"size": {"max_ratio": 0.01}, "parameters": {"max": 10}})
    assert status == 0  # a run may be there to fail, and says how far it is
    assert "the gate size.max_ratio will fail: the plan gives 0." in text
    assert "the gate parameters.max will fail: the plan gives " in text


def test_check_refuses_too_little_memory(check):
    status, text = check(max_ram="1MB")
    assert status == 4, text
    assert "max_ram allows 0.00 GB" in text


def test_check_refuses_experts_of_unequal_widths(check, cli, tmp_path):
    model = pico.save(tmp_path / "moe", "qwen3_moe")
    changes = {"model": str(model), "gates": None, "passes": [{"prune_structured": {"mlp": "25%", "allocation": "kl"}}]}
    status, text = check(**changes, store="compact")
    message = "does not reach model.layers.0.mlp.experts.0.down_proj.weight: experts are fused in memory"
    assert (status, message in " ".join(text.split())) == (2, True), text
    assert cli("plan", tmp_path / "r.yaml")[0] == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"cast": {"weights": "int8", "only": ["*layers.1.*"]}},
        {"prune_unstructured": {"method": "wanda", "sparsity": 0.5, "only": ["*layers.1.*"]}},
    ],
)
def test_check_refuses_routers_that_are_not_run(settings, check, tmp_path):
    model = pico.save(tmp_path / "moe", "mixtral")
    status, text = check(model=str(model), gates=None, passes=[settings])
    said = " ".join(text.split())
    assert (status, "layers.1.block_sparse_moe.gate.weight is not a linear layer; calibrated" in said) == (
        2,
        True,
    ), text
    assert "leave it out: skip: [model.layers.*.block_sparse_moe.gate]" in said
    (name,) = settings
    skipping = {name: {**settings[name], "skip": ["model.layers.*.block_sparse_moe.gate"]}}
    assert check(model=str(model), gates=None, passes=[skipping])[0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prune_structured": {"mlp": "25%", "importance": "taylor"}},
            "importance: taylor needs a model that predicts something",
        ),
        ({"share": {"groups": 2, "init": "fisher"}}, "`init: fisher` needs a model that predicts something"),
    ],
)
def test_check_refuses_gradients_without_a_head(settings, message, check, texts, tmp_path):
    model = pico.save(tmp_path / "base", "bert", class_name="BertModel")
    data = {"calibration": {"files": [str(texts[0])], "samples": 4, "length": 32}}
    status, text = check(model=str(model), gates=None, passes=[settings], data=data, evaluate=[])
    assert (status, message in text) == (2, True), text


def test_run_asks_for_a_package_before_any_pass_works(recipe, tmp_path, monkeypatch):
    from compress.passes.share import groups

    monkeypatch.setattr(groups, "find_spec", lambda name: None)
    passes = [{"cast": {"weights": "bf16"}}, {"share": {"groups": 2, "residual_rank": 2}}]
    with pytest.raises(
        CompressError, match="putting units into one order needs the package scipy\n   pip install scipy"
    ):
        compress.run(recipe(passes=passes, gates=None, evaluate=[]))
    assert not list((tmp_path / "out.run" / "stages").glob("*"))


def test_check_refuses_widths_that_groups_do_not_divide(check, tmp_path):
    model = pico.save(tmp_path / "m", hidden_size=40, intermediate_size=72, with_tokenizer=True)
    changes = {"model": str(model), "gates": None, "store": "compact"}
    status, text = check(**changes, passes=[{"cast": {"weights": "int4", "group_size": 16}}])
    said = " ".join(text.split())
    assert status == 2
    assert "has 72 inputs, which groups of 16 do not divide, nor those of 23 others (40, 72)" in said, text
    assert "group_size: 8 would fit, or skip: [" in said
    assert all(f"model.layers.*.{name}" in said for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"))
    status, text = check(**changes, passes=[{"cast": {"bits": 5, "group_size": 16}}])
    assert (status, "has 72 inputs, which groups of 16 do not divide, nor" in " ".join(text.split())) == (2, True), text
    assert check(**changes, passes=[{"cast": {"bits": 5}}])[0] == 0  # a whole channel fits any width


def test_check_finds_documents_shared_within_files(check, texts, tmp_path):
    train, valid = texts
    shared = train.read_text().split("\n<|doc|>\n")[7]
    (tmp_path / "valid.txt").write_text(f"{valid.read_text()}\n<|doc|>\n{shared.upper()}")
    calibration = {"files": [str(train)], "samples": 4, "length": 32}
    data = {"calibration": calibration, "evaluation": {"files": [str(tmp_path / "valid.txt")], "window": 32}}
    assert check(data=data, run=False)[0] == 0  # reads no text
    status, text = check("--data", data=data)
    message = "data.evaluation shares 1 of its 41 documents with data.calibration: valid.txt#40"
    assert (status, message in text) == (2, True), text
    status, text = check("--data")
    assert (status, "data: 40 documents of evaluation, 60 of calibration, none shared" in text) == (0, True), text
    status, text = check("--data", model="some/hub-id", run=False)  # plain text needs no model
    assert (status, "60 of calibration, none shared" in text) == (0, True), text


def test_check_refuses_windows_beyond_positions(check, texts):
    status, text = check(
        data={"evaluation": {"files": [str(texts[1])], "window": 65}}, passes=[{"cast": {"weights": "bf16"}}]
    )
    assert status == 2
    assert ":3: a window of 65 tokens is beyond the model's 64 positions" in text
    assert "set window to 64" in text


def test_run_draws_samples_before_any_pass_works(recipe, texts, tmp_path):
    """Though a pass that reads none comes first, and measuring last."""
    train, _ = texts
    passes = [{"cast": {"weights": "bf16"}}, {"prune_unstructured": {"method": "wanda", "sparsity": 0.5}}]
    calibration = {"files": [str(train)], "samples": 5000, "length": 64}
    with pytest.raises(CompressError, match=r"calibration asks for 5000 samples of 64 tokens, the text gives \d+"):
        compress.run(recipe(passes=passes, data={"calibration": calibration}, evaluate=[], gates=None))
    chats = [{"text": [{"role": "user", "content": f"{letter} " * 40}]} for letter in "klmnop"]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    evaluation = {"files": [str(tmp_path / "chats.jsonl")], "window": 32}
    with pytest.raises(CompressError, match=r"chats.jsonl#0: is a chat, and the tokenizer has no chat template"):
        compress.run(recipe(passes=passes[:1], data={"evaluation": evaluation}))
    assert not (tmp_path / "out.run" / "stages").exists() or not list((tmp_path / "out.run" / "stages").iterdir())


def test_check_names_what_a_tokenizer_lacks(check, recipe, texts, tmp_path):
    """No files at all, no template for chats (only their text says that they are some), no token to mask by."""
    model = pico.save(tmp_path / "bare", with_tokenizer=False)
    status, text = check(model=str(model))
    assert (status, "bare: has no tokenizer, which text needs" in text) == (2, True), text
    assert check(model=str(model), passes=[{"cast": {"weights": "bf16"}}], data=None, evaluate=[], gates=None)[0] == 0
    chats = [{"text": [{"role": "user", "content": f"{letter} " * 40}]} for letter in "klmnop"]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    evaluation = {"files": [str(tmp_path / "chats.jsonl")], "window": 32}
    calibration = {"files": [str(tmp_path / "chats.jsonl")], "samples": 4, "length": 16}
    wanda = [{"prune_unstructured": {"method": "wanda", "sparsity": 0.5}}]
    alone = {"data": {"calibration": calibration}, "passes": wanda, "evaluate": [], "gates": None}
    status, text = check("--data", **alone)
    assert (status, "is a chat, and the tokenizer has no chat template" in text) == (2, True), text
    changes = {"passes": [{"cast": {"weights": "bf16"}}], "data": {"evaluation": evaluation}}
    status, text = check("--data", **changes)
    assert (status, "chats.jsonl#0: is a chat, and the tokenizer has no chat template" in text) == (2, True), text
    model = pico.save(tmp_path / "with")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert check("--data", model=str(model), **changes)[0] == 0
    evaluation = {"files": [str(texts[1])], "window": 32}
    made = recipe(model=str(pico.folder("bert")), **{**changes, "data": {"evaluation": evaluation}}, evaluate_at="end")
    with pytest.raises(CompressError, match="the tokenizer has no mask token"):
        compress.run({**made, "evaluate": ["kl"], "gates": None})
    assert not list((tmp_path / "out.run").glob("stages/*"))


@pytest.mark.slow
def test_check_of_data_imports_no_torch(recipe, tmp_path):
    with (tmp_path / "r.yaml").open("w") as file:
        YAML().dump(recipe(), file)
    code = (
        "import sys; from compress.cli.commands import recipes; import pathlib;"
        f"recipes.check([pathlib.Path({str(tmp_path / 'r.yaml')!r})], [], data=True, resolved=False, json=False, form=None);"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout.splitlines()[-1:], done.stderr) == (["[]"], "")


def test_run_refuses_a_missing_device(recipe, tmp_path):
    with pytest.raises(CompressError, match=r"^device: the device cuda:99 is not here; there "):
        compress.run(recipe(device="cuda:99"))
    assert not (tmp_path / "out.run").exists()


def test_check_reads_token_ids_by_their_headers(check, tmp_path):
    import numpy
    import torch
    from safetensors.torch import save_file

    numpy.save(tmp_path / "a.npy", numpy.ones((4, 32), dtype="i4"))
    numpy.save(tmp_path / "long.npy", numpy.ones((2, 65), dtype="u2"))
    numpy.save(tmp_path / "floats.npy", numpy.ones((4, 32)))
    numpy.save(tmp_path / "flat.npy", numpy.ones(9, dtype="i8"))
    numpy.save(tmp_path / "none.npy", numpy.ones((0, 9), dtype="i8"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:20])
    save_file({"a": torch.ones(4, 32).int(), "b": torch.ones(4, 32)}, tmp_path / "a.safetensors")
    for file, keys, message in (
        ("a.npy", {}, None),
        ("a.safetensors", {"field": "a", "samples": 4}, None),
        ("a.npy", {"samples": 5}, "a.npy: holds 4 samples of 32 tokens, 5 of 32 are asked for"),
        ("a.npy", {"length": 33}, "a.npy: holds 4 samples of 32 tokens, 4 of 33 are asked for"),
        ("long.npy", {}, "calibration samples of 65 tokens are beyond the model's 64 positions; set"),
        ("floats.npy", {}, "not token ids; save integers [samples, length]"),
        ("flat.npy", {}, "flat.npy: has the shape [9], which is not [samples, length]"),
        ("none.npy", {}, "none.npy: holds no token: its shape is [0, 9]"),
        ("cut.npy", {}, "cut.npy: is not an array"),
        ("a.safetensors", {}, "a.safetensors: has no tensor `text`; set `field` to one of: a, b"),
        ("a.safetensors", {"field": "b"}, "not token ids; save integers [samples, length]"),
    ):
        model = {"model": str(pico.save(tmp_path / "gpt2", "gpt2"))} if file == "long.npy" else {}
        data = {"calibration": {"files": [str(tmp_path / file)], **keys}}
        passes = [{"prune_unstructured": {"method": "wanda", "sparsity": 0.5}}]
        status, text = check(data=data, evaluate=[], passes=passes, gates=None, run=False, **model)
        assert (status, message is None or message in text) == (0 if message is None else 2, True), text


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("vit", "latency is measured on token ids, and ViTForImageClassification reads `pixel_values`"),
        ("t5", "latency is measured on one text, and T5ForConditionalGeneration reads two"),
    ],
)
def test_check_refuses_speed_without_a_single_text(family, message, check, cli):
    model, passes = pico.folder(family), [{"cast": {"weights": "bf16"}}]
    base = {"model": str(model), "passes": passes, "data": None, "document_separator": None}
    for asked in ({"evaluate": ["memory"], "gates": None}, {"evaluate": [], "gates": {"prefill": {"max_ratio": 1}}}):
        status, text = check(**base, **asked)
        assert (status, message in text) == (2, True), text
    status, text = cli("eval", model, "--baseline", model, "--metric", "latency")
    assert (status, message in " ".join(text.split())) == (2, True), text


def test_cache_of_a_pattern_is_judged_where_it_is_known(check):
    windows = {"window": 8, "sinks": 2, "pattern": "strided", "stride": 5, "choose": "every"}
    changes = {"store": "compact", "passes": [{"local_attention": windows}]}
    status, text = check(**changes, gates={"cache": {"at": 50, "max_ratio": 0.9}})
    assert status == 2
    assert "the cache of patterns is not known after 50 tokens" in text
    assert check(**changes, gates={"cache": {"at": 64, "max_ratio": 0.9}})[0] == 0
