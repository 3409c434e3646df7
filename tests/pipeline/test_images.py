"""A classifier of images, from a folder of images for each class: measured, trained, gated, refused."""

from __future__ import annotations

import builtins
import json
import random
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import compress
from compress import report as reports
from compress.data.examples import Labels
from compress.data.images import read_images
from compress.errors import CheckpointError, CompressError, DataError, PassError, RecipeError
from compress.pipeline.baseline import EvaluationSettings
from compress.pipeline.evaluate import evaluate
from tests import pico

NAMES = {0: "red", 1: "green", 2: "blue"}


def processor():
    return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})


def stock(model, file):
    """Log-probabilities of one image, by transformers alone."""
    with torch.no_grad():
        found = model(**processor()(Image.open(file).convert("RGB"), return_tensors="pt"))
    return found.logits[0].log_softmax(-1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A pico ViT, and folders of 36 images to train on and 40 to measure on, most of them where the model puts them."""
    root, lot = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    folder = pico.save(root / "model", "vit", num_labels=3, id2label=NAMES, label2id={n: i for i, n in NAMES.items()})
    processor().save_pretrained(folder)
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    for name, count in (("train", 36), ("val", 40)):
        for label in NAMES.values():
            (root / name / label).mkdir(parents=True)
        for index in range(count):
            small = lot.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            file = root / name / f"{index}.{('png', 'BMP', 'webp')[index % 3]}"
            Image.fromarray(small).resize((24, 20), Image.Resampling.NEAREST).save(file, lossless=True)
            label = (int(stock(model, file).argmax()) + (index % 5 == 0)) % 3
            file.rename(root / name / NAMES[label] / file.name)
    return folder, root / "train", root / "val"


def recipe(pictures, tmp_path, **changes):
    folder, train, val = pictures
    base = {
        "model": str(folder),
        "output": str(tmp_path / "out"),
        "device": "cpu",
        "data": {"training": {"images": str(train)}, "evaluation": {"images": str(val)}},
        "passes": [{"distill": {"steps": 20, "batch_size": 4, "validation_samples": 8, "evaluate_every": 10, "learning_rate": 3e-3, "student": {"layers": 3}}}],
        "evaluate_at": "end",
    }  # fmt: skip
    return {**base, **changes}


def test_evaluate_of_images_matches_stock(pictures):
    folder, _, val = pictures
    found = evaluate(str(folder), EvaluationSettings(images=str(val), device="cpu"))["evaluation"]
    assert (found["of"], found["cut"], len(found["documents"])) == ("images", 0, 40)
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    right = 0
    for row in found["documents"]:
        logp = stock(model, val / row["id"])
        assert NAMES[row["label"]] == Path(row["id"]).parent.name
        assert row["prediction"] == int(logp.argmax())
        assert row["nll"] == pytest.approx(-float(logp[row["label"]]), abs=1e-4)
        right += row["prediction"] == row["label"]
    assert found["accuracy"] == right / 40 == 0.8
    first = [Path(row["id"]).parent.name for row in found["documents"][:6]]
    assert first == ["blue", "green", "red"] * 2  # any beginning has all classes


@pytest.mark.slow
def test_run_of_images_distills_measures_and_gates(pictures, tmp_path):
    gates = {"accuracy": {"max_drop": 60}, "f1": {"min": 0.01}, "agreement": {"min": 0.01}, "kl": {"max": 50}}
    result = compress.run(recipe(pictures, tmp_path, gates=gates))
    assert result.verdict == "passed", result.report["gates"]
    report = json.loads(reports.to_json(result.report))
    jsonschema.validate(report, reports.report_schema(), cls=jsonschema.Draft202012Validator)
    held = [row["loss"] for row in report["stages"][-1]["passes"][-1]["details"]["training"]["held_out"]]
    assert held[-1] < held[0]
    text = reports.render_markdown(result.report)
    assert "40 labelled images of val, 3 labels" in text
    assert "nats per image" in text
    assert "80 images in 20 steps" in text
    assert (result.checkpoint / "preprocessor_config.json").is_file()
    assert "AutoModelForImageClassification" in (result.checkpoint / "README.md").read_text()
    student = transformers.ViTForImageClassification.from_pretrained(result.checkpoint)
    assert student.config.num_hidden_layers == 3
    for row in report["result"]["evaluation"]["documents"]:
        logp = stock(student, pictures[2] / row["id"])
        assert row["nll"] == pytest.approx(-float(logp[row["label"]]), abs=1e-3)
    assert compress.run(recipe(pictures, tmp_path, gates=gates)).nothing_to_do


def distilled(pictures, out, **settings):
    details = {}
    how = {
        "steps": 8,
        "batch_size": 6,
        "validation_samples": 6,
        "evaluate_every": 4,
        "student": {"layers": 3},
        "learning_rate": 3e-3,
        **settings,
    }
    how = {"data": pictures[1], **how}
    compress.apply("distill", pictures[0], out, details=details, device="cpu", **how)
    return details["training"]


@pytest.mark.slow
def test_distill_of_images_by_losses_and_micro_batches(pictures, tmp_path):
    losses = {"kl": 1, "reverse_kl": 0.5, "skewed_kl": 0.5, "js": 0.5, "labels": 0.5, "hidden": 0.5}
    whole = distilled(pictures, tmp_path / "whole", losses=losses)
    assert {*whole["losses"][0]} == {"step", "loss", *losses}
    assert (whole["of"], whole["tokens"]) == ("images", 48)
    parts = distilled(pictures, tmp_path / "parts", losses=losses, micro_batch_size=4, gradient_checkpointing=True)
    again = distilled(pictures, tmp_path / "again", losses=losses)
    for name, said in (("parts", parts), ("again", again)):
        for a, b in zip(whole["held_out"], said["held_out"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3), name
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]


def test_distill_of_images_counts_hidden_states_by_token(pictures, tmp_path):
    """The loss before any step: squared distance over the teacher's square, mean over tokens and pairs of layers."""
    said = distilled(
        pictures, tmp_path / "out", losses={"hidden": 1}, steps=1, student={"layers": 3, "from": "first"}, learning_rate=1e-9,
        allow_noop=True,
    )  # fmt: skip
    teacher = transformers.ViTForImageClassification.from_pretrained(pictures[0])
    student = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    documents = read_images(str(pictures[1]), Labels("images", list(NAMES.values()).index, "a label"))
    random.Random(0).shuffle(documents)
    random.Random(0).shuffle(documents)  # as images are drawn, and as samples are
    pixels = processor()([Image.open(d.image).convert("RGB") for d in documents[-6:]], return_tensors="pt")
    with torch.no_grad():
        mine, theirs = (m(**pixels, output_hidden_states=True).hidden_states for m in (student, teacher))
    pairs = [(i, round(i * 4 / 3)) for i in range(4)]
    found = [((mine[s] - theirs[t]).square().sum(-1) / theirs[t].square().sum(-1)).mean() for s, t in pairs]
    assert said["held_out"][-1]["loss"] == pytest.approx(float(torch.stack(found).mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": {"cosine": 1}}, "`cosine` is for language models and sentence embeddings"),
        ({"losses": {"relations": 1}}, "it is not known where queries, keys and values of vit are"),
        ({"steps": None, "tokens": 100}, "images are not counted in tokens"),
        ({"teacher_cache": "x"}, "`teacher_cache` keeps predictions of tokens"),
        ({"data": "README.md"}, "image classification, which ViTForImageClassification is for, takes a folder of images"),
        ({"length": 7}, "`length` is a setting of text"),
    ],
)  # fmt: skip
def test_distill_of_images_refuses_bad_settings(pictures, tmp_path, settings, message):
    with pytest.raises(CompressError, match=message) as caught:
        distilled(pictures, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)


def test_distill_of_images_refuses_teacher_with_other_processor(pictures, tmp_path):
    other = shutil.copytree(pictures[0], tmp_path / "other")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1] * 3).save_pretrained(other)
    with pytest.raises(PassError, match=r"other has another image processor: `image_mean` is \(0.1, 0.1, 0.1\)"):
        distilled(pictures, tmp_path / "out", teacher=str(other))


