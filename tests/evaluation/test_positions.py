"""Loss by position against a loop over single targets, and its intervals."""

from __future__ import annotations

import math

import pytest
import torch

from compress.data.documents import Document
from compress.errors import ReportError
from compress.evaluation import positions
from compress.evaluation.language import score_documents
from compress.evaluation.metrics import table
from compress.evaluation.metrics.base import Resampling
from compress.report import figures
from tests import pico

WINDOW = 48
TEXT = "Größe und Länge, a small text of a few words; " * 6


@pytest.fixture(scope="module")
def model():
    return pico.model("llama")


@pytest.fixture(scope="module")
def other():
    torch.manual_seed(5)
    model = pico.model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    return model


def test_bins_begin_at_powers_of_two():
    firsts = [positions.first_position(number) for number in range(6)]
    assert firsts == [0, 16, 32, 64, 128, 256]
    for position in range(300):
        number = positions.bin_of(position)
        assert firsts[number] <= position
        assert number == 5 or position < firsts[number + 1]
    assert list(positions.spans(10, 70)) == [(0, 10, 16), (1, 16, 32), (2, 32, 64), (3, 64, 70)]
    assert [p for p in range(70) if positions.is_edge(p)] == [16, 32, 64]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("stride", [48, 20])
def test_sums_by_position_match_a_loop_over_targets(model, begins, stride):
    tokenizer = pico.tokenizer(begins=begins)
    documents = [Document(f"d#{i}", TEXT[i:]) for i in range(3)] + [Document("short", "ab")]
    scored = score_documents(model, tokenizer, documents, window=WINDOW, stride=stride).to_dict()
    expected = {}
    for document in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
        done, start = 1, 0
        while done < len(ids):
            lead = [tokenizer.bos_token_id] if begins and start else []
            end = min(start + WINDOW - len(lead), len(ids) - 1)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([lead + ids[start:end]])).logits[0].double().log_softmax(-1)
            for target in range(done, end + 1):
                position = len(lead) + target - start - 1
                number = max(0, position.bit_length() - 4)
                counts = expected.setdefault(number, [0, 0.0])
                counts[0] += 1
                counts[1] -= float(logits[position, ids[target]])
            done, start = max(done, end + 1), min(start + stride, end)
    assert [row["from"] for row in scored["positions"]] == [0, 16, 32]
    for row in scored["positions"]:
        tokens, nats = expected[positions.bin_of(row["from"])]
        assert row["tokens"] == tokens
        assert row["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / row["bytes"], rel=1e-5)
    assert sum(row["bytes"] for row in scored["positions"]) == sum(len(d.text.encode()) for d in documents)
    for row in scored["documents"]:
        assert {key: sum(row["positions"][key]) for key in ("tokens", "bytes", "nll")} == {
            key: row[key] for key in ("tokens", "bytes", "nll")
        }


def test_paired_positions_have_the_intervals_of_their_tokens(model, other):
    tokenizer, documents = pico.tokenizer(), [Document(f"d#{i}", TEXT[i : 120 + i]) for i in range(40)]
    how = {"window": WINDOW, "stride": WINDOW}
    before = score_documents(model, tokenizer, documents, **how).to_dict()
    after = score_documents(other, tokenizer, documents, **how, reference=model).to_dict()
    rows = positions.paired(before, after, Resampling())
    assert [row["from"] for row in rows] == [0, 16, 32]
    for row, x, y in zip(rows, before["positions"], after["positions"], strict=True):
        assert row["bits_per_byte"] == [x["bits_per_byte"], y["bits_per_byte"]]
        assert row["increase"] == pytest.approx(y["bits_per_byte"] / x["bits_per_byte"] - 1)
        assert row["lower"] < row["increase"] < row["upper"]
        assert row["kl"] == y["kl"] > 0
    cells = figures.position_rows({"positions": rows, "evaluation": after})
    assert [cell[0] for cell in cells] == ["0 to 15", "16 to 31", "32 to 63"]
    assert len(cells[0]) == len(figures.position_head({"positions": rows}))


def test_beyond_a_position_every_metric_of_tokens_is_that_of_the_rest(model, other):
    tokenizer, documents = pico.tokenizer(), [Document("d#0", TEXT), Document("short", "ab")]
    scored = score_documents(other, tokenizer, documents, window=WINDOW, stride=WINDOW, reference=model).to_dict()
    rest, bins = positions.beyond(scored, 16), scored["positions"][1:]
    assert all(row["id"] != "short.0" for row in rest["documents"])
    tokens, size = (sum(row[key] for row in bins) for key in ("tokens", "bytes"))
    for name, weight in (("kl", "tokens"), ("agreement", "tokens"), ("bits_per_byte", "bytes")):
        mean = sum(row[name] * row[weight] for row in bins) / (size if weight == "bytes" else tokens)
        assert table()[name].value(rest) == pytest.approx(mean)
        assert table()[name].level(rest, Resampling()).value == pytest.approx(mean)
    with pytest.raises(ReportError, match="no token was scored at position 64 or later; give longer documents"):
        positions.beyond(scored, 64)
    del scored["documents"][0]["positions"]
    with pytest.raises(ReportError, match="no sums by position"):
        positions.beyond(scored, 16)
    assert positions.by_position(scored["documents"]) == []
