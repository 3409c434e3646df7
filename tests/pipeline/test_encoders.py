"""Masked language models and sentence embeddings from recipe to verdict; what each class is measured by."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import jsonschema
import pytest
from tokenizers import processors

import compress
from compress import report as reports
from compress.cli import main
from compress.data.documents import Document
from compress.errors import CompressError, DataError
from compress.evaluation.embeddings import Pooling, embed_documents
from compress.models.loading import load_model
from compress.models.processors import load_tokenizer
from compress.pipeline.baseline import EvaluationSettings
from compress.pipeline.evaluate import evaluate
from tests import pico


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A masked model and a base one, with a tokenizer that has special tokens; pairs of texts with scores."""
    root, lot = tmp_path_factory.mktemp("encoders"), random.Random(0)
    tokenizer = pico.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>",
        pair="<|endoftext|> $A <|endoftext|> $B:1 <|endoftext|>:1",
        special_tokens=[("<|endoftext|>", 0)],
    )
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    for name, options in (("masked", {}), ("base", {"class_name": "BertModel"})):
        pico.save(root / name, "bert", **options)
        tokenizer.save_pretrained(root / name)
    (root / "base/1_Pooling").mkdir()
    (root / "base/1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    rows = ["one\ttwo\tscore"]
    for _ in range(40):
        one = "".join(lot.choices("klmnopqrst", k=lot.randint(4, 12)))
        rows.append(f"{one}\t{one[: lot.randint(1, 9)]} x\t{lot.randint(0, 50) / 10}")
    (root / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def base(folders, tmp_path):
    def make(**changes):
        evaluation = {"files": [str(folders / "pairs.tsv")], "text": ["one", "two"], "label": "score"}
        recipe = {
            "model": str(folders / "base"),
            "output": str(tmp_path / "out"),
            "data": {"evaluation": evaluation},
            "passes": [{"prune_unstructured": {"method": "magnitude", "sparsity": 0.2}}],
        }
        return {**recipe, **changes}

    return make


def checked(result):
    report = json.loads(reports.to_json(result.report))
    jsonschema.validate(report, reports.report_schema(), cls=jsonschema.Draft202012Validator)
    assert reports.validate(report) == result.report
    return result.report, reports.render_markdown(result.report)


def test_run_measures_sentence_embeddings(base, folders):
    gates = {"similarity": {"min": 0.3, "max_drop": 90}, "spearman": {"max_drop": 90}}
    result = compress.run(base(gates=gates))
    assert result.verdict == "passed", result.report["gates"]
    report, text = checked(result)
    assert report["recipe"]["resolved"]["evaluate"] == ["similarity", "spearman"]
    before, after = (report[side]["evaluation"] for side in ("original", "result"))
    assert before["pooling"] == ["cls_token"]
    rows = [line.split("\t") for line in (folders / "pairs.tsv").read_text().splitlines()[1:]]
    documents = [Document(f"pairs.tsv#{i}", "", pair=(a, b), label=float(s)) for i, (a, b, s) in enumerate(rows)]
    models = [load_model(folder) for folder in (folders / "base", result.checkpoint)]
    expected = embed_documents(
        models[1], load_tokenizer(folders / "base"), documents, pooling=Pooling(("cls_token",)), reference=models[0]
    )
    assert after == {**expected, "emulated": None}
    judged = {gate["gate"]: gate for gate in report["gates"]}
    assert judged["similarity.max_drop"]["value"] == pytest.approx(100 * (1 - after["similarity"]))
    assert judged["spearman.max_drop"]["value"] == pytest.approx(100 * (before["spearman"] - after["spearman"]))
    assert judged["similarity.min"]["text"].startswith(f"{after['similarity']:.4f} (between 0.")
    assert f"| similarity to the original | 1 | {after['similarity']:.4f} | mean cosine |" in text
    assert f"| Spearman | {before['spearman']:.4f} | {after['spearman']:.4f} |" in text
    assert "40 texts or pairs of texts of pairs.tsv, pooling: cls_token" in text
    assert (result.checkpoint / "1_Pooling/config.json").is_file()
    card = (result.checkpoint / "README.md").read_text()
    assert "| Spearman |" in card
    assert "AutoModel.from_pretrained" in card


@pytest.mark.slow
def test_run_measures_similarity_without_labels(base, folders):
    plain = {"evaluation": {"files": [str(folders / "pairs.tsv")], "field": "one"}}
    result = compress.run(base(data=plain, gates={"similarity": {"min": 0.999}}))
    report, text = checked(result)
    assert result.verdict == "failed"
    assert report["result"]["evaluation"]["spearman"] is None
    assert report["recipe"]["resolved"]["evaluate"] == ["similarity"]
    assert "similarity" in text.partition("## Bytes saved and quality lost")[2]


def test_run_measures_masked_language_models(base, folders, texts):
    data = {"evaluation": {"files": [str(texts[1])], "window": 32, "max_documents": 30}}
    gates = {"perplexity": {"max_increase": "400%"}, "kl": {"max": 9}, "agreement": {"min": 0.01}}
    how = {"model": str(folders / "masked"), "data": data, "document_separator": "<|doc|>", "gates": gates}
    result = compress.run(base(**how))
    assert result.verdict == "passed", result.report["gates"]
    report, text = checked(result)
    assert report["recipe"]["resolved"]["evaluate"] == ["perplexity", "kl"]
    assert "30 documents of valid.txt, windows of 32 tokens, 15% of them masked" in text
    assert "| perplexity |" in text
    with pytest.raises(
        CompressError, match=r"`bits_per_byte` does not measure masked .*; its metrics are perplexity, kl, agreement"
    ):
        compress.run(base(**{**how, "gates": {"bits_per_byte": {"max": 9}}}))


@pytest.mark.slow
def test_run_calibrates_on_pairs(base, folders):
    """Pruned block by block on pairs as the model reads them; the default with `text` is one row at a time."""
    calibration = {"files": [str(folders / "pairs.tsv")], "text": ["one", "two"], "samples": 20, "length": 24}
    passes = [{"prune_unstructured": {"method": "wanda", "sparsity": "50%", "reconstruction_epochs": 0}}]
    result = compress.run(base(data={"calibration": calibration}, passes=passes))
    used = result.report["data"]["calibration"]
    assert (used["mode"], used["samples"], used["length"]) == ("padded", 20, 24)
    alone = compress.run(base(data={"calibration": {**calibration, "text": "one"}}, passes=passes))
    assert alone.report["data"]["calibration"]["ids_sha256"] != used["ids_sha256"]
    assert alone.report["stages"][0]["content"] != result.report["stages"][0]["content"]
    again = {"files": calibration["files"], "field": "one", "mode": "padded", "samples": 20, "length": 24}
    field = compress.run(base(data={"calibration": again}, passes=passes))
    assert field.report["stages"][0]["content"] == alone.report["stages"][0]["content"]


def test_run_refuses_shared_pairs(base, folders):
    section = {"files": [str(folders / "pairs.tsv")], "text": ["one", "two"], "samples": 4, "length": 24}
    data = {**base()["data"], "calibration": section}
    with pytest.raises(DataError, match=r"pairs.tsv: is in data.calibration too"):
        compress.run(base(data=data, passes=[{"prune_structured": {"layers": 1}}]))


@pytest.mark.slow
def test_evaluate_measures_embeddings(base, folders, tmp_path, capsys, monkeypatch):
    small = compress.run(base()).checkpoint
    file = str(folders / "pairs.tsv")
    pairs = EvaluationSettings(files=(file,), text=("one", "two"), label="score")
    alone = evaluate(str(folders / "base"), pairs)
    assert alone["settings"]["metrics"] == ("spearman",)
    assert alone["evaluation"]["similarity"] is None
    (tmp_path / "base.json").write_text(reports.to_json(alone))
    found = evaluate(
        str(small), EvaluationSettings(metrics=("similarity", "spearman")), baseline=str(tmp_path / "base.json")
    )
    drop = 100 * (alone["evaluation"]["spearman"] - found["evaluation"]["spearman"])
    assert found["paired"]["spearman"]["drop"] == pytest.approx(drop)
    assert found["paired"]["similarity"]["value"] == pytest.approx(found["evaluation"]["similarity"])
    with pytest.raises(CompressError, match="`similarity` compares with another checkpoint; give --baseline"):
        evaluate(str(small), EvaluationSettings(files=(file,), field="one"))
    with pytest.raises(DataError, match=r"pairs.tsv: scores are of pairs of texts; name two columns with `text`"):
        evaluate(str(small), EvaluationSettings(files=(file,), text=("one",), label="score"))
    (tmp_path / "bad.tsv").write_text("one\ttwo\tscore\na\tb\thigh\n")
    with pytest.raises(DataError, match=r'bad.tsv:2: `score` is "high", not a number'):
        evaluate(str(small), EvaluationSettings(files=(str(tmp_path / "bad.tsv"),), text=("one", "two"), label="score"))
    monkeypatch.setattr(
        sys, "argv", ["compress", "eval", str(small), "--baseline", str(tmp_path / "base.json"), "--metric", "spearman", "-q"]
    )  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    assert "Spearman drops by" in capsys.readouterr().out


def test_check_reads_labels_without_torch(base, labelled, tmp_path):
    folder, _ = labelled
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nword\tred\nword\tyellow\n")
    evaluation = {"files": [str(tmp_path / "dev.tsv")], "text": "sentence", "label": "label"}
    (tmp_path / "r.yaml").write_text(json.dumps(base(model=str(folder), data={"evaluation": evaluation})))
    code = (
        "import sys\n"
        f"sys.argv = ['compress', 'check', {str(tmp_path / 'r.yaml')!r}]\n"
        "from compress.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as error:\n    print(error.code, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("2 []"), done
    assert (
        'dev.tsv:3: `label` is "yellow", not a label of the model; there are red, green, blue, or 0 to 2' in done.stderr
    )
