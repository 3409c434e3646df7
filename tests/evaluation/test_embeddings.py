from __future__ import annotations

import json
import math

import pytest
import scipy.stats
import torch

from compress.data.documents import Document
from compress.errors import CheckpointError, CompressError
from compress.evaluation.embeddings import Pooling, embed_documents, read_pooling
from tests import pico

TEXTS = ["a", "some words", "über alles – 世界", "much longer than the others, it is", "zz top", "x y z"] * 3
DOCUMENTS = [Document(f"d#{i}", text) for i, text in enumerate(TEXTS)]
PAIRS = [Document(d.id, "", pair=(d.text, TEXTS[i * 5 % 18]), label=i % 7) for i, d in enumerate(DOCUMENTS)]


def encoder(family="bert", seed=0, **changes):
    name = pico.FAMILIES[family][0].replace("ForMaskedLM", "").replace("ForCausalLM", "") + "Model"
    return pico.model(family, class_name=name, seed=seed, **changes)


def slowly(model, tokenizer, text, modes=("mean_tokens",)):
    """One text by itself, without padding; each mode by its definition, in float64."""
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double()
    tokens = [states[i] for i in range(len(states))]
    total = sum(tokens[1:], tokens[0])
    found = {
        "cls_token": tokens[0],
        "max_tokens": torch.stack([max(t[k] for t in tokens) for k in range(states.shape[1])]),
        "mean_tokens": total / len(tokens),
        "mean_sqrt_len_tokens": total / math.sqrt(len(tokens)),
        "lasttoken": tokens[-1],
    }
    return torch.cat([found[mode] for mode in modes])


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize(
    ("family", "modes"),
    [
        ("bert", ("mean_tokens",)),
        ("bert", ("max_tokens",)),
        ("bert", ("cls_token", "mean_sqrt_len_tokens")),
        pytest.param("roberta", ("cls_token",), marks=pytest.mark.slow),
        pytest.param("distilbert", ("mean_tokens",), marks=pytest.mark.slow),
        ("llama", ("lasttoken",)),
    ],
)
def test_embed_documents_matches_one_text_at_a_time(family, modes, tokenizer):
    options = {"pad_token_id": 299} if family == "llama" else {}
    model, other = encoder(family, **options), encoder(family, seed=1, **options)
    found = embed_documents(model, tokenizer, DOCUMENTS, pooling=Pooling(modes), reference=other)
    expected = [cosine(slowly(model, tokenizer, t, modes), slowly(other, tokenizer, t, modes)) for t in TEXTS]
    assert [row["similarity"] for row in found["documents"]] == pytest.approx(expected, abs=1e-5)
    assert found["similarity"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert (found["spearman"], found["documents"][0]["cosine"], found["cut"]) == (None, None, 0)
    same = embed_documents(model, tokenizer, DOCUMENTS, pooling=Pooling(modes), reference=model)
    assert same["similarity"] == pytest.approx(1, abs=1e-6)


def test_embed_documents_scores_pairs_by_cosine(tokenizer):
    model, other = encoder(), encoder(seed=1)
    found = embed_documents(model, tokenizer, PAIRS, pooling=Pooling(), reference=other)
    cosines, near = [], []
    for document in PAIRS:
        mine, theirs = ([slowly(m, tokenizer, text) for text in document.pair] for m in (model, other))
        cosines.append(cosine(*mine))
        near.append(sum(cosine(a, b) for a, b in zip(mine, theirs, strict=True)) / 2)
    assert [row["cosine"] for row in found["documents"]] == pytest.approx(cosines, abs=1e-5)
    assert [row["similarity"] for row in found["documents"]] == pytest.approx(near, abs=1e-5)
    scores = [row["score"] for row in found["documents"]]
    assert scores == [float(i % 7) for i in range(18)]
    measured = [row["cosine"] for row in found["documents"]]
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(measured, scores).statistic)
    alone = embed_documents(model, tokenizer, PAIRS, pooling=Pooling())
    assert (alone["similarity"], alone["spearman"]) == (None, pytest.approx(found["spearman"]))


def test_embed_documents_truncates_to_pooling_length(tokenizer):
    long = [Document("d#0", "word " * 9), Document("d#1", "wo")]
    found = embed_documents(encoder(), tokenizer, long, pooling=Pooling(length=5), reference=encoder(seed=1))
    cut = embed_documents(
        encoder(), tokenizer, [Document("d#0", "word ")], pooling=Pooling(), reference=encoder(seed=1)
    )
    assert found["cut"] == 1
    assert found["documents"][0]["similarity"] == pytest.approx(cut["documents"][0]["similarity"], abs=1e-6)


def test_embed_documents_refuses_unfit_models(tokenizer):
    with pytest.raises(CompressError, match="sentence embeddings need a base model, this is BertForMaskedLM"):
        embed_documents(pico.model("bert"), tokenizer, DOCUMENTS, pooling=Pooling())
    with pytest.raises(CompressError, match="the embeddings have width 16, the original's 32; leave out"):
        embed_documents(encoder(hidden_size=16), tokenizer, DOCUMENTS, pooling=Pooling(), reference=encoder())


def write(folder, pooling=None, modules=None, length=None):
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling/config.json").write_text(pooling if isinstance(pooling, str) else json.dumps(pooling))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    if length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
    return folder


def test_read_pooling_of_a_checkpoint(tmp_path):
    assert read_pooling(tmp_path) == Pooling(("mean_tokens",), None)
    said = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    said |= {"pooling_mode_max_tokens": False}
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    assert read_pooling(write(tmp_path, said, modules, 256)) == Pooling(("cls_token", "mean_tokens"), 256)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, "config.json: asks for the pooling weightedmean_tokens; there are cls_token, "),
        ({"pooling": {"pooling_mode": "mean"}}, "config.json: asks for no known pooling; there are"),
        ({"pooling": "{"}, "config.json: is not JSON"),
        ({"length": 0}, "sentence_bert_config.json: has no usable `max_seq_length`"),
        ({"length": "x"}, "sentence_bert_config.json: has no usable `max_seq_length`"),
        ({"length": False}, "sentence_bert_config.json: has no usable `max_seq_length`"),
        ({"pooling": "[]"}, "config.json: is not an object"),
        ({"modules": [{"type": "sentence_transformers.models.Dense"}]}, "modules.json: has a module Dense, which is not supported"),
    ],
)  # fmt: skip
def test_read_pooling_refuses_unknown_modes(tmp_path, files, message):
    with pytest.raises(CheckpointError) as caught:
        read_pooling(write(tmp_path, **files))
    assert message in str(caught.value)
