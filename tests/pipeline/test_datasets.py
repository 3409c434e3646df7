"""Data of a run: packed, padded, given as token ids, as chats; recorded, and checked against the evaluation's."""

from __future__ import annotations

import gzip
import json

import numpy
import pytest
import torch
from safetensors.torch import save_file

import compress
from compress.data.batches import Batches
from compress.data.documents import Document, read_documents
from compress.data.sampling import sample_documents, sample_windows
from compress.errors import CompressError, DataError
from compress.evaluation.language import score_documents
from compress.models.loading import load_model
from compress.models.processors import load_tokenizer
from tests import pico

PASSES = [{"prune_structured": {"layers": 1, "layer_importance": "block_influence", "compensation": "none"}}]


@pytest.fixture
def with_data(recipe, texts):
    """A recipe with this calibration section."""
    evaluation = {"files": [str(texts[1])], "window": 32, "max_documents": 8}

    def make(calibration, **changes):
        data = {"calibration": calibration, "evaluation": evaluation}
        return recipe(**{"passes": PASSES, "gates": None, "evaluate": [], "data": data, **changes})

    return make


def used(result):
    return result.report["data"]["calibration"]


@pytest.mark.slow
def test_datasets_record_the_sample(with_data, texts, pico_llama):
    section = {"files": [str(texts[0])], "samples": 4, "length": 32}
    first = compress.run(with_data(section))
    documents = read_documents(section["files"], "<|doc|>")
    drawn = sample_windows(load_tokenizer(pico_llama), documents, 4, 32, 0)
    assert used(first) == {
        "files": section["files"],
        "sha256": used(first)["sha256"],
        "mode": "packed",
        "seed": 0,
        "samples": 4,
        "length": 32,
        "ids_sha256": drawn.sha256(),
        "chosen": list(drawn.chosen),
    }
    padded = compress.run(with_data({**section, "mode": "padded", "length": 400}))
    drawn = sample_documents(load_tokenizer(pico_llama), documents, 4, 400, 0)
    assert not drawn.mask.all()
    assert (used(padded)["mode"], used(padded)["ids_sha256"]) == ("padded", drawn.sha256())
    assert not padded.report["stages"][0]["reused"]
    scores = [r.report["stages"][0]["passes"][0]["details"]["block_influence"] for r in (first, padded)]
    assert scores[0] != scores[1]
    again = compress.run(with_data(section, evaluate=["kl"]))
    assert again.report["stages"][0]["reused"]
    assert used(again) == used(first)
    seeded = compress.run(with_data(section, seed=1))
    assert used(seeded)["chosen"] != used(first)["chosen"]


def test_datasets_draw_nothing_when_no_pass_reads(with_data, texts):
    result = compress.run(with_data({"files": [str(texts[0])]}, passes=[{"cast": {"weights": "bf16"}}]))
    assert (used(result)["ids_sha256"], used(result)["chosen"], used(result)["samples"]) == (None, None, None)


def test_datasets_take_token_ids(with_data, texts, tmp_path, pico_llama):
    tokenizer = load_tokenizer(pico_llama)
    drawn = sample_windows(tokenizer, read_documents([str(texts[0])], "<|doc|>"), 4, 32, 0)
    numpy.save(tmp_path / "ids.npy", drawn.ids.numpy().astype("i4"))
    save_file({"a": drawn.ids, "b": drawn.ids[:, :8].contiguous()}, tmp_path / "ids.safetensors")
    text = compress.run(with_data({"files": [str(texts[0])], "samples": 4, "length": 32}))
    given = compress.run(with_data({"files": [str(tmp_path / "ids.npy")]}))
    assert used(given)["mode"] == "ids"
    assert used(given)["ids_sha256"] == used(text)["ids_sha256"]
    assert used(given)["chosen"] == [f"ids.npy#{i}" for i in range(4)]
    details = [r.report["stages"][0]["passes"][0]["details"] for r in (text, given)]
    assert details[0] == details[1]
    some = compress.run(with_data({"files": [str(tmp_path / "ids.safetensors")], "field": "a", "samples": 2}))
    assert (used(some)["samples"], used(some)["length"]) == (2, 32)
    assert used(some)["ids_sha256"] == Batches(drawn.ids[:2]).sha256()
    with pytest.raises(DataError, match=r"ids.npy: holds 4 samples of 32 tokens, 9 of 32 are asked for"):
        compress.run(with_data({"files": [str(tmp_path / "ids.npy")], "samples": 9}))
    with pytest.raises(DataError, match=r"ids.safetensors: has no tensor `text`; set `field` to one of: a, b"):
        compress.run(with_data({"files": [str(tmp_path / "ids.safetensors")]}))


