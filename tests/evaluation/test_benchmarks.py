"""Tasks of lm-eval: paired intervals, gates, refusals; and (slow) lm-eval itself on a task of one file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

import compress
from compress.errors import CompressError, RecipeError, ReportError
from compress.evaluation import benchmarks
from compress.evaluation.lm_eval_settings import LmEvalSettings
from compress.evaluation.metrics.base import Resampling
from compress.gates import judge
from compress.recipe import recipe_from_mapping
from compress.statistics import accuracy_drop
from tests import pico

FEW = Resampling(bootstrap=200)


def task(metric, values, *, higher=True, value=None):
    rows = [{"id": i, "hash": f"h{i}", metric: v} for i, v in enumerate(values)]
    return {"version": "1", "shots": 0, "metrics": {metric: value}, "higher": {metric: higher}, "rows": rows}


def sides(*tasks):
    return [{"lm_eval": {"version": "0", "tasks": {"arc": one}}, "evaluation": None} for one in tasks]


BEFORE = task("acc", [1.0] * 30 + [0.0] * 10)
AFTER = task("acc", [1.0] * 26 + [0.0] * 14)


def test_drop_of_accuracy_is_paired_and_exact():
    assert benchmarks.task_change(BEFORE, AFTER, "acc", FEW) == accuracy_drop(4, 0, 40, 0.95)


@pytest.mark.parametrize(("bound", "verdict"), [(30, "pass"), (1, "fail"), (10, "inconclusive")])
def test_gate_on_a_task(bound, verdict):
    (result,) = judge({"lm_eval": {"task": "arc", "max_drop": bound}}, *sides(BEFORE, AFTER))
    assert (result.gate, result.verdict, result.value) == ("lm_eval.max_drop of arc", verdict, 10.0)


def test_ratio_of_sums_is_resampled_as_lm_eval_computes_it():
    before = task("bits_per_byte", [[-10.0 - i, 10.0 + i] for i in range(20)], higher=False)
    after = task("bits_per_byte", [[-11.0 - i, 10.0 + i] for i in range(20)], higher=False)
    level = benchmarks.task_level(after, "bits_per_byte", FEW)
    total = sum(11.0 + i for i in range(20)) / sum(10.0 + i for i in range(20)) / math.log(2)
    assert level.value == pytest.approx(total, rel=1e-12)
    change = benchmarks.task_change(before, after, "bits_per_byte", FEW, relative=True)
    assert change.value == pytest.approx(total * math.log(2) - 1, rel=1e-12)
    assert change.lower < change.value < change.upper


def test_gate_of_the_wrong_direction_is_refused():
    with pytest.raises(ReportError, match="of acc more is better; use `min` or `max_drop`"):
        judge({"lm_eval": {"task": "arc", "max": 0.5}}, *sides(BEFORE, AFTER))
    with pytest.raises(ReportError, match="needs the metric f1; the task has acc"):
        judge({"lm_eval": {"task": "arc", "metric": "f1", "min": 0.5}}, *sides(BEFORE, AFTER))
    with pytest.raises(ReportError, match="was measured on other documents"):
        judge({"lm_eval": {"task": "arc", "max_drop": 1}}, *sides(BEFORE, task("acc", [1.0] * 39)))


def test_recipe_names_the_tasks_of_its_gates():
    def load(evaluate, gate):
        changes = {"evaluate": evaluate, "gates": {"lm_eval": gate}}
        return recipe_from_mapping(
            {"model": "m/m", "output": "o", "passes": [{"cast": {"weights": "bf16"}}], **changes}
        )

    load([{"lm_eval": {"tasks": ["arc_easy"]}}], {"task": "arc_easy", "max_drop": 1})
    with pytest.raises(RecipeError, match="needs the task arc_hard, which is not measured"):
        load([{"lm_eval": {"tasks": ["arc_easy"]}}], {"task": "arc_hard", "max_drop": 1})
    with pytest.raises(RecipeError, match="lm_eval names no task"):
        load([], {"task": "arc_hard", "max_drop": 1})


def test_tasks_are_refused_of_a_model_that_predicts_no_text(tmp_path):
    def planned(family, **changes):
        entry = {"lm_eval": {"tasks": ["arc_easy"]}}
        recipe = {"passes": [{"cast": {"weights": "bf16"}}], "evaluate": [entry], "output": str(tmp_path / "out")}
        compress.check({**recipe, "model": str(pico.folder(family, **changes))})

    with pytest.raises(CompressError, match="BertForMaskedLM is for masked language modelling"):
        planned("bert")
    with pytest.raises(CompressError, match="has no tokenizer"):
        planned("llama", with_tokenizer=False)


def test_lm_eval_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    with pytest.raises(CompressError, match=r"needs lm-eval; pip install 'compress-toolkit\[lm-eval\]'"):
        benchmarks.check_lm_eval(LmEvalSettings(tasks=("arc_easy",)))
    with pytest.raises(CompressError, match=r"no.yaml: there is no such file"):
        benchmarks.check_lm_eval(LmEvalSettings(tasks=("no.yaml",)))


TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_numbers_equal_those_of_its_own_command(tmp_path):
    """A compact checkpoint, offline, on a task of one file."""
    pytest.importorskip("lm_eval")
    rows = [{"text": f"word {i} is", "choices": [f" {i % 7}", f" {i % 5} or so"], "answer": i % 2} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    result = compress.run(
        {
            "model": str(pico.folder("llama")),
            "output": str(tmp_path / "out"),
            "store": "compact",
            "offline": True,
            "passes": [{"prune_unstructured": {"method": "magnitude", "sparsity": "50%"}}],
            "evaluate": [{"lm_eval": {"tasks": [str(tmp_path / "task.yaml")], "limit": 20}}],
            "gates": {"lm_eval": {"task": "local_choice", "max_drop": 100}},
        }
    )
    assert result.verdict == "passed"
    measured = result.report["result"]["lm_eval"]["tasks"]["local_choice"]
    assert len(measured["rows"]) == 20
    command = ["--model", "hf", "--tasks", str(tmp_path / "task.yaml"), "--limit", "20", "--device", "cpu"]
    args = f"pretrained={tmp_path / 'out'},dtype=float32,trust_remote_code=True"
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *command, "--model_args", args, "--output_path", str(tmp_path / "own")],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    (own,) = (tmp_path / "own").rglob("results_*.json")
    assert json.loads(own.read_text())["results"]["local_choice"]["acc,none"] == measured["metrics"]["acc"]


BAD = {
    "task: [a": "ParserError",
    TASK.replace("test_split: test", "test_split: nope"): "KeyError: 'nope'",
    TASK.replace("metric: acc", "metric: accu"): "local_choice: lm-eval computes none of its metrics",
    TASK.replace("choices}", "choicez}"): "'choicez' is undefined",
    "- 1": "Expected YAML dict",
}


@pytest.mark.slow
@pytest.mark.parametrize("text", BAD)
def test_wrong_file_of_a_task_is_one_line(text, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "choices": ["b", "c"], "answer": 0}))
    (tmp_path / "task.yaml").write_text(
        text.format(file=tmp_path / "rows.jsonl") if text.startswith("task: local") else text
    )
    options = {"dtype": "float32", "device": "cpu", "trust_remote_code": False, "offline": True}
    with pytest.raises(CompressError) as caught:
        benchmarks.measure_tasks(pico.folder("llama"), LmEvalSettings(tasks=(str(tmp_path / "task.yaml"),)), **options)
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_unknown_task_and_missing_data_are_one_line(tmp_path):
    pytest.importorskip("lm_eval")
    options = {"dtype": "float32", "device": "cpu", "trust_remote_code": False, "offline": True}
    with pytest.raises(CompressError, match="lm-eval has no task `arc_eazy`; did you mean `arc_easy`"):
        benchmarks.measure_tasks(pico.folder("llama"), LmEvalSettings(tasks=("arc_eazy",)), **options)
    with pytest.raises(CompressError, match="data of a task are not on this machine and cannot be fetched"):
        benchmarks.measure_tasks(pico.folder("llama"), LmEvalSettings(tasks=("arc_easy",)), **options)
