"""A result takes the place of an earlier one whole, whatever happens meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import compress
from tests.toolbox import flip, fork


def test_publish_keeps_a_result_changed_at_the_last_moment(small, tmp_path, monkeypatch):
    from compress.pipeline import publish

    compress.run(small())
    real, changed = publish._exchange, []

    def late(new, old):
        changed.append(flip(old / "model.safetensors"))
        real(new, old)

    monkeypatch.setattr(publish, "_exchange", late)
    compress.run(small(passes=[{"cast": {"weights": "fp16"}}]))
    assert (tmp_path / "out.changed-1/model.safetensors").read_bytes() == changed[0]


def test_publish_survives_a_kill_without_renameat2(small, tmp_path, monkeypatch):
    from compress.pipeline import publish

    compress.run(small())
    first = (tmp_path / "out/model.safetensors").read_bytes()
    monkeypatch.setattr(publish.ctypes, "CDLL", lambda *a, **k: object())  # no such function there
    real = Path.rename

    def killed(self, target):
        if self.name.startswith(".out.tmp-") and Path(target).name == "out":
            os._exit(9)
        return real(self, target)

    def work():
        Path.rename = killed
        compress.run(small(passes=[{"cast": {"weights": "fp16"}}]))

    assert fork(work) == 9
    assert not (tmp_path / "out").exists()
    failed = compress.run(small(passes=[{"cast": {"weights": "fp16"}}], gates={"size": {"max_ratio": 0.1}}))
    assert not failed.published
    assert (tmp_path / "out/model.safetensors").read_bytes() == first
    assert compress.run(small(passes=[{"cast": {"weights": "fp16"}}])).published
    assert (tmp_path / "out/model.safetensors").read_bytes() != first
    assert not list(tmp_path.glob(".*"))


def test_publish_meets_a_full_disk_before_it_replaces(small, tmp_path, monkeypatch):
    import errno

    from compress.errors import ResourceError
    from compress.pipeline import closing

    compress.run(small())
    before = (tmp_path / "out/model.safetensors").read_bytes()
    real = closing.prepare

    def full(path, data):
        if path.name == "report.md":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(closing, "prepare", full)
        with pytest.raises(
            ResourceError, match=r"report.md: the disk is full; free some space and run again"
        ) as caught:
            compress.run(small(passes=[{"cast": {"weights": "fp16"}}]))
    assert caught.value.exit_status == 4
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not list((tmp_path / "out.run").glob(".*"))
    assert compress.run(small(passes=[{"cast": {"weights": "fp16"}}])).report["stages"][0]["reused"]


# --- kills


#: Events of Python's audit hooks that change the file system.
CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.symlink"})


def kill_at(number: int, work) -> int:
    """Run ``work`` in a copy of this process that dies at the n-th change of the file system; 9 if it came to that."""
    import sys

    def watched():
        left = [number]

        def hook(event, arguments):
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_WRONLY)
            if event in CHANGES or writes:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        sys.addaudithook(hook)
        work()

    return fork(watched)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_publish_survives_a_kill_anywhere(small, tmp_path, step):
    """The output is always one whole result, and the next run ends with the right one and no remains."""
    one, two = small(), small(passes=[{"cast": {"weights": "fp16"}}])
    whole = {}
    for name, each in (("one", one), ("two", two)):
        compress.run(each)
        whole[name] = (tmp_path / "out/model.safetensors").read_bytes()
    number = step
    while True:
        status = kill_at(number, lambda: compress.run(one))
        assert (tmp_path / "out/model.safetensors").read_bytes() in whole.values()
        if status == 0:
            break
        assert status == 9
        assert compress.run(one).published
        assert (tmp_path / "out/model.safetensors").read_bytes() == whole["one"]
        assert not list(tmp_path.glob(".*"))
        assert not list((tmp_path / "out.run").glob("**/.*"))
        compress.run(two)
        number += step
    assert number > 20  # it was killed at many places