def test_datasets_refuse_bad_token_ids(with_data, texts, tmp_path, pico_llama):
    numpy.save(tmp_path / "ids.npy", numpy.array([[1, 2], [pico.VOCABULARY, 3]]))
    with pytest.raises(DataError, match=r"ids.npy: ids.npy#1 has token 300 at 0, the model knows 0 to 299; use"):
        compress.run(with_data({"files": [str(tmp_path / "ids.npy")]}))
    seen = sample_windows(load_tokenizer(pico_llama), read_documents([str(texts[1])], "<|doc|>"), 40, 120, 0)
    numpy.save(tmp_path / "ids.npy", seen.ids.numpy())
    section = {"files": [str(tmp_path / "ids.npy")]}
    evaluation = {"files": [str(tmp_path / "short.txt")], "window": 32}
    (tmp_path / "short.txt").write_text(load_tokenizer(pico_llama).decode(seen.ids[3], skip_special_tokens=True))
    with pytest.raises(DataError, match=r"shares 1 of its 1 documents with data.calibration: short.txt#0"):
        compress.run(with_data(section, data={"calibration": section, "evaluation": evaluation}))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("prune_unstructured", {"method": "wanda", "sparsity": 0.5}, marks=pytest.mark.slow),
        ("prune_structured", {"layers": 1, "layer_importance": "block_influence", "compensation": "none"}),
        pytest.param("prune_structured", {"mlp": "25%"}, marks=pytest.mark.slow),
        pytest.param("cast", {"weights": "int4", "effort": "fast", "group_size": 32}, marks=pytest.mark.slow),
        pytest.param("cast", {"bits": 4.5, "group_size": 32}, marks=pytest.mark.slow),
    ],
)
def test_datasets_refuse_samples_beyond_positions(name, settings, recipe, texts, tmp_path):
    """Refused before any work, as text, as token ids and by `compress.apply`; of the longest that fit, the work is done."""
    model = pico.save(tmp_path / "gpt2", "gpt2")
    numpy.save(tmp_path / "ids.npy", numpy.ones((2, 65), dtype="i4"))
    base = {
        "model": str(model),
        "passes": [{"cast": {"weights": "fp16"}}, {name: settings}],
        "gates": None,
        "evaluate": [],
    }
    text = {"files": [str(texts[0])], "samples": 4, "length": 65}
    told = "calibration samples of 65 tokens are beyond the model's 64 positions; set data.calibration.length to 64"
    for section, where in ((text, ""), ({"files": [str(tmp_path / "ids.npy")]}, f"{tmp_path}/ids.npy: ")):
        with pytest.raises(DataError) as caught:
            compress.run(recipe(**base, data={"calibration": section}))
        assert str(caught.value) == where + told
        assert not (tmp_path / "out.run/stages").exists()
    for data in ([str(texts[0])], torch.ones(2, 65, dtype=torch.long)):
        with pytest.raises(DataError) as caught:
            compress.apply(name, model, tmp_path / "to", store="compact", data=data, samples=2, length=65, **settings)
        assert str(caught.value) == told
    magnitude = [{"prune_unstructured": {"method": "magnitude", "sparsity": 0.5}}]
    compress.run(recipe(**{**base, "passes": magnitude}, data={"calibration": text}))  # reads no samples
    fits = {"calibration": {**text, "length": 64}}
    compress.run(recipe(**base, data=fits, output=str(tmp_path / "fits")))


@pytest.mark.slow
def test_apply_takes_data_in_every_form(tmp_path, texts, pico_llama):
    train = str(texts[0])
    tokenizer, documents = load_tokenizer(pico_llama), read_documents([train], "<|doc|>")

    def removed(**arguments):
        details = {}

        def spy(self, checkpoint, settings, context):
            details["data"] = context.data("calibration")
            return real(self, checkpoint, settings, context)

        from compress.passes.prune_structured.prune_structured import PruneStructured

        real = PruneStructured.apply
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PruneStructured, "apply", spy)
            out = tmp_path / str(len(list(tmp_path.iterdir())))
            compress.apply(
                "prune_structured",
                pico_llama,
                out,
                layers=1,
                compensation="none",
                document_separator="<|doc|>",
                **arguments,
            )
        return details["data"]

    packed = removed(data=train, samples=4, length=32)
    assert packed.sha256() == sample_windows(tokenizer, documents, 4, 32, 0).sha256()
    padded = removed(data=[train], samples=4, length=400, mode="padded", seed=2)
    assert padded.sha256() == sample_documents(tokenizer, documents, 4, 400, 2).sha256()
    numpy.save(tmp_path / "ids.npy", packed.ids.numpy())
    assert removed(data=tmp_path / "ids.npy").sha256() == packed.sha256()
    assert removed(data=packed.ids.int()).sha256() == packed.sha256()
    assert torch.equal(removed(data=packed.ids, samples=2, length=8).ids, packed.ids[:2, :8])
    rows = [json.dumps({"body": d.text}) for d in documents]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    assert removed(data=tmp_path / "a.jsonl.gz", field="body", samples=4, length=32).sha256() == packed.sha256()
    for data, more, message in (
        (torch.tensor([[1, 300]]), {}, "data#0 has token 300 at 1, the model knows 0 to 299"),
        (torch.ones(2, 3), {}, "data: holds float32, not token ids"),
        (torch.ones(3, dtype=torch.long), {}, "data: has the shape [3], which is not [samples, length]"),
        (packed.ids, {"samples": 9}, "data: holds 4 samples of 32 tokens, 9 of 32 are asked for"),
        ([tmp_path / "ids.npy", train], {}, "data: token ids come from one file: name no other beside it"),
        (train, {"mode": "pad"}, "data.mode: Input should be 'packed' or 'padded'"),
        ([], {}, "data: give either `files` or `images`"),
        (tmp_path / "a.bin", {}, "a.bin: is no .txt"),
    ):
        with pytest.raises(CompressError) as caught:
            removed(data=data, **more)
        assert message in str(caught.value)


