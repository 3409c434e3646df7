"""Let the disk fail: an error at any one change of the file system, a disk that fills up, a limit on files' sizes.

    python -m tests.campaigns.disk --count 500 [--seed N] [--scene chain]

A fault that passes or one that stays; errors of opening, renaming, linking, removing and making folders come from audit
hooks, those of writing from a small file system in memory (root alone may mount it) and from RLIMIT_FSIZE. The run ends with
2 or 4 (or 0, where the run can do without), never with a traceback; with a whole disk it then ends with the expected bytes.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tests.campaigns import campaign, forked, scenes


@dataclass(frozen=True)
class Fault:
    """A case. ``kind``: ``once`` or ``stays`` (an errno before the change ``at``), ``tmpfs`` or ``fsize`` (at most ``size`` bytes)."""

    scene: str
    kind: str
    at: int = 0
    errno: int = 0
    size: int = 0


def draw(built: Mapping[str, scenes.Scene], lot: random.Random) -> Fault:
    """A case."""
    kinds = ["once", "once", "stays", "fsize", *(["tmpfs"] if os.geteuid() == 0 else [])]
    name, kind = lot.choice(sorted(built)), lot.choice(kinds)
    if kind in ("once", "stays"):
        return Fault(name, kind, lot.randint(1, built[name].changes), lot.choice(forked.ERRNOS))
    if kind == "fsize":
        return Fault(name, kind, size=lot.choice([0, 100, 1_000, 10_000, 50_000, 100_000]))
    return Fault(name, kind, size=lot.randint(10, 200) * 4096)


def check(scene: scenes.Scene, case: Fault) -> str | None:
    """What went wrong, None where nothing did."""
    scene.reset()
    with _trouble(scene, case) as run:
        failed = run()
        if failed.status not in (0, 2, 4) or failed.traceback:
            return f"status {failed.status}: {failed.output[-2000:]}"
        if (now := scene.found()) not in (scene.earlier, scene.expected):
            return f"the output is neither the earlier result nor the new one: {now}"
        if failed.status == 0 and now != scene.expected:
            return "status 0 without a result"
    return scenes.finish(scene)


@contextmanager
def _trouble(scene: scenes.Scene, case: Fault) -> Iterator[Callable[[], forked.Outcome]]:
    if case.kind in ("once", "stays"):
        act = (forked.failing_once if case.kind == "once" else forked.failing)(case.errno)
        yield partial(scene.run, at=case.at, act=act)
    elif case.kind == "fsize":
        yield partial(scene.run, before=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (case.size, case.size)))
    else:
        yield from _small_disk(scene, case.size)


def _small_disk(scene: scenes.Scene, size: int) -> Iterator[Callable[[], forked.Outcome]]:
    """The case's folder on a file system of so many bytes, which grows before the second run."""
    scene.case.rename(aside := scene.case.with_name("aside"))
    scene.case.mkdir()
    need = sum(p.stat().st_size for p in aside.rglob("*") if p.is_file()) + 65_536
    _mount("-t", "tmpfs", "-o", f"size={size + need}", "tmpfs", str(scene.case))
    try:
        subprocess.run(["cp", "-a", f"{aside}/.", str(scene.case)], check=True)
        yield scene.run
        _mount("-o", "remount,size=64m", str(scene.case))
        subprocess.run(["cp", "-a", f"{scene.case}/.", str(aside)], check=True)
    finally:
        subprocess.run(["umount", str(scene.case)], check=True)
        scene.case.rmdir()
        aside.rename(scene.case)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign."""
    return campaign.over_scenes("disk", campaign.options("disk", __doc__, arguments), draw, check)


if __name__ == "__main__":
    sys.exit(main())
