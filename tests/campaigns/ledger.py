"""What campaigns have tried: counts by campaign, commit and seed in one JSON file, which any of them may add to.

An entry stands for a range of cases, 0 up to ``cases``, of one seed at one commit. So a campaign that was stopped goes on where its entry
ends, and no case counts twice. Processes may add at the same time: a lock file beside the ledger puts them in order.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

SCHEMA = "compress.reliability/1"
LEDGER = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"


@dataclass
class Entry:
    """Cases 0 to ``cases`` of one seed.

    Attributes:
        campaign: such as ``checkpoints`` or ``kills``. commit: of the code that was tried, with ``+`` where files were changed.
        operations: commands run, or events made, where a case has several.
        statuses: exit status ▶ how many operations ended with it; ``hang``, ``traceback`` and ``killed`` beside the numbers.
        failures: of every case that failed its number and one line; the seed and the number make the case again.
        cpu_seconds: of the processes that did the work.
        more: whatever else a campaign counts.
    """

    campaign: str
    commit: str
    seed: int
    cases: int = 0
    operations: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    more: dict[str, int] = field(default_factory=dict)

    def count(
        self,
        statuses: Sequence[str],
        failures: Sequence[str] = (),
        cpu: float = 0.0,
        more: Mapping[str, int] | None = None,
    ) -> None:
        """One more case: how its operations ended, and what was wrong."""
        self.failures += [{"case": self.cases, "what": what} for what in failures]
        self.cases += 1
        self.operations += len(statuses)
        self.statuses = dict(sorted((Counter(self.statuses) + Counter(statuses)).items()))
        self.more = dict(Counter(self.more) + Counter(more or {}))
        self.cpu_seconds = round(self.cpu_seconds + cpu, 3)


def read(path: Path = LEDGER) -> list[Entry]:
    """Every entry; none where there is no ledger."""
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    assert data["schema"] == SCHEMA, data["schema"]
    return [Entry(**row) for row in data["entries"]]


def find(campaign: str, commit: str, seed: int, path: Path = LEDGER) -> Entry:
    """The entry that was begun, or a new one."""
    found = (e for e in read(path) if (e.campaign, e.commit, e.seed) == (campaign, commit, seed))
    return next(found, Entry(campaign, commit, seed))


def save(entry: Entry, path: Path = LEDGER) -> None:
    """Put an entry in place of the one with its campaign, commit and seed, if that holds no more cases."""
    with _locked(path):
        rows = {(e.campaign, e.commit, e.seed): e for e in read(path)}
        key = (entry.campaign, entry.commit, entry.seed)
        if key in rows and rows[key].cases > entry.cases:
            return
        rows[key] = entry
        data = {"schema": SCHEMA, "entries": [asdict(rows[key]) for key in sorted(rows)]}
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        temporary.replace(path)


def totals(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Campaign ▶ seeds, cases, operations, statuses and failures of all its entries."""
    result: dict[str, dict[str, Any]] = {}
    for entry in entries:
        row = result.setdefault(
            entry.campaign, {"seeds": 0, "cases": 0, "operations": 0, "failures": 0, "cpu_seconds": 0.0, "statuses": {}}
        )
        row["seeds"] += 1
        row["cases"] += entry.cases
        row["operations"] += entry.operations
        row["failures"] += len(entry.failures)
        row["cpu_seconds"] = round(row["cpu_seconds"] + entry.cpu_seconds, 1)
        row["statuses"] = dict(sorted((Counter(row["statuses"]) + Counter(entry.statuses)).items()))
    return result


def commit() -> str:
    """The commit of the code here, twelve digits, with ``+`` where tracked files of the package differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "compress", "tests/campaigns")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def table(entries: Sequence[Entry]) -> str:
    """Markdown: a row for each campaign at each commit, newest cases last."""
    rows: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        rows.setdefault((entry.campaign, entry.commit), []).append(entry)
    lines = [
        "| campaign | commit | seeds | cases | failed | exit statuses | CPU minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for (campaign, commit), found in rows.items():
        row = totals(found)[campaign]
        statuses = ", ".join(f"{status}: {count:,}" for status, count in row["statuses"].items())
        failed = len({(e.seed, failure["case"]) for e in found for failure in e.failures})
        minutes = f"{row['cpu_seconds'] / 60:.1f}"
        lines.append(
            f"| {campaign} | {commit} | {row['seeds']} | {row['cases']:,} | {failed} | {statuses} | {minutes} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Write the table into the page."""
    before, _, rest = PAGE.read_text().partition("<!-- figures -->")
    _, _, after = rest.partition("<!-- end -->")
    PAGE.write_text(f"{before}<!-- figures -->\n\n{table(read())}\n\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
