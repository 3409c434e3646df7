from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from compress.data.documents import Document
from compress.data.examples import Labels, read_examples
from compress.errors import CompressError, DataError
from compress.evaluation.classification import Prediction, Predictions, classify_documents
from compress.evaluation.examples import Examples
from compress.models.loading import load_model
from compress.models.processors import load_tokenizer
from tests import pico

LABELS = ["red", "green", "blue"]


def classifier(family="bert", seed=0, **changes):
    name = pico.FAMILIES[family][0].replace("ForMaskedLM", "").replace("ForCausalLM", "") + "ForSequenceClassification"
    return pico.model(family, class_name=name, seed=seed, num_labels=3, **changes)


def documents(pairs=False):
    texts = ["a", "some words", "über alles – 世界", "much longer than the others, it is", "zz top", "x y z"] * 3
    return [Document(f"d#{i}", t, pair=(t, f"and {i}") if pairs else None, label=i % 3) for i, t in enumerate(texts)]


def slowly(model, tokenizer, document):
    """Log-probabilities of one text by itself, without padding, float64."""
    inputs = tokenizer(*(document.pair or [document.text]), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize(
    ("family", "changes"), [("bert", {}), ("distilbert", {}), ("roberta", {}), ("llama", {"pad_token_id": 299}), ("llama", {})]
)  # fmt: skip
def test_classify_documents_matches_one_text_at_a_time(family, changes, tokenizer):
    model, other = classifier(family, **changes), classifier(family, seed=1, **changes)
    found = classify_documents(model, tokenizer, documents(), labels=LABELS, reference=other)
    for row, document in zip(found.documents, documents(), strict=True):
        q, p = (slowly(m, tokenizer, document) for m in (model, other))
        assert (row.id, row.label, row.prediction) == (document.id, document.label, int(q.argmax()))
        assert row.nll == pytest.approx(float(-q[document.label]), rel=1e-4, abs=1e-5)
        assert row.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-5)
        assert row.agree == int(p.argmax() == q.argmax())


def test_classify_documents_reads_pairs_with_token_types():
    from tokenizers import processors

    tokenizer = pico.tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B:1", special_tokens=[("<|endoftext|>", 0)]
    )
    assert set(tokenizer("a", "b")["token_type_ids"]) == {0, 1}
    model = classifier()
    found = classify_documents(model, tokenizer, documents(pairs=True), labels=LABELS)
    for row, document in zip(found.documents, documents(pairs=True), strict=True):
        assert row.nll == pytest.approx(float(-slowly(model, tokenizer, document)[document.label]), rel=1e-4, abs=1e-5)
        assert (row.kl, row.agree) == (None, None)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_classify_documents_truncates_to_model_length(family, tokenizer):
    model = classifier(family)
    longest = 64 if family == "bert" else 63  # RoBERTa's positions begin after the padding token's
    long = [Document("d#0", "word " * 40, label=1), *documents()]
    found = classify_documents(model, tokenizer, long, labels=LABELS)
    assert found.cut == 1
    ids = tokenizer(long[0].text, return_tensors="pt")["input_ids"][:, :longest]
    with torch.no_grad():
        expected = float(-model(input_ids=ids).logits[0].log_softmax(-1)[1])
    assert found.documents[0].nll == pytest.approx(expected, rel=1e-4)


def test_metrics_match_definitions():
    rows = [(0, 0), (0, 1), (0, 0), (1, 1), (1, 0), (2, 0)]
    rows = [Prediction(str(i), label, given, 1.0, 0.5, int(label == 0)) for i, (label, given) in enumerate(rows)]
    found = Predictions(tuple(rows), ("a", "b", "c", "d"), 0).to_dict()  # no row has or is given the fourth label
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1"] == pytest.approx((2 * 2 / (2 * 2 + 2 + 1) + 2 / (2 + 1 + 1) + 0) / 3)
    assert (found["cross_entropy"], found["kl"], found["agreement"]) == (1.0, 0.5, 0.5)
    alone = tuple(replace(row, kl=None, agree=None) for row in rows)
    assert Predictions(alone, ("a", "b", "c", "d"), 0).to_dict()["agreement"] is None


def batched(lengths, padding=0):
    return Examples(tuple({"input_ids": [1] * n} for n in lengths), 0, padding).batches()


def test_batches_groups_texts_of_similar_length():
    lengths = [int(n) for n in torch.randint(1, 500, (300,), generator=torch.Generator().manual_seed(0))]
    batches = batched(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    assert all(len(b) * max(lengths[i] for i in b) <= 1 << 13 and len(b) <= 64 for b in batches)
    assert sum(len(b) * max(lengths[i] for i in b) for b in batches) < 1.15 * sum(lengths)
    assert [len(b) for b in batched(lengths, padding=None)] == [1] * 300
    assert batched([1 << 14, 1]) == [[0], [1]]


def test_classify_documents_keeps_nan(tokenizer):
    model = classifier()
    with torch.no_grad():
        model.classifier.weight[1, 1] = torch.nan
    found = classify_documents(model, tokenizer, documents(), labels=LABELS).to_dict()
    assert math.isnan(found["cross_entropy"])


def test_classify_documents_refuses_unfit_models(tokenizer):
    with pytest.raises(CompressError, match="BertForSequenceClassification has 3 labels, 2 are expected"):
        classify_documents(classifier(), tokenizer, documents(), labels=["no", "yes"])
    with pytest.raises(DataError, match=r"the tokenizer gives token \d+, the model knows 40"):
        classify_documents(classifier(vocab_size=40), tokenizer, documents(), labels=LABELS)


def test_classify_documents_matches_plain_transformers(labelled, stock):
    folder, file = labelled
    read = read_examples([str(file)], ["sentence"], Labels("label", int, "a label"))
    found = classify_documents(load_model(folder), load_tokenizer(folder), read, labels=LABELS).to_dict()
    theirs = json.loads(
        stock(
            "import json, csv, torch\n"
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
            f"m = AutoModelForSequenceClassification.from_pretrained({str(folder)!r}).eval()\n"
            f"t = AutoTokenizer.from_pretrained({str(folder)!r})\n"
            f"rows = list(csv.DictReader(open({str(file)!r}), delimiter='\\t'))\n"
            "said = [int(m(**t(r['sentence'], return_tensors='pt')).logits.argmax(-1)) for r in rows]\n"
            "print(json.dumps([said, [int(r['label']) for r in rows]]))\n"
        ).splitlines()[-1]
    )
    assert [[r[key] for r in found["documents"]] for key in ("prediction", "label")] == theirs
    assert found["accuracy"] == sum(a == b for a, b in zip(*theirs, strict=True)) / 40 == 0.8
