from __future__ import annotations

import math

import pytest
import torch
import transformers

from compress.data.documents import Document
from compress.errors import CompressError, DataError
from compress.evaluation.language import metrics, score_documents
from compress.models.pico import pico_model
from tests import pico

TEXTS = [
    "It was the best of times, it was the worst of times, über alles – 世界.",
    "x",
    "It is a far, far better thing that I do. " * 3,
]


@pytest.fixture(scope="module")
def model():
    return pico.model("llama")


@pytest.fixture(scope="module")
def other():
    return pico.model("llama", seed=1)


def slow(model, tokenizer, text, window, stride):
    """Negative log-likelihood of each target, one window and one target at a time, as often described (Hugging Face's docs)."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nll = {}
    for start in range(0, len(ids), stride):
        for end in range(start + 1, min(start + window, len(ids) - 1) + 1):
            if end not in nll:
                logits = model(input_ids=torch.tensor([ids[start:end]])).logits[0, -1].double()
                nll[end] = float(-torch.log_softmax(logits, -1)[ids[end]])
    assert sorted(nll) == list(range(1, len(ids)))
    return sum(nll.values())


@pytest.mark.parametrize(
    ("window", "stride"),
    [
        (16, 5),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((32, 32), (32, 16), (64, 64))),
    ],
)
def test_score_documents_scores_every_token_once(model, tokenizer, window, stride):
    documents = [Document(f"d#{i}", t) for i, t in enumerate(TEXTS * 10)]
    scores = score_documents(model, tokenizer, documents, window=window, stride=stride).to_dict()
    assert scores["unit"] == "document"
    with torch.no_grad():
        for row, text in zip(scores["documents"], TEXTS, strict=False):
            assert row["bytes"] == len(text.encode())
            assert row["tokens"] == len(tokenizer(text)["input_ids"])
            assert row["nll"] == pytest.approx(slow(model, tokenizer, text, window, stride), rel=1e-5)
    total = sum(r["nll"] for r in scores["documents"])
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(len(t.encode()) for t in TEXTS * 10))
    assert scores["perplexity"] == pytest.approx(math.exp(total / scores["tokens"]))
    assert scores["kl"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("window", "stride"), [(32, 32), (16, 5), (2, 2)])
def test_score_documents_begins_every_window_with_bos(model, window, stride):
    """Every token is scored once and every byte counted once, by a model that never reads a window without the beginning."""
    begins = pico.tokenizer(begins=True)
    documents = [Document(f"d#{i}", t) for i, t in enumerate(TEXTS * 10)]
    read, handle = (
        [],
        model.register_forward_pre_hook(
            lambda module, args, kwargs: read.extend(kwargs["input_ids"].tolist()), with_kwargs=True
        ),
    )
    scores = score_documents(model, begins, documents, window=window, stride=stride).to_dict()
    handle.remove()
    assert {row[0] for row in read} == {257}
    assert {len(row) for row in read} <= set(range(1, window + 1))
    for row, text in zip(scores["documents"], TEXTS, strict=False):
        ids = begins(text)["input_ids"]
        assert (row["bytes"], row["tokens"]) == (len(text.encode()), len(ids) - 1)
        nll, start, scored = 0.0, 0, 1
        with torch.no_grad():
            while scored < len(ids):  # as docs/recipes.md says: each reads <bos> and what fits beside it
                lead = [257] if start else []
                end = min(start + window - len(lead), len(ids) - 1)
                logits = model(input_ids=torch.tensor([lead + ids[start:end]])).logits[0].double().log_softmax(-1)
                for target in range(scored, end + 1):
                    nll -= float(logits[len(lead) + target - start - 1, ids[target]])
                scored, start = max(scored, end + 1), min(start + stride, end)
        assert row["nll"] == pytest.approx(nll, rel=1e-5)


def test_score_documents_chunks_add_up_when_windows_begin_with_bos(model):
    begins, text = pico.tokenizer(begins=True), TEXTS[0] * 20
    few = score_documents(model, begins, [Document("d#0", text)], window=16, stride=16)
    assert few.unit == "chunk"
    assert sum(s.bytes for s in few.documents) == len(text.encode())
    assert sum(s.tokens for s in few.documents) == len(begins(text)["input_ids"]) - 1


def test_score_documents_kl_and_agreement_match_definitions(model, other, tokenizer):
    documents = [Document(f"d#{i}", t) for i, t in enumerate(TEXTS * 10)]
    scores = score_documents(other, tokenizer, documents, window=32, stride=32, reference=model)
    for row, text in zip(scores.documents, TEXTS, strict=False):
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
        kl, agree = 0.0, 0
        with torch.no_grad():
            for start in range(0, ids.shape[1] - 1, 32):
                piece = ids[:, start : min(start + 32, ids.shape[1] - 1)]
                p, q = (
                    torch.distributions.Categorical(logits=m(input_ids=piece).logits.double()) for m in (model, other)
                )
                kl += float(torch.distributions.kl_divergence(p, q).sum())
                agree += int((p.logits.argmax(-1) == q.logits.argmax(-1)).sum())
        assert row.kl == pytest.approx(kl, rel=1e-4)
        assert row.agree == agree
    same = score_documents(model, tokenizer, documents, window=32, stride=32, reference=model).to_dict()
    assert same["kl"] == pytest.approx(0, abs=1e-7)
    assert same["agreement"] == 1


def test_score_documents_compares_shared_ids_when_vocabulary_is_padded(model, tokenizer):
    wide = pico.model("llama", vocab_size=pico.VOCABULARY + 20)
    state = model.state_dict()
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter[: state[name].shape[0]] = state[name]
            parameter[state[name].shape[0] :] = 0
    documents = [Document("d#0", TEXTS[0])]
    scores = score_documents(wide, tokenizer, documents, window=32, stride=32, reference=model).to_dict()
    assert scores["kl"] == pytest.approx(0, abs=1e-6)
    assert scores["agreement"] == 1


def test_score_documents_chunks_add_up_when_documents_are_few(model, tokenizer):
    text = TEXTS[0] * 40  # some characters take several tokens
    others = [Document(f"d#{i}", "x") for i in range(1, 30)]
    whole = score_documents(model, tokenizer, [Document("d#0", text), *others], window=16, stride=16)
    few = score_documents(model, tokenizer, [Document("d#0", text)], window=16, stride=16)
    assert (whole.unit, few.unit) == ("document", "chunk")
    assert 60 <= len(few.documents) <= 120
    assert few.documents[0].id == "d#0.0"
    assert sum(s.bytes for s in few.documents) == len(text.encode())
    assert sum(s.tokens for s in few.documents) == whole.documents[0].tokens
    assert sum(s.nll for s in few.documents) == pytest.approx(whole.documents[0].nll, rel=1e-6)
    assert all(s.bytes >= 0 for s in few.documents)


def test_score_documents_keeps_nan(tokenizer):
    broken = pico.model("llama")
    with torch.no_grad():
        broken.lm_head.weight[5, 5] = torch.nan
    scores = score_documents(broken, tokenizer, [Document("d#0", "abc")], window=8, stride=8).to_dict()
    assert math.isnan(scores["bits_per_byte"])
    assert math.isnan(scores["perplexity"])
    beside = score_documents(
        pico.model("llama"), tokenizer, [Document("d#0", "abc")], window=8, stride=8, reference=broken
    )
    assert math.isnan(beside.documents[0].kl)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "qwen3"])
def test_score_documents_does_not_depend_on_batching(family, tokenizer):
    model = pico.model(family)
    documents = [Document(f"d#{i}", t) for i, t in enumerate(TEXTS)]
    together = score_documents(model, tokenizer, documents, window=32, stride=32)
    alone = [score_documents(model, tokenizer, [d], window=32, stride=32) for d in documents]
    for one, document in zip(alone, documents, strict=True):
        mine = [s.nll for s in together.documents if s.id.startswith(document.id)]
        assert sum(mine) == pytest.approx(sum(s.nll for s in one.documents), rel=1e-5)


def test_models_that_read_padding_score_each_text_alone(tokenizer):
    """An XLM's tokens see all others, padding too, whatever its class is called."""
    config = transformers.XLMConfig(vocab_size=300, emb_dim=16, n_layers=1, n_heads=2, max_position_embeddings=64)
    model = pico_model(transformers.XLMWithLMHeadModel, config)
    documents = [Document("a", "some words of a text"), Document("b", "two")]
    options = {"window": 32, "stride": 32}
    together = score_documents(model, tokenizer, documents, **options).to_dict()["documents"]
    alone = [row for d in documents for row in score_documents(model, tokenizer, [d], **options).to_dict()["documents"]]
    assert [row["nll"] for row in together] == pytest.approx([row["nll"] for row in alone], rel=1e-6)


