"""One case of a campaign: commands on damaged files, how they ended, and what they must not have changed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.campaigns.command import ALLOWED, CPU_LIMIT, Outcome, call, changed, contents


@dataclass
class Trial:
    """What a case works with.

    Attributes:
        rng: from the campaign's name, the seed and the case's number. sound: what `prepare` wrote, read only. work: an empty folder.
    """

    rng: random.Random
    sound: Path
    work: Path
    outcomes: list[Outcome] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(
        self,
        *arguments: str,
        allowed: Sequence[int] = ALLOWED,
        keep: Sequence[Path] = (),
        cpu: float = CPU_LIMIT,
        one_line: bool = False,
    ) -> Outcome:
        """Run a command; files of the folders ``keep`` must be what they were."""
        before: list[dict[str, Any]] = [contents(folder) for folder in keep]
        outcome = call(arguments, allowed=allowed, cpu=cpu, one_line=one_line)
        self.outcomes.append(outcome)
        self.failures += outcome.faults
        for folder, old in zip(keep, before, strict=True):
            if names := changed(old, folder):
                self.failures.append(f"{arguments[0]} (status {outcome.status}) changed {names[0]!r} of {folder.name}")
        return outcome
