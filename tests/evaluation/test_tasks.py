from __future__ import annotations

import math
import subprocess
import sys

import pytest

from compress.errors import CompressError
from compress.evaluation.scorer import _SCORERS
from compress.evaluation.tasks import (
    CLASSIFICATION,
    EMBEDDING,
    IMAGES,
    LABELLED,
    LANGUAGE,
    MASKED,
    TASKS,
    check_metrics,
    label_id,
    label_ids,
    measurable,
    score,
    task_of,
)
from tests import pico

BERT = "BertForSequenceClassification"


def test_task_of_reads_the_class():
    assert task_of(BERT) is CLASSIFICATION
    assert task_of("LlamaForCausalLM") is task_of("GPT2LMHeadModel") is task_of(None) is LANGUAGE
    assert task_of("BertForMaskedLM") is MASKED
    assert task_of("BertModel") is task_of("LlamaModel") is EMBEDDING
    for name, _ in pico.FAMILIES.values():
        expected = MASKED if name.endswith("MaskedLM") else IMAGES if name.startswith("ViT") else LANGUAGE
        assert task_of(name) is expected


def test_measurable_gives_every_task_metrics_and_a_scorer():
    assert set(_SCORERS) == set(TASKS)
    for task in TASKS:
        assert set(task.default) <= set(task.metrics)
        assert all(task.measurable(given) for given in task.takes)
    assert measurable("labelled") >= LABELLED
    assert not measurable("text") & LABELLED
    assert EMBEDDING.measurable("text") == ("similarity",)
    assert EMBEDDING.measurable("labelled") == ("similarity", "spearman")
    assert MASKED.measurable("labelled") == CLASSIFICATION.measurable("text") == ()


@pytest.mark.parametrize(
    ("name", "metrics", "given", "message"),
    [
        (BERT, ["bits_per_byte"], "labelled", "`bits_per_byte` does not measure text classification, which BertForSequenceClassification is for; its metrics are accuracy, f1, kl, agreement"),
        ("LlamaForCausalLM", ["kl", "f1"], "text", "`f1` does not measure causal language modelling, which LlamaForCausalLM is for; its metrics are bits_per_byte, perplexity, repetition, kl, agreement"),
        (BERT, ["kl"], "text", "text classification, which BertForSequenceClassification is for, takes labelled files; name the columns of texts and labels: `text`, `label`"),
        ("BertForMaskedLM", ["bits_per_byte"], "text", "`bits_per_byte` does not measure masked language modelling, which BertForMaskedLM is for; its metrics are perplexity, kl, agreement"),
        ("BertModel", ["accuracy"], "labelled", "`accuracy` does not measure sentence embedding, which BertModel is for; its metrics are similarity, spearman"),
        ("BertModel", ["spearman"], "text", "`spearman` needs labelled pairs of texts; name the columns: `text`, `label`"),
        ("ViTForImageClassification", ["kl"], "labelled", "image classification, which ViTForImageClassification is for, takes a folder of images for each class; name it: `images`"),
        ("LlamaForCausalLM", ["kl"], "images", "causal language modelling, which LlamaForCausalLM is for, takes text, not images; name `files`"),
        ("LlamaForCausalLM", ["kl"], "labelled", "causal language modelling, which LlamaForCausalLM is for, takes text without labels; leave out `label`"),
    ],
)  # fmt: skip
def test_check_metrics_refuses_those_of_another_task(name, metrics, given, message):
    with pytest.raises(CompressError) as caught:
        check_metrics(name, metrics, given=given)
    assert str(caught.value) == message


def test_check_metrics_takes_those_of_the_task():
    assert check_metrics(BERT, ["accuracy", "f1", "kl", "agreement", "latency"], given="labelled") is CLASSIFICATION
    assert check_metrics("LlamaForCausalLM", ["perplexity", "memory"], given="text") is LANGUAGE
    assert check_metrics(BERT, ["latency"], given=None) is CLASSIFICATION


def test_label_ids_read_the_config():
    config = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1, "YES": 1}}
    names, ids = label_ids(config)
    assert names == ["no", "yes"]
    said = ["yes", " YES ", 1, "1", 1.0, "0", "maybe", 2, "2", -1, "-1", True, None, 0.5, [1]]
    assert [label_id(value, ids) for value in said] == [1, 1, 1, 1, 1, 0] + [None] * 9
    assert label_ids({})[0] == ["LABEL_0", "LABEL_1"]
    turned = label_ids({"id2label": {"0": "1", "1": "0"}})[1]  # a name goes before a number
    assert label_id("1", turned) == 0
    assert label_id(1, turned) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "LABEL_0"}}, "several labels, this one does regression"),
        ({"problem_type": "multi_label_classification"}, "this one does multi_label_classification"),
        ({"id2label": {"1": "a", "2": "b"}}, "does not count from 0"),
        ({"id2label": ["a", "b"]}, "is not a mapping of labels"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": math.inf}}, "is not a mapping of labels"),
        ({"label2id": {"a": "x"}}, "is not a mapping of labels"),
    ],
)
def test_label_ids_refuse_bad_configs(config, message):
    with pytest.raises(CompressError, match=message):
        label_ids(config)


def test_score_reads_numbers():
    said = ["4.5", " 3 ", 2, -1.5, "1e-1", "nan", "inf", "high", "", None, True, [1], 10**400]
    assert [score(value) for value in said] == [4.5, 3.0, 2.0, -1.5, 0.1] + [None] * 8


def test_tasks_import_no_torch():
    code = "import sys, compress.evaluation.tasks; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
