"""The campaigns themselves: what they must notice they notice, counts add up and go on, and a short run of each is clean."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.campaigns import damage, ledger, workers
from tests.campaigns.command import call
from tests.campaigns.trial import Trial
from tests.conftest import ROOT


def test_a_ledger_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "reliability.json"
    entry = ledger.find("kills", "abc", 7, path)
    entry.count(["0", "2"], cpu=0.5)
    entry.count(["70"], ["it broke"], more={"exchange": 1})
    ledger.save(entry, path)
    again = ledger.find("kills", "abc", 7, path)
    assert again == entry
    assert again.failures == [{"case": 1, "what": "it broke"}]
    again.count(["0"])
    ledger.save(again, path)
    ledger.save(entry, path)  # an older state of the same cases takes nothing back
    other = ledger.find("kills", "abc", 8, path)
    other.count(["130"])
    ledger.save(other, path)
    assert ledger.totals(ledger.read(path)) == {
        "kills": {
            "seeds": 2, "cases": 4, "operations": 5, "failures": 1, "cpu_seconds": 0.5, "statuses": {"0": 2, "130": 1, "2": 1, "70": 1},
        }
    }  # fmt: skip


def test_processes_may_add_to_a_ledger_at_the_same_time(tmp_path):
    path = tmp_path / "reliability.json"

    def add(seed: int) -> None:
        entry = ledger.find("runs", "abc", seed, path)
        entry.count(["0"])
        ledger.save(entry, path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert [e.seed for e in ledger.read(path)] == list(range(24))


def test_what_must_not_be_is_noticed(tmp_path, monkeypatch, pico_llama):
    def trial() -> Trial:
        return Trial(random.Random(0), tmp_path, tmp_path)

    def breaking(*arguments, **options):
        raise KeyError("x")

    sound = trial()
    assert sound.run("inspect", str(pico_llama), keep=[pico_llama], one_line=True).status == 0
    assert sound.run("inspect", str(tmp_path / "none"), one_line=True).status == 2
    assert not sound.failures
    monkeypatch.setattr("compress.inspection.inspect", breaking)
    assert (
        trial().run("inspect", str(pico_llama)).faults[0].startswith("inspect ended with 70: compress: bug: KeyError")
    )

    (tmp_path / "model").mkdir()
    (tmp_path / "model/x").write_bytes(b"1")

    def changing(*arguments, **options):
        (tmp_path / "model/x").write_bytes(b"2")
        sys.stderr.write("a\x1b[31m")
        raise SystemExit(0)

    monkeypatch.setattr("compress.inspection.inspect", changing)
    changed = trial()
    changed.run("inspect", str(pico_llama), keep=[tmp_path / "model"])
    assert "inspect printed '\\x1b' raw to standard error: 'a\\x1b[31m'" in changed.failures
    assert "inspect (status 0) changed 'x' of model" in changed.failures

    monkeypatch.setattr("compress.inspection.inspect", lambda *a, **k: [None for _ in iter(int, 1)])
    stuck = call(["inspect", str(pico_llama)], cpu=0.3)
    assert stuck.status == "hang"
    assert "test_campaigns.py" in stuck.trace


def test_a_case_that_ends_its_process_is_a_failure_and_the_next_goes_on():
    def work(number: int) -> workers.Case:
        if number == 3:
            os._exit(9)
        return workers.Case(number, [str(number)])

    found = list(workers.run(work, 1, 6))
    assert [case.number for case in found] == [1, 2, 3, 4, 5]
    assert [case.statuses for case in found] == [["1"], ["2"], ["killed"], ["4"], ["5"]]
    assert "wait status" in found[2].failures[0]


def test_damage_follows_from_its_seed(pico_llama):
    config, weights = (pico_llama / "config.json").read_bytes(), (pico_llama / "model.safetensors").read_bytes()

    def make(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [
            damage.damage_json(rng, config),
            damage.damage_tensors(rng, weights),
            damage.damage_front(rng, b"---\na: b\n---\n"),
        ]

    assert make(5) == make(5)
    assert len({bytes(make(seed)[0]) for seed in range(50)}) > 30


@pytest.mark.slow
@pytest.mark.parametrize(("campaign", "count"), [("checkpoints", 400), ("recipes", 250), ("runs", 60)])
def test_a_short_campaign_with_a_new_seed(campaign, count, tmp_path):
    seed = time.time_ns() // 1000 % 10**9
    options = [
        "--count",
        str(count),
        "--seed",
        str(seed),
        "--keep",
        str(tmp_path),
        "--ledger",
        str(tmp_path / "l.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.fuzz", campaign, *options], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"python -m tests.campaigns.fuzz {campaign} --seed {seed}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    )
    entry = json.loads(Path(tmp_path / "l.json").read_text())["entries"][0]
    assert (entry["seed"], entry["failures"]) == (seed, [])
    assert entry["cases"] == count


@pytest.mark.slow
@pytest.mark.parametrize(("campaign", "count"), [("kills", 8), ("disk", 12), ("soak", 14), ("attacks", 0)])
def test_a_short_campaign_in_forked_commands(campaign, count):
    options = ["--count", str(count), "--jobs", "1"] if count else []
    done = subprocess.run(
        [sys.executable, "-m", f"tests.campaigns.{campaign}", "--no-ledger", *options], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
