"""Fuzz checkpoints, recipes or run folders: ``python -m tests.campaigns.fuzz checkpoints --count 1000``.

Every case follows from the campaign, the seed and its number alone. Where no seed is given it comes from the clock and is printed. A case that
fails is kept in a folder, its files with it; ``--only NUMBER --seed SEED`` makes it again. Counts are noted in the ledger, where a
campaign of the same seed and commit goes on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.campaigns import ledger, workers
from tests.campaigns.command import Hang
from tests.campaigns.trial import Trial

#: Campaign ▶ module with ``prepare(folder)``, which writes what cases begin with, and ``case(trial)``.
CAMPAIGNS = {name: f"tests.campaigns.{name}" for name in ("checkpoints", "recipes", "runs")}


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign. 1 where a case failed."""
    options = _options(arguments)
    seed = options.seed if options.seed is not None else time.time_ns() // 1000 % 10**9
    if options.resume and options.seed is None:
        begun = (
            e for e in ledger.read(options.ledger) if (e.campaign, e.commit) == (options.campaign, ledger.commit())
        )
        seed = next((e.seed for e in begun if e.cases < options.count), seed)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=shared if os.access(shared, os.W_OK) else None) as place:
        return campaign(options, seed, Path(place).resolve())


def campaign(options: argparse.Namespace, seed: int, place: Path) -> int:
    """The cases of one seed, in processes; work files go to ``place``."""
    print(f"{options.campaign}: seed {seed}, {options.count} cases", flush=True)
    module = importlib.import_module(CAMPAIGNS[options.campaign])
    sound = options.sound or place / "sound"
    if not sound.exists():
        _prepare(module, sound)
    entry = ledger.find(options.campaign, ledger.commit(), seed, options.ledger)
    first, last = (entry.cases, options.count) if options.only is None else (options.only, options.only + 1)
    found: Counter[str] = Counter()
    begun = time.monotonic()
    _import_all()
    for done in workers.run(
        lambda number: one(options.campaign, module, seed, number, sound, place, options.keep), first, last
    ):
        entry.count(done.statuses, done.failures, done.cpu, done.more)
        for what in done.failures:
            if not found[_kind(what)]:
                print(f"  case {done.number} of seed {seed}: {what}", flush=True)
            found[_kind(what)] += 1
        if done.number % 500 == 499:
            print(f"  {done.number + 1} cases, {sum(found.values())} failures", flush=True)
            if options.only is None and not options.dry:
                ledger.save(entry, options.ledger)
        if options.seconds and time.monotonic() - begun > options.seconds:
            break
    if options.only is None and not options.dry:
        ledger.save(entry, options.ledger)
    _summary(entry, found, first, options.json)
    return 1 if found else 0


def one(campaign: str, module: Any, seed: int, number: int, sound: Path, place: Path, keep: Path) -> workers.Case:
    """One case; a failing one is kept."""
    work = place / f"case-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    tempfile.tempdir = str(work)
    trial = Trial(random.Random(f"{campaign} {seed} {number}"), sound, work)
    start = time.process_time()
    try:
        module.case(trial)
    except Hang:  # between two commands: the timer was late
        pass
    except Exception:
        trial.failures.append(f"the campaign's own code: {traceback.format_exc().strip().splitlines()[-1]}")
        traceback.print_exc()
    spent = time.process_time() - start
    if trial.failures:
        _keep(trial, keep / f"{campaign}-{seed}-{number}")
    shutil.rmtree(work, ignore_errors=True)
    kinds = Counter(f"{o.arguments[0]} {o.status}" for o in trial.outcomes)
    return workers.Case(number, [str(o.status) for o in trial.outcomes], trial.failures, spent, dict(kinds))


def _keep(trial: Trial, folder: Path) -> None:
    """Copy what a case worked with, and say what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        trial.work,
        folder,
        symlinks=True,
        ignore=lambda path, names: [
            n for n in names if not (Path(path) / n).is_file() and not (Path(path) / n).is_dir()
        ],
    )
    said = [f"{' '.join(o.arguments)}\nstatus {o.status}\n{o.err}\n{o.trace}" for o in trial.outcomes]
    (folder / "FAILURE.txt").write_text(
        "\n".join([*trial.notes, *trial.failures, "", *said]), errors="backslashreplace"
    )


def _kind(what: str) -> str:
    """Failures at one place are of one kind."""
    return what.rpartition("[")[2] if what.endswith("]") else what[:60]


def _prepare(module: Any, sound: Path) -> None:
    """Write what cases begin with, in a process of its own, so that none of its threads are in later ones."""
    sound.mkdir(parents=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            module.prepare(sound)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        shutil.rmtree(sound)
        raise SystemExit("the sound files could not be made")


def _import_all() -> None:
    """Import what cases import, once for all processes."""
    import torch
    import transformers

    torch.set_num_threads(1)
    for name in (
        "LlamaForCausalLM",
        "BertForMaskedLM",
        "GPT2LMHeadModel",
        "T5ForConditionalGeneration",
        "ViTForImageClassification",
        "Qwen3MoeForCausalLM",
    ):
        getattr(transformers, name)
    for name in (
        "cli.app",
        "cli.commands.recipes",
        "cli.commands.quality",
        "cli.tables",
        "pipeline.run",
        "pipeline.evaluate",
        "inspection",
        "api",
        "report",
        "models.loading",
        "planning",
        "recipe",
    ):
        importlib.import_module(f"compress.{name}")
    from compress import passes

    for name in passes.TABLE:
        passes.get(name)


def _summary(entry: ledger.Entry, found: Counter[str], first: int, json_path: Path | None) -> None:
    cases = entry.cases - first
    print(
        f"{entry.campaign}: seed {entry.seed}, commit {entry.commit}: {entry.cases} cases ({cases} now), {entry.operations} commands, {entry.cpu_seconds:.0f} s of CPU, {entry.cases / max(entry.cpu_seconds, 1e-9):.1f} cases per CPU second"
    )
    print("  statuses: " + ", ".join(f"{k}: {v}" for k, v in entry.statuses.items()))
    print(
        f"  {sum(found.values())} failures now"
        + "".join(f"\n  {count:5} × {what}" for what, count in found.most_common())
    )
    if json_path is not None:
        json_path.write_text(json.dumps(vars(entry), indent=1))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("campaign", choices=sorted(CAMPAIGNS))
    parser.add_argument("--count", type=int, default=1000, help="cases of the seed, those of earlier calls among them")
    parser.add_argument("--seed", type=int, help="by default from the clock")
    parser.add_argument("--resume", action="store_true", help="go on with a seed of this commit that is not done")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case alone; nothing is noted")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--keep", type=Path, default=Path("build/failures"), help="where failing cases are kept")
    parser.add_argument("--sound", type=Path, help="where what cases begin with is, or is put")
    parser.add_argument("--ledger", type=Path, default=ledger.LEDGER)
    parser.add_argument("--dry", action="store_true", help="note nothing in the ledger")
    parser.add_argument("--json", type=Path, help="write the counts there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