@pytest.mark.parametrize("paired", [False, True])
def test_long_windows_are_compared_in_pieces(model, other, tokenizer, paired, monkeypatch):
    documents = [Document(f"d#{i}", t) for i, t in enumerate(TEXTS)]
    how = {"window": 48, "stride": 48, "reference": other if paired else None}
    whole = score_documents(model, tokenizer, documents, **how)
    monkeypatch.setattr("compress.evaluation.scoring.PIECE", 7 * pico.VOCABULARY)
    assert score_documents(model, tokenizer, documents, **how) == whole


def test_score_documents_refuses_unfit_data(tokenizer, model):
    with pytest.raises(CompressError, match="bits per byte needs a causal language model, this is BertForMaskedLM"):
        score_documents(pico.model("bert"), tokenizer, [Document("d#0", "abc")], window=8, stride=8)
    with pytest.raises(
        CompressError, match="a window of 65 tokens is beyond the model's 64 positions; set window to 64"
    ):
        score_documents(model, tokenizer, [Document("d#0", "abc")], window=65, stride=8)
    small = pico.model("llama", vocab_size=40)
    with pytest.raises(DataError, match=r"the tokenizer gives token \d+, the model knows 40"):
        score_documents(small, tokenizer, [Document("d#0", "abc")], window=8, stride=8)
    with pytest.raises(DataError, match="no token to score"):
        score_documents(model, tokenizer, [Document("d#0", "")], window=8, stride=8)


