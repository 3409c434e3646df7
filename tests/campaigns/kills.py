"""Kill a run before any one of its changes of the file system; run it again; the bytes are those of an unbroken run.

    python -m tests.campaigns.kills --count 1000 [--seed N] [--scene chain]

Every third case is killed twice before it may finish. Where a result is replaced, the output holds the old result or the new
one, whole, at every moment.
"""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tests.campaigns import campaign, forked, scenes


@dataclass(frozen=True)
class Kill:
    """A case: the scene, and before which changes of the first and later runs the process is killed."""

    scene: str
    at: tuple[int, ...]


def draw(built: Mapping[str, scenes.Scene], lot: random.Random) -> Kill:
    """A case."""
    name = lot.choice(sorted(built))
    times = 2 if lot.random() < 1 / 3 else 1
    return Kill(name, tuple(lot.randint(1, built[name].changes) for _ in range(times)))


def check(scene: scenes.Scene, case: Kill) -> str | None:
    """What went wrong, None where nothing did."""
    scene.reset()
    for at in case.at:
        killed = scene.run(at=at, act=forked.kill)
        if killed.status == 0:  # the second kill came after the end
            break
        if killed.status != -signal.SIGKILL:
            return f"status {killed.status} before the kill: {killed.output[-2000:]}"
        if (now := scene.found()) not in (scene.earlier, scene.expected):
            return f"the output is neither the earlier result nor the new one: {now}"
    return scenes.finish(scene)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign."""
    return campaign.over_scenes("kills", campaign.options("kills", __doc__, arguments), draw, check)


if __name__ == "__main__":
    sys.exit(main())
