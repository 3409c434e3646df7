from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.data.documents import Document
from compress.evaluation.classification import Prediction, Predictions, classify_documents
from tests import pico

LABELS = ["red", "green", "blue"]


def classifier(family="bert", seed=0, **changes):
    name = pico.FAMILIES[family][0].replace("ForMaskedLM", "").replace("ForCausalLM", "") + "ForSequenceClassification"
    return pico.model(family, class_name=name, seed=seed, num_labels=3, **changes)


def documents(pairs=False):
    texts = ["a", "some words", "über alles – 世界", "much longer than the others, it is", "zz top", "x y z"] * 3
    return [Document(f"d#{i}", t, pair=(t, f"and {i}") if pairs else None, label=i % 3) for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer():
    return pico.tokenizer()


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
