from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import ReportError
from compress.evaluation.metrics import compare, table
from compress.evaluation.metrics.base import Resampling
from compress.evaluation.metrics.f1 import macro_f1
from compress.statistics import (
    Interval,
    accuracy_drop,
    correlation,
    documents_needed,
    median_ratio,
    rank_correlation,
    share,
)


def level(evaluation, name, **resampling):
    return table()[name].level(evaluation, Resampling(**resampling))


def increase(before, after, name, *, relative, **resampling):
    return table()[name].increase(before, after, Resampling(**resampling), relative=relative)


def drop(before, after, name, **resampling):
    return table()[name].drop(before, after, Resampling(**resampling))


def evaluation(nll, size=None, tokens=None, kl=None, agree=None, unit="document"):
    count = len(nll)
    size, tokens = size or [1000] * count, tokens or [250] * count
    rows = [
        {
            "id": f"d#{i}",
            "bytes": size[i],
            "tokens": tokens[i],
            "nll": float(nll[i]),
            "kl": None if kl is None else kl[i],
            "agree": None if agree is None else agree[i],
        }
        for i in range(count)
    ]
    return {
        "unit": unit,
        "window": 256,
        "stride": 256,
        "documents": rows,
        "bits_per_byte": 1.0,
        "perplexity": 1.0,
        "kl": None if kl is None else sum(kl),
        "agreement": None,
    }


HOW = {"confidence": 0.95, "bootstrap": 4000, "seed": 0}


@pytest.fixture
def pair():
    generator = np.random.default_rng(0)
    size = generator.integers(300, 3000, 60).tolist()
    before = np.array(size) * generator.normal(1.4, 0.1, 60)
    return evaluation(before, size), evaluation(before * generator.normal(1.03, 0.01, 60), size)


