from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from compress.errors import ReportError
from compress.gates import judge, verdict
from tests.test_statistics import classification, evaluation


def side(nll=None, size=1000, parameters=500, *, kl=None, agree=None, latency=None):
    found = None if nll is None else evaluation(nll, kl=kl, agree=agree)
    if found is not None:
        found |= {
            "bits_per_byte": 1.0,
            "perplexity": 1.0,
            "kl": 1.0 if kl else None,
            "agreement": 1.0 if agree else None,
        }
    return {"size": {"bytes": size, "parameters": parameters}, "evaluation": found, "latency": latency}


def row(length, *, prefill=None, peak=100):
    """A row of `latency.lengths`."""
    timing = None if prefill is None else {"samples": prefill}
    return {"length": length, "prefill": timing, "decode": None, "memory": {"peak": peak}}


def cached(full, windowed=0, tokens=None):
    """A side with parts of a cache: bytes per token of full blocks, and of those that keep so many tokens."""
    parts = [{"bytes_per_token": full, "tokens": None}, {"bytes_per_token": windowed, "tokens": tokens}]
    return {"size": {"cache": parts}, "evaluation": None, "latency": None}


@pytest.mark.parametrize(
    ("gate", "expected", "text"),
    [
        ({"at": 100, "max_ratio": 0.8}, "pass", "× 0.750 (1.00 kB ▶ 750 B) ≤ × 0.800"),
        ({"at": 100, "max_ratio": 0.74}, "fail", "× 0.750 (1.00 kB ▶ 750 B) not ≤ × 0.740"),
        ({"at": 50, "max_ratio": 0.99}, "fail", "× 1.00 (500 B ▶ 500 B) not ≤ × 0.990"),
        ({"at": 100, "max": 750}, "pass", "750 B ≤ 750 B"),
        ({"at": 1000, "max": 5000}, "fail", "5.25 kB not ≤ 5.00 kB"),
    ],
)
def test_cache_gate_is_exact(gate, expected, text):
    (found,) = judge({"cache": gate}, cached(10), cached(5, 5, 50))
    assert (found.verdict, found.text, found.lower) == (expected, text, None)
    assert found.gate == f"cache.{'max' if 'max' in gate else 'max_ratio'} at {gate['at']:,}"


def test_cache_gate_needs_a_known_cache():
    with pytest.raises(ReportError, match=r"`cache\.max at 5` needs cache, which was not measured"):
        judge({"cache": {"at": 5, "max": 1}}, side(), side())


def test_gates_at_a_length_read_its_row():
    random = np.random.default_rng(0)
    before, after = (list(x * random.normal(1, 0.01, 12)) for x in (1.0, 0.5))
    sides = [
        {"latency": {"lengths": [row(64, prefill=[1.0] * 12), row(512, prefill=samples, peak=peak)], "not_tried": []}}
        for samples, peak in ((before, 100), (after, 60))
    ]
    gates = {
        "prefill": [{"at": 64, "max_ratio": 0.9}, {"at": 512, "max_ratio": 0.9}],
        "memory": {"at": 512, "max_ratio": 0.6},
    }
    found = judge(gates, *sides)
    assert [(r.gate, r.verdict) for r in found] == [
        ("prefill.max_ratio at 64", "fail"),
        ("prefill.max_ratio at 512", "pass"),
        ("memory.max_ratio at 512", "pass"),
    ]
    with pytest.raises(ReportError, match="needs a prompt of 99 tokens, which was not measured"):
        judge({"prefill": {"at": 99, "max_ratio": 1}}, *sides)
    sides[1]["latency"]["not_tried"] = [{"length": 8192, "reason": "may need 9 GB of memory, 1 GB are left"}]
    (found,) = judge({"prefill": {"at": 8192, "max_ratio": 1}}, *sides)
    assert (found.verdict, found.text) == (
        "inconclusive",
        "a prompt of 8,192 tokens was not tried: it may need 9 GB of memory, 1 GB are left",
    )


GENERATOR = np.random.default_rng(0)
BEFORE = GENERATOR.normal(1000, 100, 40)
AFTER = BEFORE * GENERATOR.normal(1.03, 0.01, 40)  # 3 % worse, give or take 0.3