def test_read_images_refuses_bad_folders(pictures, tmp_path):
    folder, _, val = pictures

    def measured(change):
        copy = shutil.copytree(val, tmp_path / "copy", dirs_exist_ok=True)
        change(copy)
        try:
            with pytest.raises(DataError) as caught:
                evaluate(str(folder), EvaluationSettings(images=str(copy), device="cpu"))
        finally:
            shutil.rmtree(copy)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "`purple` is not a label of the model; there are red, green, blue, or 0 to 2" in measured(
        lambda copy: (copy / "purple").mkdir()
    )
    assert "red: holds no image (.png, .jpg" in measured(
        lambda copy: (shutil.rmtree(copy / "red"), (copy / "red").mkdir())
    )
    assert "broken.png: cannot be read: cannot identify" in measured(
        lambda copy: (copy / "red" / "broken.png").write_bytes(b"no image")
    )
    assert "stray.png: lies in no folder of a class" in measured(
        lambda copy: shutil.copy(next((val / "red").iterdir()), copy / "stray.png")
    )
    assert "holds no folder of a class" in measured(lambda copy: [shutil.rmtree(f) for f in copy.iterdir()])

    def cut_short(copy):
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            copy / "red" / "cut.jpg"
        )
        (copy / "red" / "cut.jpg").write_bytes((copy / "red" / "cut.jpg").read_bytes()[:900])

    assert "cut.jpg: cannot be read: image file is truncated" in measured(cut_short)
    large = shutil.copytree(folder, tmp_path / "large")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(large)
    for work in (
        lambda: evaluate(str(large), EvaluationSettings(images=str(val))),
        lambda: distilled((large, val), tmp_path / "no"),
    ):
        with pytest.raises(DataError, match="refuses what its image processor makes: Input image size"):
            work()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    for name, changes, said in (
        ("type", {"size": {"height": "x", "width": 16}}, "the image processor"),
        ("huge", {"size": {"height": 10**9, "width": 16}}, "it makes images of 1000000000 pixels a side"),
        ("mean", {"image_mean": "x"}, "the image processor"),
        ("channels", {"image_mean": [0.5], "image_std": [0.5]}, "the image processor"),
    ):
        odd = shutil.copytree(folder, tmp_path / name)
        (odd / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises((CheckpointError, DataError), match=said) as caught:
            evaluate(str(odd), EvaluationSettings(images=str(val), device="cpu"))
        assert "\n" not in str(caught.value)
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no image processor, which images need; copy preprocessor_config.json"
    ):
        evaluate(str(bare), EvaluationSettings(images=str(val), device="cpu"))


