"""What `distill` does with tensors of a file that are none of the model's weights, and when it says what it cannot do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError, DataError, PassError
from compress.models.loading import load_checkpoint
from compress.report import render_markdown
from compress.spec.spec import Tensor
from compress.training.file_names import file_names
from tests import pico
from tests.passes.distill.test_distill import distilled, ids


def with_tensors(source: Path, target: Path, more: dict[str, torch.Tensor]) -> Path:
    """A copy of a checkpoint whose file holds more tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, **more}, target / "model.safetensors", metadata={"format": "pt"})
    return target


def head_and_inputs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What a stock loader takes for the table of embeddings and the head."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.slow
def test_distill_trains_a_copied_head_with_its_embedding(tmp_path):
    tied = pico.save(tmp_path / "tied", "llama", tie_word_embeddings=True)
    table = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    copied = with_tensors(tied, tmp_path / "copied", {"lm_head.weight": table.clone()})
    expected, _ = distilled(tmp_path, tied, "expected", losses={"labels": 1})
    out, said = distilled(tmp_path, copied, "out", losses={"labels": 1})
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]
    inputs, head = head_and_inputs(out)
    assert torch.equal(inputs, head)
    assert torch.equal(inputs, head_and_inputs(expected)[0])
    assert not torch.equal(inputs, table)
    with safe_open(
        out / "model.safetensors", "pt"
    ) as file:  # whichever of them the file holds, both are the trained one
        for name in {"lm_head.weight", "model.embed_tokens.weight"} & set(file.keys()):
            assert torch.equal(file.get_tensor(name), inputs)


@pytest.mark.slow
def test_distill_ignores_buffers_of_older_versions(tmp_path, pico_llama):
    rotary = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.arange(4.0) + i for i in range(4)}
    old = with_tensors(pico_llama, tmp_path / "old", rotary)
    expected, _ = distilled(tmp_path, pico_llama, "expected", losses={"labels": 1})
    out, _ = distilled(tmp_path, old, "out", losses={"labels": 1})
    a, b = load_file(expected / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    # what is kept of the others is as it was
    assert all(torch.equal(b[name], rotary[name]) for name in b.keys() - a.keys())


def test_distill_takes_sentence_encoder_with_position_ids(tmp_path):
    """As all-MiniLM-L6-v2 has them: int64, in a file without a pooler."""
    teacher = tmp_path / "teacher"
    pico.model("bert", class_name="BertModel").save_pretrained(teacher)
    pico.tokenizer().save_pretrained(teacher)
    tensors = {k: v for k, v in load_file(teacher / "model.safetensors").items() if not k.startswith("pooler.")}
    positions = torch.arange(json.loads((teacher / "config.json").read_text())["max_position_embeddings"])[None]
    save_file(
        {**tensors, "embeddings.position_ids": positions}, teacher / "model.safetensors", metadata={"format": "pt"}
    )
    out, said = distilled(
        tmp_path,
        teacher,
        "out",
        student={"layers": 2, "from": "every_second"},
        learning_rate=3e-3,
        steps=12,
        evaluate_every=6,
    )
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]
    written = load_file(out / "model.safetensors")
    assert torch.equal(written.get("embeddings.position_ids", positions), positions)
    trained = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(written[trained], tensors[trained])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")])
def test_distill_of_base_class_files_matches_whole_class(family, prefix, tmp_path):
    """As gpt2 on the hub: names without that of the base model, and a class with a head."""
    whole = pico.save(tmp_path / "whole", family)
    short = Path(shutil.copytree(whole, tmp_path / "short"))
    tensors = {name.removeprefix(prefix): v for name, v in load_file(whole / "model.safetensors").items()}
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    a, b = (
        load_file(distilled(tmp_path, folder, f"{folder.name}-out", losses={"labels": 1})[0] / "model.safetensors")
        for folder in (whole, short)
    )
    assert {name.removeprefix(prefix) for name in a} == b.keys() == tensors.keys()
    assert all(torch.equal(value, b[name.removeprefix(prefix)]) for name, value in a.items())
    assert any(not torch.equal(value, tensors[name]) for name, value in b.items())


def test_distill_refuses_classifiers_of_two_texts(tmp_path):
    from compress import passes

    distill = passes.get("distill")
    folder = pico.save(tmp_path / "t5", "t5", class_name="T5ForSequenceClassification")
    with pytest.raises(PassError, match="T5ForSequenceClassification reads two texts"):
        distill.plan(open_checkpoint(folder).spec, distill.settings(steps=2))


RUN = {
    "document_separator": "<|doc|>",
    "device": "cpu",
    "passes": [{"prune_structured": {"layers": [1], "compensation": "none"}}, {"distill": {"steps": 2}}],
}


