"""Killed, interrupted, out of disk, two at once: nothing half-written is ever seen, finished stages are kept."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import Process


@pytest.fixture
def recipe_file(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"

    def write(**changes):
        path.write_text(json.dumps(recipe(**changes)))  # JSON is YAML
        return path

    return write


def code(path: Path, *options: str, before: str = "") -> str:
    """``compress run``; ``before`` is Python code run first, to make trouble."""
    return f"import sys\nsys.argv = ['compress', 'run', {str(path)!r}, *{list(options)!r}]\n{before}\nfrom compress.cli import main\nmain()\n"


def start(path: Path, *options: str, before: str = "") -> Process:
    """That in a process of its own."""
    return Process(code(path, *options, before=before))


def start_cold(path: Path, *options: str, before: str = "") -> subprocess.Popen:
    """That as a user starts it, everything imported anew."""
    return subprocess.Popen(
        [sys.executable, "-c", code(path, *options, before=before)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


#: Stops at the n-th shard written, after half of it, and says so on stdout.
PAUSE = """
import time
from compress.checkpoint import write
real, count = write._pwrite, [0]
def slow(descriptor, data, offset):
    count[0] += offset == 0
    real(descriptor, data, offset)
    if count[0] == {stage} and offset > 0:
        print("paused", flush=True)
        time.sleep(600)
write._pwrite = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number", "status"),
    [
        (1, signal.SIGINT, 130),
        (3, signal.SIGTERM, 130),
        (3, signal.SIGKILL, -9),
        (3, signal.SIGINT, 130),
        (1, signal.SIGTERM, 130),
        (1, signal.SIGKILL, -9),
    ],
)
def test_run_resumes_when_stopped_while_writing(number, status, stage, recipe_file, tmp_path):
    path = recipe_file(evaluate=[])
    process = start(path, before=PAUSE.format(stage=stage))
    assert process.stdout.readline() == "paused\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    if number != signal.SIGKILL:
        assert errors.strip().splitlines()[-1].startswith("compress: interrupted; finished stages are kept")
        assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    stages = tmp_path / "out.run/stages"
    finished = [p for p in stages.glob("*") if p.is_dir() and not p.name.startswith(".")]
    assert len(finished) == stage - 1
    again = start(path)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    report = json.loads((tmp_path / "out.run/report.json").read_text())
    assert [s["reused"] for s in report["stages"]] == [i < stage - 1 for i in range(3)]
    assert not list(stages.glob(".*"))
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.slow
def test_run_killed_ends_with_unbroken_bytes(recipe, recipe_file, tmp_path):
    import compress

    compress.run(recipe(output=str(tmp_path / "unbroken")))
    path = recipe_file()
    process = start(path, before=PAUSE.format(stage=2))
    assert process.stdout.readline() == "paused\n"
    process.kill()
    process.communicate()
    assert start(path).wait(timeout=120) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


#: Says which block the runner works on, and stops at one.
BLOCKS = """
import time
from compress.blockwise import runner
real = runner.BlockRunner._block
def told(self, index, *rest):
    print(index, flush=True)
    if index == {stop}:
        time.sleep(600)
    return real(self, index, *rest)
runner.BlockRunner._block = told
"""