@pytest.mark.slow
def test_datasets_join_columns_by_a_template(recipe, texts, tmp_path, pico_llama, cli):
    """Joined by a template they are the documents that calibration, evaluation and `eval` read."""
    files, template = {}, "Q: {question}\n{note}A: {answer}"
    for name, file in zip(("train", "valid"), texts, strict=True):
        files[name] = tmp_path / f"{name}.json"
        documents = read_documents([str(file)], "<|doc|>")
        rows = [{"question": d.text[:60], "note": None, "answer": d.text[60:]} for d in documents]
        files[name].write_text(json.dumps(rows, indent=1))
    joined = {n: [f"Q: {r['question']}\nA: {r['answer']}" for r in json.loads(f.read_text())] for n, f in files.items()}
    sections = {name: {"files": [str(file)], "template": template} for name, file in files.items()}
    data = {
        "calibration": {**sections["train"], "samples": 4, "length": 32},
        "evaluation": {**sections["valid"], "window": 32, "max_documents": 8},
    }
    result = compress.run(recipe(passes=PASSES, gates=None, data=data, evaluate=["bits_per_byte"]))
    tokenizer = load_tokenizer(pico_llama)
    train = [Document(f"train.json#{i}", text) for i, text in enumerate(joined["train"])]
    assert used(result)["ids_sha256"] == sample_windows(tokenizer, train, 4, 32, 0).sha256()
    measured = result.report["original"]["evaluation"]
    assert measured["bytes"] == sum(len(text.encode()) for text in joined["valid"][:8])
    options = ("--template", template, "--window", 32, "--max-documents", 8, "--json", "--quiet")
    status, text = cli("eval", pico_llama, "--data", files["valid"], *options)
    assert (status, json.loads(text)["evaluation"]["bits_per_byte"]) == (0, pytest.approx(measured["bits_per_byte"]))
    (tmp_path / "base.json").write_text(text)
    status, text = cli("eval", pico_llama, "--baseline", tmp_path / "base.json", "--json", "--quiet")
    assert (status, json.loads(text)["settings"]["template"]) == (0, template)
    status, text = cli("eval", pico_llama, "--data", files["valid"], "--template", "{question", "--quiet")
    assert (status, "the template cannot be read" in text) == (2, True)
    status, text = cli("eval", pico_llama, "--data", texts[1], "--template", template, "--quiet")
    assert (status, "has no columns, which `template` names" in text) == (2, True)


def test_datasets_render_chats_in_the_template(recipe, texts, tmp_path):
    model = pico.save(tmp_path / "model")
    chats = {}
    for name, file in zip(("train", "valid"), texts, strict=True):
        chats[name] = tmp_path / f"{name}.jsonl"
        rows = [
            {"chat": [{"role": "user", "content": d.text[:60]}, {"role": "assistant", "content": d.text[60:]}]}
            for d in read_documents([str(file)], "<|doc|>")
        ]
        chats[name].write_text("\n".join(map(json.dumps, rows)))
    data = {
        "calibration": {"files": [str(chats["train"])], "field": "chat", "samples": 4, "length": 32},
        "evaluation": {"files": [str(chats["valid"])], "field": "chat", "window": 32, "max_documents": 8},
    }
    changes = {"model": str(model), "passes": PASSES, "gates": None, "evaluate": ["bits_per_byte"], "data": data}
    with pytest.raises(DataError, match=r"train.jsonl#\d+: is a chat, and the tokenizer has no chat template"):
        compress.run(recipe(**changes))
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    result = compress.run(recipe(**changes))
    documents = read_documents([str(chats["valid"])], field="chat")[:8]
    plain = [
        Document(d.id, "<user>{}<assistant>{}".format(*(m["content"] for m in d.messages or ()))) for d in documents
    ]
    expected = score_documents(load_model(model), load_tokenizer(model), plain, window=32, stride=32).to_dict()
    measured = result.report["original"]["evaluation"]
    assert measured["bytes"] == sum(len(d.text) for d in plain)
    assert measured == {**expected, "kl": measured["kl"], "emulated": None}
    first = used(result)["chosen"][0].partition("+")[0]
    assert first.startswith("train.jsonl#")
