"""Reports and baselines that somebody wrote or damaged: one line, status 2, whatever is in them."""

from __future__ import annotations

import contextlib
import copy
import json
import random

import pytest

import compress
from compress.pipeline.baseline import EvaluationSettings
from compress.pipeline.evaluate import evaluate


@pytest.fixture(scope="module")
def documents(tmp_path_factory, pico_llama, texts):
    """A report with measured text, and a baseline of `eval --json`."""
    folder = tmp_path_factory.mktemp("documents")
    data = {"evaluation": {"files": [str(texts[1])], "window": 32, "max_documents": 4}}
    recipe = {
        "model": str(pico_llama),
        "output": str(folder / "out"),
        "document_separator": "<|doc|>",
        "passes": [{"cast": {"weights": "bf16"}}],
        "data": data,
        "evaluate": ["bits_per_byte", "kl"],
        "bootstrap": 100,
        "gates": {"size": {"max_ratio": 0.9}, "bits_per_byte": {"max_increase": "5%"}, "kl": {"max": 1}},
    }
    report = compress.run(recipe).report
    how = EvaluationSettings(files=(str(texts[1]),), separator="<|doc|>", window=32, max_documents=4)
    from compress.report import to_json

    return json.loads(to_json(report)), json.loads(to_json(evaluate(str(pico_llama), how)))


def places(value, path=()):
    """Paths of all values of a document, but for what passes say of their work."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key not in ("details", "machine", "versions"):
            yield from places(item, (*path, key))


WRONG = [None, [], {}, "x", -1, 0, 1e308, 10**400, "NaN", True, [[]], {"a": 1}, "\0", "\ud800"]


def damaged(document, seed):
    """The document with one value replaced or removed."""
    draw, made = random.Random(seed), copy.deepcopy(document)
    path = draw.choice([p for p in places(document) if p])
    owner = made
    for key in path[:-1]:
        owner = owner[key]
    if draw.random() < 0.3:
        del owner[path[-1]]
    else:
        owner[path[-1]] = draw.choice(WRONG)
    return made


@pytest.mark.parametrize("seeds", [range(15), pytest.param(range(15, 60), marks=pytest.mark.slow)], ids=str)
def test_gate_judges_or_refuses_damaged_reports(seeds, cli, documents, tmp_path):
    found = set()
    for seed in seeds:
        (tmp_path / "r.json").write_text(json.dumps(damaged(documents[0], seed)))
        status, said = cli("gate", tmp_path / "r.json")
        assert status in (0, 1, 2, 3), (seed, said)
        if status == 2:
            assert said.startswith((f"compress: {tmp_path}/r.json", "compress: ", "gates.")), (seed, said)
            assert "Traceback" not in said
        found.add(status)
    assert {1, 2} & found


def test_evaluate_uses_or_refuses_damaged_baselines(documents, tmp_path, pico_llama):
    from compress.errors import CompressError

    for seed in range(40):
        (tmp_path / "b.json").write_text(json.dumps(damaged(documents[1], seed)))
        with contextlib.suppress(CompressError):
            evaluate(str(pico_llama), EvaluationSettings(metrics=()), baseline=str(tmp_path / "b.json"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r["recipe"]["resolved"].update(confidence="high"), "r.json: recipe.resolved.confidence: is damaged"),
        (lambda r: r["recipe"]["resolved"].update(bootstrap=10**30), "r.json: recipe.resolved.bootstrap: is damaged"),
        (lambda r: r["recipe"]["resolved"].update(gates=[1]), "gates: expected a mapping, got a list"),
        (lambda r: r["result"]["evaluation"].update(documents=[]), "r.json: result.evaluation.compress.evaluation/1"),
        (lambda r: r["result"]["evaluation"]["documents"][0].update(tokens=-1), "is damaged: Input should be greater"),
        (lambda r: r["result"]["size"].update(bytes=10**400), "r.json: result.size.bytes: is damaged"),
        (lambda r: r.update(original=[]), "r.json: original: is damaged"),
        (lambda r: r.update(schema=[]), "r.json: is not a report of this tool"),
    ],
)
def test_gate_names_what_is_wrong_with_a_report(cli, documents, tmp_path, change, text):
    report = copy.deepcopy(documents[0])
    change(report)
    (tmp_path / "r.json").write_text(json.dumps(report))
    status, said = cli("gate", tmp_path / "r.json")
    assert (status, text in said) == (2, True), said
    assert said.count("\n") == 1 or "gates" in text


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "\ud800".encode("utf-8", "surrogatepass"), "[1]", "3", '{"schema": 3}']
)
def test_gate_refuses_other_documents(cli, tmp_path, pico_llama, text):
    (tmp_path / "r.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in (["gate", tmp_path / "r.json"], ["eval", pico_llama, "--baseline", tmp_path / "r.json"]):
        status, said = cli(*command)
        assert status == 2
        assert said.startswith(f"compress: {tmp_path}/r.json: is no")
        assert said.count("\n") == 1


def test_evaluate_refuses_a_baseline_of_other_documents(documents, tmp_path, pico_llama):
    from compress.errors import ReportError

    made = copy.deepcopy(documents[1])
    made["evaluation"]["documents"].pop()
    (tmp_path / "b.json").write_text(json.dumps(made))
    with pytest.raises(ReportError, match="the two evaluations are of different documents"):
        evaluate(str(pico_llama), EvaluationSettings(), baseline=str(tmp_path / "b.json"))
