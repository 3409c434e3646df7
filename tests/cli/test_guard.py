"""Every way in which a command can end, and its exit status: 1 is a failed gate and nothing else."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from compress.cli import guard
from tests.conftest import ROOT


@pytest.fixture
def ends(capsys, monkeypatch, tmp_path):
    """Exit status and what stderr says of a command."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def call(command):
        with pytest.raises(SystemExit) as caught:
            guard.guarded(command)
        return caught.value.code, capsys.readouterr().err

    yield call
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def raising(error):
    def command():
        raise error

    return command


class PanicException(BaseException):
    """As pyo3 has it."""


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (PanicException("retry-limit"), 70, "compress: bug: PanicException: retry-limit; the traceback is in "),
        (GeneratorExit(), 70, "compress: bug: GeneratorExit"),
        (SystemExit(1), 70, "compress: bug: SystemExit: 1"),
        (SystemExit("gone"), 70, "compress: bug: SystemExit: gone"),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
        (guard.Judged(1), 1, ""),
        (guard.Judged(3), 3, ""),
        (RuntimeError("can't start new thread"), 4, "compress: out of memory or threads: can't start new thread"),
        (MemoryError(), 4, "compress: out of memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b"), 4, "compress: /a/b: the disk is full; free some"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 4, "compress: the disk is full"),
        (OSError(errno.EDQUOT, "quota", "f"), 4, "compress: f: the disk is full"),
        (OSError(errno.EMFILE, "many", "f"), 4, "compress: f: too many files are open; raise the limit (ulimit -n)"),
        (OSError(errno.EIO, "io", "f"), 4, "compress: f: the disk fails to read or write; check the disk"),
        (OSError(errno.EACCES, "Permission denied", "f"), 2, "compress: f: cannot be used: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "f"), 2, "compress: f: cannot be used: File name too long"),
        (OSError(errno.EISDIR, "Is a directory", b"f"), 2, "compress: f: cannot be used: Is a directory"),
        (OSError(errno.ENOTDIR, "Not a directory", "f"), 2, "compress: f: cannot be used: Not a directory"),
        (OSError("no number"), 70, "compress: bug: OSError: no number"),
        (KeyboardInterrupt(), 130, "compress: interrupted"),
    ],
    ids=repr,
)
def test_guard_ends_with_one_line_and_status(ends, error, status, text):
    code, err = ends(raising(error))
    assert code == status
    assert err.startswith(text)
    assert err.count("\n") == (1 if text else 0)


def test_guard_ends_with_2_when_a_question_is_unanswered(ends, monkeypatch):
    """typer ends with 1 at the end of the input."""
    import typer

    app = typer.Typer()
    app.command()(raising(EOFError("Ran out of input")))
    monkeypatch.setattr(sys, "argv", ["compress"])
    code, err = ends(lambda: app(standalone_mode=True))
    assert code == 70
    assert "compress: bug: EOFError: Ran out of input; the traceback is in " in err


def test_guard_tells_a_bug_without_a_place_for_its_log(ends, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    code, err = ends(raising(ZeroDivisionError("division by zero")))
    assert code == 70
    assert err.startswith("compress: bug: ZeroDivisionError: division by zero; it happened at ")
    assert "test_guard.py:" in err
    assert err.count("\n") == 1


def test_guard_tells_a_bug_when_no_file_may_grow(ends, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def command():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        raise ZeroDivisionError("x")

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        code, err = ends(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 70
    assert "no traceback could be written: [Errno 27] File too large" in err


@pytest.mark.parametrize("size", ["abc", ""])
def test_launched_refuses_a_world_size_that_is_no_number(ends, monkeypatch, size):
    from compress.errors import CompressError
    from compress.pipeline.workers import launched

    monkeypatch.setenv("WORLD_SIZE", size)
    assert ends(lambda: None)[0] == 0
    if size:
        with pytest.raises(CompressError, match="WORLD_SIZE is 'abc', which is not a number; unset it"):
            launched()
    else:
        assert launched() == (0, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 2, but RANK is not set; unset it, or start compress with torchrun"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x', which is not a number"),
        ({"RANK": "2"}, "RANK is 2, of 2 processes"),
    ],
)
def test_process_group_refuses_variables_of_others(monkeypatch, changes, said):
    from compress.errors import CompressError
    from compress.pipeline.workers import process_group

    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", **changes}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CompressError, match=said), process_group("cpu"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "a"),
        MemoryError(),
        RuntimeError("can't start new thread"),
        ValueError("No space left on device (os error 28)"),
    ],
)
def test_refusing_lets_missing_memory_through(error):
    from types import SimpleNamespace

    from compress.errors import CheckpointError
    from compress.models.classes import refusing

    def make(checkpoint, error=error):
        raise error

    with pytest.raises(type(error)) as found:
        refusing(make)(SimpleNamespace(folder="m"))
    assert found.value is error
    with pytest.raises(CheckpointError, match=r"config.json cannot be used: PermissionError: .*Permission denied"):
        refusing(make)(SimpleNamespace(folder="m"), PermissionError(errno.EACCES, "Permission denied", "a"))