def increase(value, relative=True):
    return {"bits_per_byte": {"max_increase": {"value": value, "relative": relative}}}


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ({"size": {"max": 600}}, "pass"),
        ({"size": {"max": 599}}, "fail"),
        ({"size": {"max_ratio": 0.6}}, "pass"),
        ({"size": {"max_ratio": 0.59}}, "fail"),
        ({"parameters": {"max": 250}}, "pass"),
        ({"parameters": {"max_ratio": 0.49}}, "fail"),
        (increase(0.05), "pass"),
        (increase(0.01), "fail"),
        (increase(0.032), "inconclusive"),
        (increase(0.1, relative=False), "pass"),
        (increase(0.01, relative=False), "fail"),
        ({"perplexity": {"max_increase": {"value": 0.5, "relative": True}}}, "pass"),
        ({"bits_per_byte": {"max": 2.0}}, "pass"),
        ({"bits_per_byte": {"max": 1.0}}, "fail"),
        ({"kl": {"max": 0.05}}, "pass"),
        ({"kl": {"max": 0.03}}, "fail"),
        ({"agreement": {"min": 0.75}}, "pass"),
        ({"agreement": {"min": 0.85}}, "fail"),
        ({"agreement": {"min": 0.80}}, "inconclusive"),
        ({"agreement": {"max_drop": 25}}, "pass"),
        ({"agreement": {"max_drop": 15}}, "fail"),
        ({"prefill": {"max_ratio": 0.9}}, "pass"),
        ({"prefill": {"max_ratio": 0.7}}, "fail"),
        ({"prefill": {"max_ratio": 0.8}}, "inconclusive"),
        ({"decode": {"max_ratio": 2}}, "pass"),
        ({"memory": {"max_ratio": 0.5}}, "pass"),
        ({"memory": {"max_ratio": 0.4}}, "fail"),
    ],
)
def test_judge_gives_verdicts(gates, expected):
    noise = np.random.default_rng(1).normal(1, 0.05, (2, 20))
    timing = [
        {"prefill": {"samples": (s * n).tolist()}, "decode": {"samples": (s * n).tolist()}, "memory": {"peak": m}}
        for s, m, n in ((1.0, 200, noise[0]), (0.8, 100, noise[1]))
    ]
    agree = np.random.default_rng(2).integers(190, 211, 40).tolist()
    first = side(BEFORE, latency=timing[0])
    last = side(AFTER, 600, 250, kl=[10.0 + i % 2 for i in range(40)], agree=agree, latency=timing[1])
    (result,) = judge(gates, first, last)
    assert result.verdict == expected, result
    ((name, bounds),) = gates.items()
    assert result.gate == f"{name}.{next(iter(bounds))}"
    assert (result.documents_needed is not None) == (expected == "inconclusive"), result
    if result.lower is not None:
        assert result.lower <= result.value <= result.upper
    exit_status = {"pass": ("passed", 0), "fail": ("failed", 1), "inconclusive": ("inconclusive", 3)}[expected]
    assert verdict([result]) == exit_status


TRUTH = [0, 1] * 100
RIGHT = TRUTH[:180] + [1, 0] * 10  # 90 %


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        ({"accuracy": {"max_drop": 7}}, "pass"),
        ({"accuracy": {"max_drop": 0.1}}, "fail"),
        ({"accuracy": {"max_drop": 3}}, "inconclusive"),
        ({"accuracy": {"min": 0.8}}, "pass"),
        ({"accuracy": {"min": 0.95}}, "fail"),
        ({"accuracy": {"min": 0.87}}, "inconclusive"),
        ({"f1": {"max_drop": 8}}, "pass"),
        ({"f1": {"max_drop": 0.1}}, "fail"),
        ({"f1": {"max_drop": 3}}, "inconclusive"),
        ({"f1": {"min": 0.8}}, "pass"),
        ({"f1": {"min": 0.95}}, "fail"),
        ({"agreement": {"min": 0.9}}, "pass"),
        ({"agreement": {"max_drop": 1}}, "fail"),
    ],
)
def test_judge_gives_verdicts_on_labelled_texts(gates, expected):
    first, last = side(), side()
    worse = [1 - said for said in RIGHT[:8]] + RIGHT[8:199] + [TRUTH[199]]  # eight lost, one won: 3.5 points
    first["evaluation"] = {**classification(TRUTH, RIGHT), "accuracy": 0.9, "f1": 0.9}
    last["evaluation"] = {**classification(TRUTH, worse, agree=1, kl=0.0), "accuracy": 0.865, "f1": 0.865}
    for row, was in zip(last["evaluation"]["documents"], RIGHT, strict=True):
        row["agree"] = int(row["prediction"] == was)
    (result,) = judge(gates, first, last)
    assert result.verdict == expected, result
    assert result.lower <= result.value <= result.upper
    if gates == {"accuracy": {"max_drop": 7}}:
        assert result.value == pytest.approx(3.5)
        assert result.text == "3.50 points (between 1.02 points and 6.55 points) ≤ 7.00 points"
    last["evaluation"]["documents"][0]["nll"] = math.nan
    assert verdict(judge(gates, first, last)) == ("failed", 1)


def test_judge_says_documents_needed_when_inconclusive():
    (result,) = judge(increase(0.032), side(BEFORE), side(AFTER))
    assert result.verdict == "inconclusive"
    assert f"about {result.documents_needed:,} documents would decide" in result.text
    assert result.documents_needed > 40