def test_increase_bounds_match_scipy_paired_bootstrap(pair):
    before, after = pair

    def relative(a, b, axis=-1):
        return b.sum(axis) / a.sum(axis) - 1

    columns = [np.array([d["nll"] for d in e["documents"]]) for e in pair]
    theirs = scipy.stats.bootstrap(
        columns,
        relative,
        paired=True,
        confidence_level=0.90,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    mine = increase(before, after, "bits_per_byte", relative=True, **HOW)
    width = theirs.high - theirs.low
    assert mine.value == pytest.approx(relative(*columns))
    assert mine.lower == pytest.approx(theirs.low, abs=0.05 * width)
    assert mine.upper == pytest.approx(theirs.high, abs=0.05 * width)


def test_increase_is_narrower_than_level_by_pairing(pair):
    before, after = pair
    paired = increase(before, after, "bits_per_byte", relative=False, **HOW)
    alone = level(after, "bits_per_byte", **HOW)
    assert paired.upper - paired.lower < 0.3 * (alone.upper - alone.lower)


@pytest.mark.slow
def test_increase_bound_has_its_coverage():
    """In about 95 of 100 draws the true increase is below the upper bound (a small sample does a little worse)."""
    generator, covered = np.random.default_rng(7), 0
    for trial in range(300):
        size = generator.integers(500, 1500, 40).tolist()
        before = np.array(size) * generator.normal(1.4, 0.1, 40)
        after = before + np.array(size) * generator.normal(0.05, 0.05, 40)
        true = 0.05 / math.log(2)
        found = increase(
            evaluation(before, size),
            evaluation(after, size),
            "bits_per_byte",
            relative=False,
            confidence=0.95,
            bootstrap=600,
            seed=trial,
        )
        covered += found.upper >= true
    assert 0.90 <= covered / 300 <= 0.985


def test_increase_and_level_of_every_metric():
    one = evaluation([100.0, 300.0], size=[100, 300], tokens=[50, 150], kl=[5.0, 5.0], agree=[50, 120])
    assert level(one, "bits_per_byte", **HOW).value == pytest.approx(1 / math.log(2))
    assert level(one, "perplexity", **HOW).value == pytest.approx(math.exp(2))
    assert level(one, "kl", **HOW).value == pytest.approx(0.05)
    assert level(one, "agreement", **HOW).value == pytest.approx(0.85)
    same = increase(one, one, "perplexity", relative=True, **HOW)
    assert (same.value, same.lower, same.upper) == (0, 0, 0)
    assert not level(evaluation([1.0, math.nan]), "bits_per_byte", **HOW).finite
    assert not level(evaluation([1.0, math.inf]), "bits_per_byte", **HOW).finite


def test_increase_repeats_for_the_same_seed(pair):
    assert increase(*pair, "bits_per_byte", relative=True, **HOW) == increase(
        *pair, "bits_per_byte", relative=True, **HOW
    )


def test_increase_refuses_unpaired_evaluations():
    one = evaluation([1.0, 2.0])
    with pytest.raises(ReportError, match="different documents"):
        increase(one, evaluation([1.0, 2.0], size=[10, 20]), "bits_per_byte", relative=True, **HOW)
    with pytest.raises(ReportError, match="differ in window: 256 and 128"):
        increase(one, {**one, "window": 128}, "bits_per_byte", relative=True, **HOW)
    with pytest.raises(ReportError, match=r"different tokens; compare bits_per_byte"):
        increase(one, evaluation([1.0, 2.0], tokens=[3, 4]), "perplexity", relative=True, **HOW)
    increase(one, evaluation([1.0, 2.0], tokens=[3, 4]), "bits_per_byte", relative=True, **HOW)
    with pytest.raises(ReportError, match="without a model to compare with"):
        level(one, "kl", **HOW)
    with pytest.raises(ReportError, match="same rounds"):
        median_ratio([1.0, 2.0], [1.0], **HOW)


def test_median_ratio_matches_definition():
    generator = np.random.default_rng(0)
    noise = generator.normal(1, 0.02, 40)
    found = median_ratio((0.1 * noise).tolist(), (0.08 * noise).tolist(), **HOW)
    assert found.value == pytest.approx(0.8)
    assert found.lower == pytest.approx(0.8, abs=0.01)
    assert found.upper == pytest.approx(0.8, abs=0.01)


@pytest.mark.slow
def test_documents_needed_would_have_decided():
    """Of four times as many documents as it says, drawn like these, the bounds decide; of a tenth of them they do not."""
    generator = np.random.default_rng(3)

    def draw(count):
        before = generator.normal(1400, 100, count)
        return evaluation(before), evaluation(before * generator.normal(1.02, 0.03, count))

    bound, found = 0.022, increase(*draw(40), "bits_per_byte", relative=True, **HOW)
    assert found.lower < bound < found.upper
    needed = documents_needed(
        Interval(0.02, 0.02 + (found.lower - found.value), 0.02 + (found.upper - found.value), 40), bound
    )
    assert needed is not None
    assert needed > 40
    many = increase(*draw(4 * needed), "bits_per_byte", relative=True, **HOW)
    assert many.upper <= bound
    few = increase(*draw(needed // 10), "bits_per_byte", relative=True, **HOW)
    assert few.lower < bound < few.upper


def test_documents_needed_matches_formula():
    assert documents_needed(Interval(0.03, 0.02, 0.04, 40), 0.03) is None
    assert documents_needed(Interval(0.03, 0.02, 0.04, 40), 0.03 + 1e-9) is None
    assert documents_needed(Interval(0.02, 0.01, 0.03, 40), 0.025) == 160
    assert documents_needed(Interval(0.03, 0.02, 0.04, 40), 0.025) == 160


def test_compare_lists_shared_metrics(pair):
    found = compare(*pair, confidence=0.9, bootstrap=500)
    assert found["units"] == 60
    assert found["bits_per_byte"]["lower"] < found["bits_per_byte"]["increase"] < found["bits_per_byte"]["upper"]
    assert "kl" not in found


# --- labelled texts


def classification(truth, said, labels=2, kl=None, agree=None):
    rows = [
        {"id": f"d#{i}", "label": int(t), "prediction": int(p), "nll": 0.5, "kl": kl, "agree": agree}
        for i, (t, p) in enumerate(zip(truth, said, strict=True))
    ]
    names = [str(label) for label in range(labels)]
    shown = {"accuracy": 0.0, "f1": 0.0, "kl": kl, "agreement": agree}
    return {"unit": "example", "labels": names, "documents": rows, **shown}


@pytest.mark.parametrize("of", [1, 2, 7, 40, 1000])
def test_share_bounds_match_scipy(of):
    for count in sorted({0, 1, of // 3, of - 1, of}):
        found = share(count, of, 0.95)
        theirs = scipy.stats.binomtest(count, of).proportion_ci(0.90, method="exact")
        assert (found.value, found.units) == (count / of, of)
        assert found.lower == pytest.approx(theirs.low, abs=1e-9)
        assert found.upper == pytest.approx(theirs.high, abs=1e-9)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
@pytest.mark.parametrize("texts", [1, 4, pytest.param(13, marks=pytest.mark.slow)])
def test_accuracy_drop_bounds_cover_by_enumeration(texts, confidence):
    """Every outcome with its probability, over a grid of all true rates: each bound holds at least as often as it says."""
    outcomes = [(lost, won) for lost in range(texts + 1) for won in range(texts + 1 - lost)]
    found = [accuracy_drop(lost, won, texts, confidence) for lost, won in outcomes]
    lower, upper = (np.array([getattr(i, key) for i in found]) for key in ("lower", "upper"))
    ways = [math.comb(texts, b) * math.comb(texts - b, c) for b, c in outcomes]
    least = 1.0
    for p in np.linspace(0, 1, 41):
        for q in np.linspace(0, 1 - p, 41):
            true, rest = 100 * (p - q), max(1 - p - q, 0)
            chances = np.array(
                [w * p**b * q**c * rest ** (texts - b - c) for w, (b, c) in zip(ways, outcomes, strict=True)]
            )
            assert chances.sum() == pytest.approx(1)
            covered = [chances[lower <= true + 1e-3].sum(), chances[upper >= true - 1e-3].sum()]
            assert min(covered) >= confidence - 1e-3, (p, q)
            least = min(least, *covered)
    if texts == 13:
        assert least < confidence + 0.01  # and hardly more often


@pytest.mark.slow
def test_accuracy_drop_bounds_near_normal_approximation():
    """On many texts they are near those of the normal approximation."""
    for lost, won, texts in ((25, 15, 872), (300, 200, 5000), (60, 5, 1000)):
        found = accuracy_drop(lost, won, texts, 0.95)
        mean = (lost - won) / texts
        margin = 1.645 * math.sqrt(((lost + won) / texts - mean**2) / texts)
        assert [found.lower, found.upper] == pytest.approx(
            [100 * (mean - margin), 100 * (mean + margin)], abs=20 * margin
        )
        turned = accuracy_drop(won, lost, texts, 0.95)
        assert (turned.lower, turned.upper) == (-found.upper, -found.lower)
    assert accuracy_drop(0, 0, 872, 0.95).upper == pytest.approx(100 * 3 / 872, rel=0.02)  # the rule of three


def test_accuracy_drop_counts_discordant_texts():
    truth = [0] * 50 + [1] * 50
    before = [0] * 40 + [1] * 10 + [1] * 50  # right but for ten
    after = [1] * 8 + [0] * 32 + [0] * 3 + [1] * 7 + [1] * 50  # eight lost, three won
    found = drop(classification(truth, before), classification(truth, after), "accuracy", **HOW)
    assert (found.value, found.units) == (pytest.approx(5), 100)
    assert found == accuracy_drop(8, 3, 100, 0.95)
    assert found.lower < 0 < found.upper


def slow_f1(truth, said):
    """By its definition: harmonic mean of precision and recall, label by label."""
    scores = []
    for label in {*truth, *said}:
        hits = sum(a == b == label for a, b in zip(truth, said, strict=True))
        precision, recall = hits / max(said.count(label), 1), hits / max(truth.count(label), 1)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


def test_macro_f1_and_drop_match_slow_twin():
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 200).tolist()
    one, two = (
        np.where(generator.random(200) < right, truth, generator.integers(0, 4, 200)).tolist() for right in (0.8, 0.6)
    )
    before, after = (classification(truth, said, labels=5) for said in (one, two))
    assert macro_f1(before["documents"], 5) == pytest.approx(slow_f1(truth, one))
    assert level(before, "f1", **HOW).value == pytest.approx(slow_f1(truth, one))
    found = drop(before, after, "f1", **HOW)
    assert found.value == pytest.approx(100 * (slow_f1(truth, one) - slow_f1(truth, two)))
    draws = []
    for _ in range(2000):
        picks = generator.integers(0, 200, 200)
        t, a, b = ([column[i] for i in picks] for column in (truth, one, two))
        draws.append(100 * (slow_f1(t, a) - slow_f1(t, b)))
    assert [found.lower, found.upper] == pytest.approx(np.quantile(draws, [0.05, 0.95]).tolist(), abs=0.7)


def test_level_of_labelled_texts():
    one = classification([0, 1] * 20, [0, 1] * 15 + [1, 0] * 5, kl=0.25, agree=1)
    assert level(one, "accuracy", **HOW) == share(30, 40, 0.95)
    assert level(one, "agreement", **HOW) == share(40, 40, 0.95)
    assert level(one, "agreement", **HOW).lower < 1
    assert level(one, "kl", **HOW).value == pytest.approx(0.25)
    assert set(compare(one, one, confidence=0.9)) >= {"accuracy", "f1", "kl", "agreement"}
    with pytest.raises(ReportError, match="without a model to compare with"):
        level(classification([0], [0]), "agreement", **HOW)


def test_drop_refuses_unpaired_labelled_texts():
    one = classification([0, 1], [0, 1])
    with pytest.raises(ReportError, match="different documents"):
        drop(one, classification([0, 0], [0, 1]), "accuracy", **HOW)
    with pytest.raises(ReportError, match="differ in labels"):
        drop(one, classification([0, 1], [0, 1], labels=3), "accuracy", **HOW)
    with pytest.raises(ReportError, match="differ in unit: document and example"):
        drop(evaluation([1.0, 2.0]), one, "accuracy", **HOW)


# --- sentence embeddings


def embeddings(cosines, scores, near=None):
    near = near or [None] * len(cosines)
    rows = [
        {"id": f"d#{i}", "similarity": n, "cosine": float(c), "score": float(s)}
        for i, (c, s, n) in enumerate(zip(cosines, scores, near, strict=True))
    ]
    return {"unit": "example", "pooling": ["mean_tokens"], "documents": rows, "spearman": 0.0, "similarity": near[0]}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=3, max_size=30))
def test_rank_correlation_matches_scipy(rows):
    """Of pairs with ties; pairs that are drawn several times count as if they stood there so often."""
    first, second = ([float(row[i]) for row in rows] for i in (0, 1))
    if len({*first}) > 1 < len({*second}):
        assert rank_correlation(first, second) == pytest.approx(
            scipy.stats.spearmanr(first, second).statistic, abs=1e-9
        )
    else:
        assert rank_correlation(first, second) == 0
    counts = [row[2] for row in rows]
    repeated = [[v for v, n in zip(values, counts, strict=True) for _ in range(n)] for values in (first, second)]
    if sum(counts):
        found = correlation(np.array(first), np.array(second))(np.array(counts, dtype=float)[:, None])
        assert float(found[0]) == pytest.approx(rank_correlation(*repeated), abs=1e-9)


def test_rank_correlation_drop_bounds_match_scipy_paired_bootstrap():
    generator = np.random.default_rng(5)
    scores = generator.integers(0, 6, 80)
    one, two = (scores / 5 + generator.normal(0, noise, 80) for noise in (0.3, 0.6))
    before, after = embeddings(one, scores), embeddings(two, scores)
    found = drop(before, after, "spearman", **HOW)

    def statistic(a, b, c, axis=-1):
        a, b, c = (scipy.stats.rankdata(x, axis=axis) for x in (a, b, c))
        return 100 * (scipy.stats.pearsonr(a, c, axis=axis).statistic - scipy.stats.pearsonr(b, c, axis=axis).statistic)

    theirs = scipy.stats.bootstrap(
        (one, two, scores), statistic, paired=True, confidence_level=0.9, method="percentile",
        n_resamples=1000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert found.value == pytest.approx(statistic(one, two, scores))
    assert [found.lower, found.upper] == pytest.approx([theirs.low, theirs.high], abs=0.1 * width)
    alone = level(after, "spearman", **HOW)
    assert alone.lower < alone.value == rank_correlation(two, scores) < alone.upper


def test_level_of_similarity_is_a_mean():
    near = np.random.default_rng(0).normal(0.97, 0.01, 50).tolist()
    found = level(embeddings(near, near, near), "similarity", **HOW)
    assert found.value == pytest.approx(np.mean(near))
    assert found.upper - found.lower == pytest.approx(2 * 1.645 * np.std(near) / math.sqrt(50), rel=0.1)
    assert set(compare(embeddings(near, near), embeddings(near, near, near), confidence=0.9)) >= {
        "spearman",
        "similarity",
    }
    with pytest.raises(ReportError, match="without a model to compare with"):
        level(embeddings(near, near), "similarity", **HOW)
    assert not level(embeddings([math.nan, 1, 2], [1, 2, 3]), "spearman", **HOW).finite
    with pytest.raises(ReportError, match="different documents"):
        drop(embeddings(near, near), embeddings(near, [0.0] * 50), "spearman", **HOW)