def test_metrics_are_infinite_when_losses_overflow():
    rows = [{"bytes": 1, "tokens": 1, "nll": 1e4, "kl": None, "agree": None}]
    assert metrics("document", rows)["perplexity"] == math.inf


def test_changes_are_the_tokens_of_largest_divergence(model, other, tokenizer):
    from compress.evaluation.changes import MOST

    documents = [Document(f"d#{i}", t) for i, t in enumerate(TEXTS)]
    rows = score_documents(model, tokenizer, documents, window=32, stride=16, reference=other).to_dict()["changed"]
    divergences = {}
    with torch.no_grad():
        for document in documents:
            ids = [tokenizer.bos_token_id, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
            if len(ids) <= 33:  # one window
                ours, theirs = (m(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1) for m in (model, other))
                kl = (theirs.exp() * (theirs - ours)).sum(-1)
                divergences |= {
                    (document.id, i + 1): (float(x), tokenizer.decode([int(t.argmax())]))
                    for i, (x, t) in enumerate(zip(kl, theirs, strict=True))
                }
    assert len(rows) == MOST
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    least = rows[-1]["kl"]
    short = {key for key, (kl, _) in divergences.items() if kl > least + 1e-5}
    assert short <= {(row["document"], row["token"]) for row in rows}
    for row in rows:
        if (key := (row["document"], row["token"])) in divergences:
            assert (row["kl"], row["before"]["text"]) == (
                pytest.approx(divergences[key][0], abs=1e-5),
                divergences[key][1],
            )
        assert 0 <= row["after"]["of_true"] <= row["after"]["probability"] <= 1
    assert score_documents(model, tokenizer, documents, window=32, stride=16).changed == []