def test_read_images_asks_for_pillow_when_missing(pictures, monkeypatch):
    whole = builtins.__import__

    def without(name, *rest):
        if name == "PIL":
            raise ImportError
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs the package pillow, .*; pip install 'compress-toolkit\[images\]'"):
        read_images(str(pictures[2]), Labels("images", lambda _: 0, "a label"))


def test_plan_of_images_refuses_data_of_another_kind(pictures, tmp_path, pico_llama, labelled):
    with pytest.raises(DataError, match=r"causal language modelling, .* takes text, not images; name `files`"):
        compress.plan(recipe(pictures, tmp_path, model=str(pico_llama)))
    text = {"training": {"files": [str(labelled[1])]}}
    with pytest.raises(
        CompressError, match=r"image classification, .* takes a folder of images for each class; name it: `images`"
    ):
        compress.plan(recipe(pictures, tmp_path, data=text))
    calibrated = [{"prune_structured": {"mlp": "25%"}}]
    data = {"calibration": {"files": [str(labelled[1])], "field": "sentence"}}
    with pytest.raises(DataError, match="takes a folder of images for each class"):
        compress.plan(recipe(pictures, tmp_path, data=data, passes=calibrated))
    train = {"images": str(pictures[1])}
    with pytest.raises(DataError, match=r"data.evaluation shares 36 of its 36 documents with data.training: "):
        compress.run(recipe(pictures, tmp_path, data={"training": train, "evaluation": train}))
    for evaluation, message in (
        ({"images": "nowhere"}, "nowhere: there is no such folder"),
        ({"images": "README.md"}, "README.md: is not a folder"),
        ({"images": str(pictures[1]), "files": ["a.txt"]}, "give either `files` or `images`, not both"),
        ({"images": str(pictures[1]), "label": "x"}, "`label` is a setting of text: it does not go with `images`"),
        ({}, "give either `files` or `images`"),
    ):
        with pytest.raises(RecipeError, match=message):
            compress.plan(recipe(pictures, tmp_path, data={"training": train, "evaluation": evaluation}))
    with pytest.raises(RecipeError, match="perplexity is measured on text, not images"):
        compress.plan(recipe(pictures, tmp_path, evaluate=["perplexity"]))


def test_check_and_eval_of_images_by_command(pictures, tmp_path, cli):
    folder, _, val = pictures
    status, text = cli("eval", folder, "--data", val, "-q", "--json")
    assert (status, json.loads(text)["settings"]["images"]) == (0, str(val))
    (tmp_path / "base.json").write_text(text)
    status, text = cli("eval", folder, "--baseline", tmp_path / "base.json", "-q")
    assert (status, "measured on 40 labelled images of val" in text) == (0, True)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(pictures, tmp_path)))
    assert cli("check", tmp_path / "r.yaml")[0] == 0
    status, text = cli("check", tmp_path / "r.yaml", "--resolved")
    (tmp_path / "again.yaml").write_text(text)
    assert cli("check", tmp_path / "again.yaml", "--resolved") == (status, text)


@pytest.mark.slow
def test_passes_calibrate_on_images(pictures, tmp_path):
    """The Hessian of the first block's queries is that of transformers' own run over the same pixels."""
    folder, train, _ = pictures
    settings = {"mlp": 0.25, "compensation": "least_squares"}
    compress.apply("prune_structured", folder, tmp_path / "small", data=train, samples=8, **settings)
    small = transformers.ViTForImageClassification.from_pretrained(tmp_path / "small")
    assert small.config.intermediate_size == 48
    compress.apply("cast", folder, tmp_path / "codes", weights="int4", effort="fast", data=train, samples=36)
    rounded = compress.apply("cast", folder, tmp_path / "nearest", weights="int4", method="rtn")
    model, codes, nearest = (compress.load(place) for place in (folder, tmp_path / "codes", rounded))
    pixels = torch.cat(
        [
            processor()(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
            for file in sorted(train.rglob("*.*"))
        ]
    )
    with torch.no_grad():
        truth, first, second = (m(pixels).logits for m in (model, codes, nearest))
    assert (first - truth).square().mean() < 0.8 * (second - truth).square().mean()
    with pytest.raises(DataError, match="asks for 99 samples, the folder has 36 images"):
        compress.apply("cast", folder, tmp_path / "none", weights="int4", method="gptq", data=train, samples=99)