@pytest.fixture
def worked(monkeypatch):
    """Names of the passes that began to work."""
    from compress import passes

    names: list[str] = []

    def noted(name: str, apply: Callable[..., object]) -> Callable[..., object]:
        def applied(*args: object) -> object:
            names.append(name)
            return apply(*args)

        return applied

    for entry in RUN["passes"]:
        (name,) = entry
        kind = type(passes.get(name))  # the class: an attribute of the instance would outlive the test
        monkeypatch.setattr(kind, "apply", noted(name, kind.apply))
    return names


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"validation_samples": 10**6}, {}, r"gives \d+ samples, 1000000 are held out and a step takes 16"),
        ({"batch_size": 10**6}, {}, r"32 are held out and a step takes 1000000"),
        ({"teacher": "other"}, {}, r"has another tokenizer: `\w` is token \d+ for the student"),
        ({"teacher": "small"}, {}, "more than the teacher"),
        ({"teacher": "masked"}, {}, "is for masked language modelling, the student for causal language modelling"),
        ({"teacher_cache": {"folder": "x", "top_k": 300}}, {}, "top_k of 300 is not below the vocabulary of 300"),
        ({"losses": {"hidden": 1}, "layer_map": [[4, 1]]}, {}, r"\[4, 1\] is out of range: the student's outputs are 0 to 3"),
        ({"losses": {"hidden": 1}, "layer_map": [[3, 9]]}, {}, r"\[3, 9\] is out of range"),
    ],
)  # fmt: skip
def test_distill_refuses_unfit_models_before_any_pass_works(
    tmp_path, pico_llama, texts, worked, settings, data, message, teachers
):
    settings = {**settings, **({"teacher": str(teachers[settings["teacher"]])} if "teacher" in settings else {})}
    recipe = {**RUN, "model": str(pico_llama), "output": str(tmp_path / "out")}
    recipe["passes"] = [RUN["passes"][0], {"distill": {"steps": 2, **settings}}]
    recipe["data"] = {"training": {"files": [str(texts[0])], "length": 16, **data}}
    with pytest.raises(CompressError, match=message):
        compress.run(recipe)
    assert not worked


def test_distill_refuses_short_text_before_any_pass_works(tmp_path, pico_llama, worked):
    (tmp_path / "short.txt").write_text("a b c")
    recipe = {**RUN, "model": str(pico_llama), "output": str(tmp_path / "out")}
    recipe["data"] = {"training": {"files": [str(tmp_path / "short.txt")], "length": 64}}
    with pytest.raises(DataError, match=r"training asks for windows of 64 tokens, the text has \d+"):
        compress.run(recipe)
    assert not worked


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, pico_llama):
    """Teachers that do not fit a pico Llama without one block."""
    folder = tmp_path_factory.mktemp("teachers")
    other = pico.save(folder / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    small = compress.apply("prune_structured", pico_llama, folder / "small", layers=[1, 2], compensation="none")
    return {"other": other, "small": small, "masked": pico.save(folder / "masked", "bert")}


def test_distill_refuses_a_single_sample(tmp_path, pico_llama):
    with pytest.raises(DataError, match="gives 1 samples, 8 are held out and a step takes 8"):
        distilled(tmp_path, pico_llama, data=ids(rows=1))


def test_distill_keeps_and_reports_unused_tensors(tmp_path, pico_llama, texts):
    checkpoint = open_checkpoint(pico_llama)
    more = {"model.old_buffer": Tensor("model.old_buffer", (4,), "F32")}
    spec = replace(checkpoint.spec, tensors={**checkpoint.spec.tensors, **more})
    assert file_names(spec, load_checkpoint(checkpoint, dtype="float32")).kept == more.keys()
    recipe = {**RUN, "model": str(pico_llama), "output": str(tmp_path / "out")}
    recipe["data"] = {"training": {"files": [str(texts[0])], "length": 16}}
    report = compress.run(recipe).report
    training = report["stages"][1]["passes"][0]["details"]["training"]
    assert training["kept"] == []
    training["kept"] = ["model.old_buffer"]
    assert "as the model does not use them: `model.old_buffer`." in render_markdown(report)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_cache": {"folder": "x", "top_k": 300}}, "top_k of 300 is not below the vocabulary of 300"),
        ({"losses": {"hidden": 1}, "layer_map": [[4, 1]]}, "[4, 1] is out of range: the student's outputs are 0 to 3"),
        ({"losses": {"relations": 1}, "relation_heads": 5}, "vectors of 16 entries do not split into 5 heads"),
        ({"losses": {"relations": 1}, "relation_layers": [3, 0]}, "[3, 0] is out of range: the student has 3 blocks"),
        ({"teacher": "small"}, "more than the teacher"),
        ({"teacher": "masked"}, "is for masked language modelling"),
    ],
)
def test_check_refuses_distill_by_headers(
    tmp_path, pico_llama, texts, teachers, settings, message, capsys, monkeypatch
):
    import sys

    from compress.cli import main

    settings = {**settings, **({"teacher": str(teachers[settings["teacher"]])} if "teacher" in settings else {})}
    recipe = {**RUN, "model": str(pico_llama), "output": str(tmp_path / "out")}
    recipe["passes"] = [RUN["passes"][0], {"distill": {"steps": 2, **settings}}]
    recipe["data"] = {"training": {"files": [str(texts[0])], "length": 16}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    monkeypatch.setattr(sys, "argv", ["compress", "check", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err