def test_verdict_is_failure_when_others_are_inconclusive():
    results = judge({"size": {"max": 1}, **increase(0.032)}, side(BEFORE), side(AFTER))
    assert verdict(results) == ("failed", 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "gates", [increase(10.0), {"bits_per_byte": {"max": 1e9}}, {"agreement": {"min": 0.0}}, {"size": {"max": 10**9}}]
)
def test_judge_fails_on_nan(gates, bad):
    after = [*AFTER[:-1], bad]
    results = judge(gates, side(BEFORE), side(after, kl=[0.0] * 40, agree=[250] * 40))
    assert verdict(results) == ("failed", 1)
    assert results[-1].verdict == "fail"


def test_judge_fails_on_nan_of_the_original():
    assert verdict(judge(increase(10.0), side([math.nan, *BEFORE[1:]]), side(AFTER)))[0] == "failed"


def test_judge_is_inconclusive_when_documents_are_very_few():
    (result,) = judge(increase(0.05), side(BEFORE[:9]), side(BEFORE[:9]))
    assert result.verdict == "inconclusive"
    assert "9 documents are too few to tell; give 10 or more" in result.text


@pytest.mark.parametrize("gate", ["bits_per_byte", "kl", "prefill", "memory"])
def test_judge_refuses_what_was_not_measured(gate):
    bound = (
        {"max_increase": {"value": 0.1, "relative": True}}
        if gate == "bits_per_byte"
        else {"max": 1}
        if gate == "kl"
        else {"max_ratio": 1}
    )
    with pytest.raises(ReportError, match=f"the gate `{gate}.* needs .*, which was not measured"):
        judge({gate: bound}, side(), side())


def test_gates_import_no_torch():
    code = "import sys, compress.gates, compress.statistics; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def positioned(near, far):
    """A side whose documents have 50 tokens at positions 0 to 15 and 50 at 16 to 31."""
    rows = [
        {
            "id": f"d#{i}",
            "bytes": 400,
            "tokens": 100,
            "nll": x + y,
            "kl": None,
            "agree": None,
            "positions": {"tokens": [50, 50], "bytes": [200, 200], "nll": [x, y], "kl": None, "agree": None},
        }
        for i, (x, y) in enumerate(zip(near, far, strict=True))
    ]
    return {
        "evaluation": {"schema": "compress.evaluation/1", "unit": "document", "documents": rows, "bits_per_byte": 1.0}
    }


def test_gates_count_the_tokens_from_a_position_on():
    near, far = [100.0 + i for i in range(20)], [90.0 + i % 3 for i in range(20)]
    sides = positioned(near, far), positioned(near, [1.1 * x for x in far])
    gate = {"max_increase": {"value": 0.07, "relative": True}}
    whole, tail = judge({"bits_per_byte": [gate, {"from_position": 16, **gate}]}, *sides)
    assert (whole.gate, whole.verdict) == ("bits_per_byte.max_increase", "pass")
    assert (tail.gate, tail.verdict) == ("bits_per_byte.max_increase from 16", "fail")
    assert tail.value == pytest.approx(0.1)
    with pytest.raises(ReportError, match="no token was scored at position 32 or later"):
        judge({"bits_per_byte": {"from_position": 32, **gate}}, *sides)


def repeated(*losses):
    """A side with the losses of 12 passages of 10 tokens at the distances 64, 128, …."""
    rows = [
        {"distance": 64 << i, "samples": [{"tokens": 10, "nll": 10 * loss + n / 10, "kl": None} for n in range(12)]}
        for i, loss in enumerate(losses)
    ]
    evaluation = {"schema": "compress.evaluation/1", "unit": "chunk", "documents": [], "repetition": 1.0}
    return {"evaluation": {**evaluation, "repetitions": {"passage": 11, "seen_once": 4.0, "distances": rows}}}


def test_gates_on_repetition_judge_a_distance_or_the_mean():
    sides = repeated(0.2, 0.2), repeated(0.2, 3.0)
    absolute = {"max_increase": {"value": 0.5, "relative": False}}
    gates = {"repetition": [{"at": 64, **absolute}, {"at": 128, **absolute}, absolute, {"at": 64, "max": 0.3}]}
    near, far, mean, level = judge(gates, *sides)
    assert [result.verdict for result in (near, far, mean, level)] == ["pass", "fail", "fail", "pass"]
    assert far.gate == "repetition.max_increase at 128"
    assert (far.value, mean.value) == (pytest.approx(2.8), pytest.approx(1.4))
    assert level.unit == "nats"
    with pytest.raises(ReportError, match="repetition was not measured at the distance 256; measured: 64, 128"):
        judge({"repetition": {"at": 256, "max": 1}}, *sides)
