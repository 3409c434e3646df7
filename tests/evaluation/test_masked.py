from __future__ import annotations

import math
import random

import pytest
import torch
from tokenizers import processors

from compress.data.documents import Document
from compress.errors import CompressError, DataError
from compress.evaluation.masked import SHARE, score_masked
from tests import pico

TEXTS = ["It was the best of times, it was the worst of times.", "x", "über alles – 世界", "far better " * 12]


@pytest.fixture(scope="module")
def tokenizer():
    """Special tokens around a text, one of them for masking."""
    made = pico.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    made.add_special_tokens({"mask_token": "<mask>"})
    return made


def slowly(model, tokenizer, document, window, other=None):
    """One token at a time: sums of nll, kl and agreement, and how many tokens."""
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    sums, count = [0.0, 0.0, 0], 0
    for part, start in enumerate(range(0, len(ids), window - 2)):
        piece = [0, *ids[start : start + window - 2], 0]
        inside = range(1, len(piece) - 1)
        chosen = random.Random(f"{document.id}.{part}").sample(inside, max(1, round(SHARE * len(inside))))
        hidden = torch.tensor([[tokenizer.mask_token_id if i in chosen else t for i, t in enumerate(piece)]])
        with torch.no_grad():
            for at in chosen:
                q = model(input_ids=hidden).logits[0, at].double().log_softmax(-1)
                sums[0] -= float(q[piece[at]])
                if other is not None:
                    p = other(input_ids=hidden).logits[0, at].double().log_softmax(-1)
                    sums[1] += float((p.exp() * (p - q)).sum())
                    sums[2] += int(p.argmax() == q.argmax())
        count += len(chosen)
    return sums, count


@pytest.mark.parametrize("family", pico.families(["bert", "roberta", "electra", "distilbert"], tier=("bert",)))
def test_score_masked_matches_one_token_at_a_time(family, tokenizer):
    model, other = pico.model(family), pico.model(family, seed=1)
    documents = [Document(f"d#{i}", t) for i, t in enumerate(TEXTS * 8)]
    found = score_masked(model, tokenizer, documents, window=20, reference=other)
    assert (found["unit"], found["window"], len(found["documents"])) == ("document", 20, 32)
    for row, document in zip(found["documents"][:6], documents, strict=False):
        (nll, kl, agree), count = slowly(model, tokenizer, document, 20, other)
        assert (row["id"], row["tokens"], row["agree"]) == (document.id, count, agree)
        assert [row["nll"], row["kl"]] == pytest.approx([nll, kl], rel=1e-4, abs=1e-5)
    rows = found["documents"]
    tokens = sum(r["tokens"] for r in rows)
    assert found["perplexity"] == pytest.approx(math.exp(sum(r["nll"] for r in rows) / tokens))
    assert found["kl"] == pytest.approx(sum(r["kl"] for r in rows) / tokens)
    assert found["agreement"] == sum(r["agree"] for r in rows) / tokens
    assert "bits_per_byte" not in found
    assert score_masked(model, tokenizer, documents, window=20)["kl"] is None


def test_score_masked_windows_add_up_when_documents_are_few(tokenizer):
    model = pico.model("bert")
    found = score_masked(model, tokenizer, [Document("d#0", TEXTS[3])], window=20)
    (nll, _, _), count = slowly(model, tokenizer, Document("d#0", TEXTS[3]), 20)
    assert found["unit"] == "chunk"
    assert [row["id"] for row in found["documents"]] == [f"d#0.{i}" for i in range(math.ceil(132 / 18))]
    assert sum(row["nll"] for row in found["documents"]) == pytest.approx(nll, rel=1e-4)
    assert sum(row["tokens"] for row in found["documents"]) == count


def test_score_masked_refuses_unfit_tokenizers(tokenizer):
    with pytest.raises(CompressError, match=r"a window of 65 tokens is beyond the 64 that .* take; set window to 64"):
        score_masked(pico.model("bert"), tokenizer, [Document("d#0", "abc")], window=65)
    with pytest.raises(DataError, match="the tokenizer has no mask token"):
        score_masked(pico.model("bert"), pico.tokenizer(), [Document("d#0", "abc")], window=20)
    with pytest.raises(DataError, match="has no token to score"):
        score_masked(pico.model("bert"), tokenizer, [Document("d#0", "")], window=20)
    with pytest.raises(DataError, match=r"the tokenizer gives token \d+, the model knows 40"):
        score_masked(pico.model("bert", vocab_size=40), tokenizer, [Document("d#0", "abc")], window=20)
