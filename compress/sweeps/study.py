"""The folder of a sweep, ``OUTPUT.sweep``: its definition, its journal of trials, and who works on which.

``study.json`` has the recipe as it was when the sweep began. ``journal.jsonl`` has a line when a trial begins and one when it
ends; lines are added under one lock. Whoever runs a trial holds the lock ``trials/NNNN/lock``, and so does the process of the
run. These are locks of the operating system, which end with their processes: a trial that has begun, has not ended and is not
locked was lost, and the next process takes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from compress.errors import CompressError, OutputError
from compress.files import disk_errors, expanded, read_record, write_record
from compress.recipe.search import SearchRecipe, load_search
from compress.sweeps.goals import Bounds

_STUDY = "compress.study/1"
#: A trial is run with all of the evaluation (``full``), or first with a smaller one (``proxy``) and in full if that is good.
TrialPart = Literal["proxy", "full"]
State = Literal["running", "done", "failed", "pruned"]


@dataclass
class Outcome:
    """How a part of a trial went.

    Attributes:
        state: ``pruned``: never run, since its plan says that it cannot be on the front.
        verdict: of the gates. excess: how far it is beyond them, as shares of their bounds; 0 where none failed.
        goals: name ▶ value, lower, upper. gates: their lines. message: why it failed or was pruned.
        seconds: it took. reused: stages that it did not compute. lack: it failed for lack of memory or disk, or was killed.
    """

    state: State = "running"
    verdict: str | None = None
    excess: float = 0.0
    goals: dict[str, Bounds] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)
    message: str | None = None
    seconds: float = 0.0
    reused: int = 0
    lack: bool = False

    @property
    def feasible(self) -> bool:
        """Whether it ran and every gate passed."""
        return self.state == "done" and self.verdict in ("passed", "no gates")


@dataclass
class SweepTrial:
    """One trial as the journal has it.

    Attributes:
        values: name of each dimension ▶ its value. sampler: what the sampler keeps of it.
        planned: bytes and parameters by its plan. parts: the outcome of each part that has begun.
    """

    number: int
    values: dict[str, Any]
    sampler: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Outcome] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.number:04d}"

    @property
    def running(self) -> bool:
        """Whether a part of it has begun and not ended."""
        return any(outcome.state == "running" for outcome in self.parts.values())

    @property
    def first(self) -> Outcome:
        """The outcome of the part that it began with."""
        return next(iter(self.parts.values()), Outcome())

    @property
    def last(self) -> Outcome:
        """The outcome of its last part."""
        return list(self.parts.values())[-1] if self.parts else Outcome()


@dataclass
class Claim:
    """A part of a trial that this process has taken. ``lock``: the descriptor that says so."""

    trial: SweepTrial
    part: TrialPart
    lock: int

    def release(self) -> None:
        """Let others see that the work has ended."""
        os.close(self.lock)


@dataclass(frozen=True)
class Study:
    """A sweep's folder.

    Attributes:
        path: the folder. search: the recipe. folder: where relative paths of the recipe begin.
    """

    path: Path
    search: SearchRecipe
    folder: Path

    # ---- the definition ----

    @classmethod
    def begin(cls, path: Path, search: SearchRecipe, mapping: Mapping[str, Any]) -> Study:
        """The study of a recipe, made or found.

        Args:
            mapping: the recipe as JSON values, with ``search`` and ``sweep``.

        Raises:
            OutputError: the folder holds something else, or the study of another recipe.
        """
        with disk_errors(path):
            known = read_record(path / "study.json", _STUDY)
            if known is None and path.exists() and any(path.iterdir()):
                raise OutputError("exists and is no sweep", where=str(path), fix="move it away, or name another output")
            if known is not None and _essence(known["recipe"]) != _essence(mapping):
                keys = ", ".join(f"`{key}`" for key in _differing(known["recipe"], mapping))
                raise OutputError(
                    f"holds the sweep of another recipe: {keys} differ",
                    where=str(path),
                    fix="name another output, or remove the folder",
                )
            (path / "trials").mkdir(parents=True, exist_ok=True)
            (path / "journal.jsonl").touch()
            place = known["folder"] if known is not None else str(Path.cwd())
            token = (path / "journal.jsonl").stat().st_ino
            study = {"recipe": json.loads(json.dumps(mapping)), "folder": place, "path": str(path.absolute())}
            write_record(path / "study.json", _STUDY, {**study, "journal": token, "host": socket.gethostname()})
        return cls(path.absolute(), search, Path(place))

    @classmethod
    def join(cls, path: Path) -> Study:
        """The study in a folder that another process has begun.

        Raises:
            CompressError: there is none, this machine sees another folder of that name, or lacks the folder of the recipe.
        """
        path = expanded(path)
        known = read_record(path / "study.json", _STUDY)
        if known is None:
            raise CompressError(
                "is not the folder of a sweep", where=str(path), fix="name OUTPUT.sweep of a sweep that has begun"
            )
        try:
            inode = (path / "journal.jsonl").stat().st_ino
        except OSError:
            inode = None
        if inode != known["journal"]:
            raise CompressError(
                f"is not the folder in which {known['host']} began the sweep ({known['path']}), but a copy: processes would "
                "not see each other's trials",
                where=str(path),
                fix="mount the folder itself; a copy goes on by itself with `compress sweep RECIPE`",
            )
        folder = Path(known["folder"])
        if not folder.is_dir():
            raise CompressError(
                f"the sweep runs in {folder}, which this machine does not have",
                where=str(path),
                fix="mount it at the same place",
            )
        with contextlib.chdir(folder):
            return cls(path.absolute(), load_search(known["recipe"]), folder)

    # ---- the journal ----

    @property
    def shared(self) -> Path:
        """The folder of stages and measurements that trials share."""
        return self.path / "shared"

    def place(self, trial: SweepTrial) -> Path:
        """The folder of a trial."""
        return self.path / "trials" / trial.name

    @contextlib.contextmanager
    def locked(self) -> Iterator[list[SweepTrial]]:
        """Hold the lock of the study; the trials so far, by number."""
        with disk_errors(self.path):
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield self.trials(repair=True)
            finally:
                os.close(lock)

    def trials(self, *, repair: bool = False) -> list[SweepTrial]:
        """The trials by number. ``repair``: cut off a line that a killed process left half; only under the lock."""
        path = self.path / "journal.jsonl"
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if repair and whole != data:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        trials: dict[int, SweepTrial] = {}
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                _read(json.loads(line), trials)
        return [trials[number] for number in sorted(trials)]

    @property
    def first_part(self) -> TrialPart:
        """The part that every trial begins with."""
        return "full" if self.search.sweep.proxy is None else "proxy"

    def begun(self, trial: SweepTrial, part: str) -> None:
        """Add to the journal that a part of a trial begins here; under the lock."""
        more = {} if trial.parts else {"values": trial.values, "sampler": trial.sampler, "planned": trial.planned}
        self._add({"event": "begun", "trial": trial.number, "part": part, "by": _worker(), **more})

    def ended(self, trial: SweepTrial, part: TrialPart, outcome: Outcome) -> None:
        """Add to the journal how a part of a trial ended; under the lock."""
        self._add({"event": "ended", "trial": trial.number, "part": part, "by": _worker(), **asdict(outcome)})

    def again(self) -> None:
        """Let the trials begin again that failed for lack of memory or disk; all that ran, where none did anything else."""
        with self.locked() as known:
            every = all(trial.last.state == "failed" for trial in known)
            for trial in known:
                if trial.last.state == "failed" and (trial.last.lack or (every and trial.last.seconds)):
                    self.begun(trial, list(trial.parts)[-1])

    def _add(self, event: Mapping[str, Any]) -> None:
        line = (json.dumps(event) + "\n").encode()
        descriptor = os.open(self.path / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # ---- who works on what ----

    def take(self, trial: SweepTrial, part: TrialPart) -> Claim | None:
        """Take a part of a trial; None while another process has it."""
        own = self.place(trial)
        own.mkdir(parents=True, exist_ok=True)
        lock = os.open(own / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return Claim(trial, part, lock)


def _worker() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _read(event: Mapping[str, Any], trials: dict[int, SweepTrial]) -> None:
    """Apply a line of the journal."""
    number, part = int(event["trial"]), event["part"]
    if event["event"] == "begun":
        if number not in trials:
            trials[number] = SweepTrial(number, event["values"], event["sampler"], event["planned"])
        trials[number].parts[part] = Outcome()
    else:
        known = {name: event[name] for name in Outcome.__dataclass_fields__ if name in event}
        known["goals"] = {goal: tuple(values) for goal, values in known["goals"].items()}
        trials[number].parts[part] = Outcome(**known)


def _essence(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what may change: how many trials there are, and what is kept of them."""
    essence = json.loads(json.dumps(mapping))
    section = essence.get("sweep") or {}
    for key in ("trials", "keep", "max_disk"):
        section.pop(key, None)
    return dict(essence)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    a, b = _essence(one), _essence(other)
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
