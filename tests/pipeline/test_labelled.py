"""A classifier from recipe to verdict: measured, gated, reported, and judged outside a run."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

import compress
from compress import report as reports
from compress.errors import CompressError, DataError
from compress.pipeline.baseline import EvaluationSettings
from compress.pipeline.evaluate import evaluate


@pytest.fixture
def classifying(labelled, tmp_path):
    """A recipe for the pico classifier, with a few keys changed."""
    folder, file = labelled

    def make(**changes):
        evaluation = {"files": [str(file)], "text": "sentence", "label": "label"}
        base = {
            "model": str(folder),
            "output": str(tmp_path / "out"),
            "data": {"evaluation": evaluation},
            "passes": [{"prune_unstructured": {"method": "magnitude", "sparsity": 0.1}}],
        }
        return {**base, **changes}

    return make


def test_run_prunes_measures_and_gates_a_classifier(classifying, labelled):
    gates = {"accuracy": {"max_drop": 30}, "f1": {"min": 0.1}, "agreement": {"min": 0.3}}
    result = compress.run(classifying(gates=gates))
    assert result.verdict == "passed", result.report["gates"]
    report = json.loads(reports.to_json(result.report))
    jsonschema.validate(report, reports.report_schema(), cls=jsonschema.Draft202012Validator)
    assert reports.validate(report) == result.report
    before, after = (result.report[side]["evaluation"] for side in ("original", "result"))
    assert (before["accuracy"], before["labels"]) == (0.8, ["red", "green", "blue"])
    said = [[row["prediction"] for row in side["documents"]] for side in (before, after)]
    assert after["agreement"] == sum(a == b for a, b in zip(*said, strict=True)) / 40 < 1
    lost = before["accuracy"] - after["accuracy"]
    assert {g["gate"]: g["value"] for g in report["gates"]}["accuracy.max_drop"] == pytest.approx(100 * lost)
    text = reports.render_markdown(result.report)
    assert f"| accuracy | 80.00% | {after['accuracy']:.2%} | {-100 * lost:+.2f} points |" in text
    assert "40 labelled texts of dev.tsv, 3 labels; F1 is the mean over labels (macro)" in text
    assert f"{100 * lost:+.2f} points |" in text.partition("## Bytes saved and quality lost")[2]
    cases = ElementTree.fromstring(reports.render_junit(result.report)).iter("testcase")
    assert {case.attrib["name"] for case in cases} == {"accuracy.max_drop", "f1.min", "agreement.min"}
    card = (result.checkpoint / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "| macro F1 |" in card
    again = compress.run(classifying(gates=gates))
    assert again.nothing_to_do


@pytest.mark.slow
def test_run_of_a_classifier_is_not_published_when_a_gate_fails(classifying):
    harsh = [{"prune_unstructured": {"method": "magnitude", "sparsity": 0.95}}]
    result = compress.run(classifying(passes=harsh, gates={"accuracy": {"max_drop": 1}}))
    assert (result.verdict, result.published) == ("failed", False)


@pytest.mark.slow
def test_eval_and_gate_of_a_classifier(classifying, labelled, cli, tmp_path):
    folder, file = labelled
    small = compress.run(classifying()).checkpoint
    how = ("--data", file, "--text", "sentence", "--label", "label", "-q")
    status, alone = cli("eval", folder, *how)
    assert status == 0
    assert "80.00%" in alone
    status, beside = cli("eval", small, *how, "--baseline", folder)
    assert "agreement with the original" in beside
    assert "accuracy drops by" in beside
    (tmp_path / "base.json").write_text(cli("eval", folder, *how, "--json")[1])
    found = json.loads(cli("eval", small, "--baseline", tmp_path / "base.json", "-q", "--json")[1])
    assert found["settings"]["label"] == "label"
    assert found["baseline"]["evaluation"]["accuracy"] == 0.8
    assert found["paired"]["accuracy"]["drop"] == pytest.approx(80 - 100 * found["evaluation"]["accuracy"])
    for bound, expected in ((60, 0), (0, None)):
        status, text = cli("gate", small, "--baseline", tmp_path / "base.json", "--gate", f"accuracy.max_drop={bound}")
        assert "accuracy.max_drop" in text
        assert expected in (None, status)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(classifying(gates={"f1": {"max_drop": 90}})))
    assert cli("gate", small, "--baseline", folder, "--recipe", recipe)[0] == 0
    status, text = cli("eval", folder, "--data", file, "--field", "sentence", "-q")
    assert (status, "takes labelled files; name the columns of texts and labels" in text) == (2, True)
    for columns in (("sentence",), ("sentence", "label")):
        named = [part for column in columns for part in ("--text", column)]
        status, text = cli("eval", folder, "--data", file, *named, "-q")
        assert status == 2
        assert text.startswith("compress: `text` names columns of labelled files, and no column of labels is named;")
        assert len(text.splitlines()) == 1


def test_plan_refuses_text_metrics_of_a_classifier(classifying, labelled, pico_llama, tmp_path):
    folder, file = labelled
    plain = {"evaluation": {"files": [str(file)], "field": "sentence"}}
    with pytest.raises(CompressError, match=r"text classification, which .* is for, takes labelled files"):
        compress.plan(classifying(data=plain))
    with pytest.raises(
        CompressError, match=r"`bits_per_byte` does not measure text classification.*\n   its metrics are"
    ):
        compress.plan(classifying(data=plain, evaluate=["bits_per_byte"]))
    with pytest.raises(
        CompressError, match=r"causal language modelling, .* takes text without labels; leave out `label`"
    ):
        compress.plan(classifying(model=str(pico_llama)))
    with pytest.raises(CompressError, match="`accuracy` does not measure causal language modelling"):
        compress.plan(classifying(model=str(pico_llama), evaluate=["accuracy"]))
    with pytest.raises(CompressError, match="`perplexity` does not measure text classification"):
        evaluate(
            str(folder),
            EvaluationSettings(files=(str(file),), label="label", text=("sentence",), metrics=("perplexity",)),
        )
    (tmp_path / "bad.tsv").write_text("sentence\tlabel\nword\tred\nword\tyellow\n")
    evaluation = {"files": [str(tmp_path / "bad.tsv")], "text": "sentence", "label": "label"}
    with pytest.raises(DataError, match=r'bad.tsv:3: `label` is "yellow", .*; there are red, green, blue, or 0 to 2'):
        compress.run(classifying(data={"evaluation": evaluation}))
    assert not Path(tmp_path / "out").exists()


def test_calibration_on_labelled_files_matches_model_inputs(classifying, labelled, tmp_path):
    from tokenizers import processors

    from compress.checkpoint.open import open_checkpoint
    from compress.models.processors import load_tokenizer
    from compress.pipeline.datasets import DataSets
    from compress.recipe import recipe_from_mapping

    tokenizer = load_tokenizer(labelled[0])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="Ġ $A <|endoftext|>", special_tokens=[("Ġ", tokenizer.convert_tokens_to_ids("Ġ")), ("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "with_special")
    section = {"files": [str(labelled[1])], "field": "sentence", "mode": "padded", "samples": 40, "length": 12}
    recipe = recipe_from_mapping(classifying(data={"calibration": section}))
    structure = open_checkpoint(labelled[0]).spec.structure
    drawn = DataSets(recipe, tmp_path / "with_special", structure).batches("calibration")
    lines = [line.split("\t")[0] for line in labelled[1].read_text().splitlines()[1:]]
    seen = tokenizer(lines, truncation=True, max_length=12)["input_ids"]
    assert any(len(ids) == 12 for ids in seen)
    assert any(len(ids) < 12 for ids in seen)
    for ids, mask, name in zip(drawn.ids, drawn.mask, drawn.chosen, strict=True):
        assert ids[mask].tolist() == seen[int(name.partition("#")[2])]
        assert int(ids[mask][-1]) == 0
