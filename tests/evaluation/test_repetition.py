"""The loss on passages that come again, against a loop of single tokens through a stock model, and its gate."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.data.documents import Document
from compress.errors import CompressError, DataError
from compress.evaluation.metrics.base import Resampling
from compress.evaluation.metrics.repetition import Repetition
from compress.evaluation.repetition import measure_repetition
from compress.evaluation.repetition_settings import RepetitionSettings
from tests import pico

TEXT = "It was the best of times, it was the worst of times, über alles: it was the age of wisdom. " * 6
DOCUMENTS = [Document("a", TEXT[:200]), Document("b", TEXT[200:])]


def settings(**given):
    return RepetitionSettings(**{"distances": (12, 24), "passage": 8, "samples": 12, **given})


def by_hand(model, tokenizer, samples, distance, length):
    """Losses of the repeated tokens but the first, one forward pass for each."""
    stream = [token for d in DOCUMENTS for token in tokenizer(d.text, add_special_tokens=False)["input_ids"]]
    step = (len(stream) - 24) // (samples - 1)
    for number in range(samples):
        start = number * step
        ids = [tokenizer.bos_token_id, *stream[start : start + distance], *stream[start : start + length]]
        nll = 0.0
        for target in range(len(ids) - length + 1, len(ids)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[:target]])).logits[0, -1].double()
            nll -= float(logits.log_softmax(-1)[ids[target]])
        yield nll


def test_repetition_matches_a_loop_over_single_tokens():
    model, other, tokenizer = pico.model("llama"), pico.model("llama", seed=1), pico.tokenizer()
    measured = measure_repetition(model, tokenizer, DOCUMENTS, settings(), window=64, reference=other)
    assert measured["passage"] == 8
    for row, distance in zip(measured["distances"], (12, 24), strict=True):
        assert row["distance"] == distance
        expected = list(by_hand(model, tokenizer, 12, distance, 8))
        assert [sample["nll"] for sample in row["samples"]] == pytest.approx(expected, rel=1e-5)
        assert row["nats_per_token"] == pytest.approx(sum(expected) / 12 / 7)
        assert row["kl"] > 0
        assert {sample["tokens"] for sample in row["samples"]} == {7}
    same = measure_repetition(model, tokenizer, DOCUMENTS, settings(), window=64, reference=model)["distances"][0]
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["agreement"] == 1
    alone = measure_repetition(model, tokenizer, DOCUMENTS, settings(), window=64)["distances"][0]
    assert (alone["kl"], alone["agreement"]) == (None, None)


def test_distances_follow_from_window_and_passage():
    assert RepetitionSettings().fitted(2048) == (128, (128, 256, 512, 1024))
    assert RepetitionSettings().fitted(256) == (128, (128,))
    assert RepetitionSettings().fitted(32) == (16, (16,))
    assert RepetitionSettings(distances=(300, 64)).fitted(256) == (64, (64, 300))
    assert RepetitionSettings(passage=100).fitted(1000) == (100, (128, 256, 512))
    with pytest.raises(
        CompressError, match="a passage of 100 tokens does not come twice at a power of two in a window of 200"
    ):
        RepetitionSettings(passage=100).fitted(200)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distances": [64, 64]}, "the distance 64 is named twice"),
        ({"distances": [32], "passage": 33}, "a passage of 33 tokens would not end within a distance of 32"),
        ({"distances": [49], "passage": 16}, "takes 65 positions, the model has 64\n   name `distances` up to 48"),
        (
            {"distances": [48], "passage": 16, "samples": 10_000},
            r"need 160,032; give more text, or set fewer `samples`",
        ),
        ({"distances": []}, "distances"),
        ({"distance": [16]}, "distance"),
    ],
)
def test_repetitions_that_cannot_be_measured_are_refused_before_the_work(given, message, tmp_path):
    with pytest.raises(CompressError, match=message):
        compress.run(recipe(tmp_path, given))
    assert not list(tmp_path.rglob("*.safetensors"))


def recipe(tmp_path, given, **more):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return {
        "model": str(pico.folder("llama")),
        "output": str(tmp_path / "out"),
        "data": {"evaluation": {"files": [str(text)], "window": 32}},
        "passes": [{"cast": {"weights": "bf16"}}],
        "evaluate": ["bits_per_byte", {"repetition": given}],
        **more,
    }


def test_repetition_is_in_the_report_with_intervals_and_cached(tmp_path):
    given = {"distances": [12, 24], "passage": 8, "samples": 12}
    report = compress.run(recipe(tmp_path, given)).report
    before, after = (report[side]["evaluation"] for side in ("original", "result"))
    assert before["repetition"] == pytest.approx(
        sum(row["nats_per_token"] for row in before["repetitions"]["distances"]) / 2
    )
    assert after["repetitions"]["distances"][0]["kl"] > 0
    text = (tmp_path / "out.run/report.md").read_text(encoding="utf-8")
    assert "| repetition at 12 |" in text
    metric, resampling = Repetition(), Resampling()
    level = metric.level(after, resampling)
    assert (level.value, level.units) == (pytest.approx(after["repetition"]), 12)
    assert level.lower < level.value < level.upper
    increase = metric.increase(before, after, resampling, relative=False)
    assert increase.value == pytest.approx(after["repetition"] - before["repetition"])
    assert increase.upper - increase.lower < level.upper - level.lower  # paired
    longer = compress.run(recipe(tmp_path, {**given, "distances": [20]}, output=str(tmp_path / "out"))).report
    assert [row["distance"] for row in longer["result"]["evaluation"]["repetitions"]["distances"]] == [20]


def test_text_too_short_for_repetitions_is_refused():
    with pytest.raises(DataError, match=r"the evaluation text has \d+ tokens, and 90 passages of 8"):
        measure_repetition(pico.model("llama"), pico.tokenizer(), DOCUMENTS, settings(samples=90), window=64)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (
            {"repetition": {"at": 16, "max": 1}},
            r"needs the distance 16, which is not measured\n.*write in evaluate: `- repetition: {distances: \[12, 16\]}`",
        ),
        (
            {"bits_per_byte": {"from_position": 32, "max": 1}},
            "no token is predicted at position 32 or later in windows of 32",
        ),
        (
            {"kl": {"from_position": 20, "max": 1}},
            "losses are summed from powers of two on, 16 the smallest, and 20 is none",
        ),
        ({"repetition": {"at": 12}}, "a gate needs a bound: `max` or `max_increase`"),
    ],
)
def test_gates_at_places_that_are_not_measured_are_refused(gates, message, tmp_path):
    with pytest.raises(CompressError, match=message):
        compress.run(recipe(tmp_path, {"distances": [12]}, gates=gates))


def test_gates_from_a_position_need_a_causal_model_and_long_documents(tmp_path):
    gates = {"kl": {"from_position": 16, "max": 100}}
    asked = recipe(tmp_path, {"distances": [12]}, evaluate=["kl"], gates=gates)
    with pytest.raises(
        CompressError, match="only causal language models have a loss by position, and BertForMaskedLM is"
    ):
        compress.run({**asked, "model": str(pico.folder("bert"))})
    (tmp_path / "text.txt").write_text("a\n<|doc|>\nshort text", encoding="utf-8")
    with pytest.raises(DataError, match=r"the longest document .* has 1\d tokens, so none is predicted at position 16"):
        compress.run({**asked, "document_separator": "<|doc|>"})


@pytest.mark.slow
def test_a_run_is_judged_at_a_distance_and_from_a_position(tmp_path):
    gates = {
        "repetition": {"at": 12, "max_increase": 1000},
        "bits_per_byte": [{"max_increase": "1000%"}, {"from_position": 16, "max_increase": "1000%"}],
    }
    given = {"distances": [12, 24], "passage": 8, "samples": 12}
    report = compress.run(recipe(tmp_path, given, gates=gates)).report
    assert [(row["gate"], row["verdict"]) for row in report["gates"]] == [
        ("bits_per_byte.max_increase", "pass"),
        ("bits_per_byte.max_increase from 16", "pass"),
        ("repetition.max_increase at 12", "pass"),
    ]
