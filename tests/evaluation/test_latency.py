from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from compress.errors import CheckpointError, CompressError
from compress.evaluation import latency
from compress.evaluation import worker as turns
from compress.evaluation.latency_settings import LatencySettings
from tests import pico
from tests.processes import Process


def workers() -> list[str]:
    listed = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in listed if "latency_worker" in line and line.split()[1] == str(os.getpid())]


@pytest.fixture
def forked(monkeypatch):
    """Workers are forked, not cold interpreters; all that were started. One test starts them as they are."""
    made = []

    def start(command, *, env, **options):
        assert command[:3] == [sys.executable, "-m", "compress.evaluation.latency_worker"]
        code = "from compress.evaluation.latency_worker import main; main()"
        made.append(Process(code, *command[3:], environment=env, stdin=True))
        return made[-1]

    monkeypatch.setattr(turns, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    return made


def ended(made):
    return len(made) > 0 and all(process.returncode is not None for process in made)


@pytest.mark.slow
def test_latency_compares_two_models(tmp_path, pico_llama, monkeypatch):
    monkeypatch.setattr(turns, "SECONDS", 0.1)
    large = pico.save(tmp_path / "large", num_hidden_layers=24)
    lengths = LatencySettings(lengths=(8, 40), generated=2, rounds=2)
    found = latency.measure_latency([large, pico_llama], dtype="float32", device="cpu", threads=1, lengths=lengths)
    for side in found.values():
        assert side["rounds"] == turns.FEWEST
        assert side["prompt"] + side["generated"] <= 64
        for name in ("prefill", "decode"):
            timing = side[name]
            assert len(timing["samples"]) == turns.FEWEST
            assert 0 < min(timing["samples"]) <= timing["median"] <= timing["p90"] <= max(timing["samples"])
        assert side["memory"]["peak"] > 0
        assert [row["length"] for row in side["lengths"]] == [8, 40]
        assert side["not_tried"] == []
    assert [found[side]["lengths"][1]["cache"]["values"] for side in ("original", "candidate")] == [
        24 * 32 * 40,
        4 * 32 * 40,
    ]
    smaller = found["candidate"]
    assert smaller["decode"]["lower"] <= smaller["decode"]["ratio"] <= smaller["decode"]["upper"] < 1  # 4 blocks for 24
    assert workers() == []


def test_latency_refuses_model_that_cannot_generate(tmp_path, monkeypatch, forked):
    monkeypatch.setattr(turns, "SECONDS", 0.1)
    bert = pico.save(tmp_path / "bert", "bert")
    found = latency.measure_latency([bert, bert], dtype="float32", device="cpu", threads=1)
    assert found["candidate"]["decode"] is None
    assert found["candidate"]["prefill"]["ratio"] > 0


def test_latency_refuses_model_without_text_input(tmp_path, forked):
    vit = pico.save(tmp_path / "vit", "vit")
    with pytest.raises(CompressError, match="on token ids, and ViTForImageClassification reads `pixel_values`"):
        latency.measure_latency([vit, vit], dtype="float32", device="cpu", threads=1)
    assert ended(forked)


def test_latency_workers_end_when_model_does_not_load(tmp_path, pico_llama, forked):
    broken = tmp_path / "broken"
    shutil.copytree(pico_llama, broken)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        latency.measure_latency([pico_llama, broken], dtype="float32", device="cpu")
    assert ended(forked)


def test_latency_reports_worker_that_dies(pico_llama, forked):
    settings = {"folder": str(pico_llama), "dtype": "float32", "device": "cpu", "threads": 1}
    with latency._worker(
        {**settings, "trust_remote_code": False, "ignore_auto_map": False, "allow_links": False}
    ) as worker:
        worker.answer()
        worker.process.terminate()
        worker.process.wait()
        with pytest.raises(CompressError, match="the process that measures latency ended with status -15"):
            latency._ask(worker, "round", {"seed": 0, "prompt": 4, "generated": 2, "vocabulary": 10, "decode": True})


def test_latency_worker_ends_with_its_parent(pico_llama, forked):
    settings = {"folder": str(pico_llama), "dtype": "float32", "device": "cpu", "threads": 1}
    with latency._worker(
        {**settings, "trust_remote_code": False, "ignore_auto_map": False, "allow_links": False}
    ) as worker:
        worker.answer()
        worker.process.stdin.close()  # what a killed parent leaves
        deadline = time.monotonic() + 20
        while worker.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert worker.process.returncode == 0