def test_guard_tells_a_full_disk_behind_stdout(ends, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, err = ends(lambda: print("x"))
    assert code == 4
    assert (
        err == "compress: standard output: the disk is full; free some space and run again; finished stages are kept\n"
    )


def test_guard_works_with_closed_streams(ends, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as caught:
        guard.guarded(raising(ValueError("x")))
    assert caught.value.code == 70


def test_guard_second_signal_waits_for_cleaning(ends):
    cleaned = []

    def command():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # the interpreter looks for signals between two steps
                pass
            cleaned.append(True)

    code, _ = ends(command)
    assert code == 130
    assert cleaned == [True]


def test_guard_handles_a_signal_during_import():
    """Handlers stand before anything else is imported: no traceback, whenever it comes."""
    code = (
        "import os, signal, sys\n"
        "from compress.cli import main\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == sys.argv[1]:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "main()\n"
    )
    for module in ("compress.cli.guard", "compress.cli.app"):
        done = subprocess.run(
            [sys.executable, "-c", code, module], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 130, done.stderr
        assert done.stderr.startswith("compress: interrupted")
        assert done.stderr.count("\n") == 1


def test_expanded_refuses_a_path_of_an_unknown_user(tmp_path):
    from compress.errors import CompressError
    from compress.files import expanded

    with pytest.raises(CompressError, match="~nosuchuser/x: there is no such user"):
        expanded("~nosuchuser/x")
    assert expanded("~/x") == Path.home() / "x"


def test_commands_refuse_impossible_paths_and_numbers(tmp_path, capsys, monkeypatch):
    """Of real commands: one line, status 2."""
    from compress.cli import main

    (tmp_path / "r.yaml").write_text("extends: ~nosuchuser/base.yaml\n")
    long = "x" * 300
    for arguments, text in (
        (["inspect", "~nosuchuser/m"], "~nosuchuser/m: there is no such user"),
        (["diff", "~nosuchuser/m", "b"], "~nosuchuser/m: there is no such user"),
        (["unpack", "~nosuchuser/m", str(tmp_path / "o")], "~nosuchuser/m: there is no such user"),
        (["check", str(tmp_path / "r.yaml")], "~nosuchuser/base.yaml: there is no such user"),
        (["inspect", long], "File name too long"),
        (["check", long], "File name too long"),
        (["gate", f"{long}.json", "--gate", "size.max=1"], "File name too long"),
        (["runs", long], "File name too long"),
        (["clean", long], "File name too long"),
        (["inspect", "/" + "y/" * 3000], "File name too long"),
    ):
        monkeypatch.setattr(sys, "argv", ["compress", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        err = capsys.readouterr().err
        assert caught.value.code == 2, (arguments[0], err)
        assert text in err
        assert "Traceback" not in err


def test_gate_refuses_a_bound_too_large_for_a_number():
    from pydantic import TypeAdapter, ValidationError

    from compress.settings import AllowedIncrease, Fraction

    for kind in (AllowedIncrease, Fraction):
        with pytest.raises(ValidationError, match="got 1000000"):
            TypeAdapter(kind).validate_python(10**400)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        ("safetensors.SafetensorError('Error while serializing: I/O error: File too large (os error 27)')", 4, "the disk is full"),
        ("RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598')", 4, "the disk fails"),
        ("RuntimeError('something else')", 70, "bug: RuntimeError: something else"),
    ],
)  # fmt: skip
def test_guard_finds_disk_errors_that_libraries_wrap(error, status, text, capsys):
    import safetensors

    def command():
        raise eval(error, {"safetensors": safetensors})

    with pytest.raises(SystemExit) as end:
        guard.guarded(command)
    assert end.value.code == status
    assert text in capsys.readouterr().err