def test_run_killed_resumes_at_its_last_block(recipe_file, tmp_path):
    passes = [{"prune_unstructured": {"method": "sparsegpt", "sparsity": "60%", "reconstruction_epochs": 2}}]
    path = recipe_file(passes=passes, gates=None, evaluate=[], output=str(tmp_path / "unbroken"))
    assert start(path).wait(timeout=120) == 0
    path = recipe_file(passes=passes, gates=None, evaluate=[])
    process = start(path, before=BLOCKS.format(stop=2))
    assert [process.stdout.readline() for _ in range(3)] == ["0\n", "1\n", "2\n"]
    process.kill()
    process.communicate()
    again = start(path, "--json", "--quiet", before=BLOCKS.format(stop=None))
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert output.split("{")[0].split() == ["2", "3"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert not any((tmp_path / "out.run/work").iterdir())


@pytest.mark.slow
def test_run_refuses_a_second_run_at_the_same_output(recipe_file):
    path = recipe_file()
    first = start(path, before=PAUSE.format(stage=1))
    assert first.stdout.readline() == "paused\n"
    second = start(path)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"another run is working on this output (process {first.pid})" in errors
    first.kill()
    first.communicate()


@pytest.mark.slow
def test_run_resumes_after_a_full_disk(recipe_file, tmp_path):
    """A limit on file size stands in for a full disk: the kernel refuses the write (EFBIG), as it does with ENOSPC."""
    path = recipe_file()
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    process = start(path, before=f"{limited}; resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "the disk is full; free some space and run again" in errors
    assert not (tmp_path / "out").exists()
    assert start(path).wait(timeout=120) == 0


def test_run_refuses_a_read_only_folder(recipe_file, tmp_path):
    """Root may write everywhere but in the kernel's own file systems."""
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    place, message = (Path("/sys"), "cannot be written") if os.geteuid() == 0 else (place, "is not writable")
    process = start(recipe_file(output=str(place / "out")))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_run_tells_a_bug_in_one_line_and_a_log(recipe_file):
    process = start(recipe_file(), before="import compress.checkpoint.write as w\nw._digest = lambda v: 1 / 0")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 70
    last = errors.strip().splitlines()[-1]
    assert last.startswith("compress: bug: ZeroDivisionError: division by zero; the traceback is in ")
    log = Path(last.rpartition(" ")[2]).read_text()
    assert log.startswith("Traceback")
    assert "_write_shard" in log
    assert "Traceback" not in errors


@pytest.mark.slow
def test_run_tells_out_of_memory(recipe_file):
    process = start(
        recipe_file(), before="import compress.checkpoint.write as w\ndef no(v): raise MemoryError\nw._digest = no"
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "out of memory" in errors


@pytest.mark.slow
def test_run_refuses_a_bad_recipe_without_torch(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [")
    process = start_cold(
        tmp_path / "bad.yaml", before="import atexit\natexit.register(lambda: print('torch' in sys.modules))"
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == "False\n"


@pytest.mark.slow
def test_run_killed_eight_times_ends_with_unbroken_bytes(recipe, recipe_file, texts, tmp_path):
    """Moments are drawn one from each eighth of the time an unbroken run takes, early ones first; every kill hits a run at work."""
    changes = {
        "passes": [
            {"prune_unstructured": {"method": "sparsegpt", "sparsity": "60%", "reconstruction_epochs": 10}},
            {"cast": {"weights": "int4", "group_size": 32}},
        ],
        "data": {"calibration": {"files": [str(texts[0])], "samples": 64, "length": 64}},
        "evaluate": [],
        "gates": None,
    }
    path, started = recipe_file(**changes, output=str(tmp_path / "unbroken")), time.monotonic()
    assert start(path).wait(timeout=300) == 0
    whole = time.monotonic() - started
    path, draw = recipe_file(**changes), random.Random(0)
    moments = [whole * (i + draw.random()) / 8 for i in range(8)]

    def same() -> None:
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()

    kept = []  # stages and blocks that a kill found finished
    while moments:
        process = start(path)
        try:
            _, errors = process.communicate(timeout=moments[0])
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        if process.returncode == -signal.SIGKILL:
            moments.pop(0)
            found = ("stages/*.json", "work/*/blocks/*.safetensors")
            kept.append(tuple(len(list((tmp_path / "out.run").glob(pattern))) for pattern in found))
        else:  # what earlier kills left was less than that: the bytes are compared, and it begins anew
            assert process.returncode == 0, errors
            same()
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(tmp_path / "out.run")
            moments[0] *= 0.9
    assert len(set(kept)) > 1, kept  # the kills came at different states of the work
    assert start(path).wait(timeout=300) == 0
    same()
    assert not any((tmp_path / "out.run/work").iterdir())
    assert not list((tmp_path / "out.run/stages").glob(".*"))
    assert not list(tmp_path.glob(".out*"))
