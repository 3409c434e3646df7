from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

from compress.progress import display
from compress.progress.display import make_progress
from tests.conftest import ROOT


def test_progress_prints_lines_when_there_is_no_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = make_progress(False, stream)
    shown.stage(1, 2, "cast")
    with shown.task("write", 100, "tensors") as task:
        for i in range(30):
            now[0] += 1
            task.advance(note=f"t{i}")
    shown.message("done")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/2] cast"
    assert lines[-1] == "done"
    assert [line.partition(",")[0] for line in lines[1:-1]] == [
        "  write: 10/100 tensors",
        "  write: 20/100 tensors",
        "  write: 30/100 tensors",
    ]
    assert "90 s left" in lines[1]
    assert "resident" in lines[1]
    assert lines[1].endswith("t9")


def test_progress_quiet_prints_nothing():
    stream = io.StringIO()
    shown = make_progress(True, stream)
    shown.stage(1, 1, "x")
    with shown.task("x", 3) as task:
        task.advance()
    shown.message("x")
    assert stream.getvalue() == ""


CODE = """
import sys
from compress.progress.display import make_progress
shown = make_progress(False, sys.stderr)
if "open" in sys.argv:
    shown.__enter__()
shown.stage(1, 2, "prune [x]")
with shown.task("write", 3, "tensors") as task:
    for i in range(3):
        task.advance(note="model.layers.%d.[weight]" % i)
shown.message("reused [y]")
if "open" in sys.argv:
    import time
    time.sleep(0.4)
    shown.message("\u2713 prune [x]: 3 s")
    shown.__exit__(None, None, None)
"""


def in_terminal(*arguments: str, **environment: str) -> str:
    """What a terminal of 80 columns receives."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments], stderr=follower, stdout=subprocess.DEVNULL, cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
    )  # fmt: skip
    os.close(follower)
    received = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        received += piece
    os.close(leader)
    assert process.wait() == 0
    return received.decode()


def test_progress_draws_bars_in_a_terminal():
    text = in_terminal()
    assert "[1/2] prune [x]" in text
    assert "3/3" in text
    assert "tensors" in text
    assert "reused [y]" in text


def test_progress_honors_no_color():
    import re

    plain = in_terminal(NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain)  # no colours; the cursor may move
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", in_terminal(NO_COLOR=""))


def test_progress_prints_lines_in_a_dumb_terminal():
    assert "\x1b" not in in_terminal(TERM="dumb")


def test_progress_shows_the_stage_at_work_and_keeps_what_is_done():
    text = in_terminal("open")
    assert "starting" in text  # before the first stage
    assert "[1/2] prune [x]" in text
    assert "0:00:00" in text
    last = text.rpartition("✓ prune [x]: 3 s")[2]
    assert "[1/2]" not in last.rpartition("\x1b[2K")[2]  # nothing of it is left on the screen
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is shown again


def test_api_shows_progress_where_it_is_asked_to(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for asked in (None, False):
        with display.chosen(asked) as shown:
            shown.message("x")
    assert stream.getvalue() == ""
    with display.chosen(True) as shown:
        shown.message("x")
    assert stream.getvalue() == "x\n"
    with display.chosen(shown) as given:
        given.message("y")
    assert stream.getvalue() == "x\ny\n"


def test_notebook_needs_a_kernel_and_widgets(monkeypatch):
    import types

    assert not display.in_notebook()
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not display.in_notebook()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "ipywidgets")
    assert display.in_notebook()
