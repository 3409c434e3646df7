"""docs/families.md, from the results."""

from __future__ import annotations

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.families.cells import CELLS
from benchmarks.families.classes import CAUSAL, KINDS, Subject

MARKS = {"works": "✓", "refused": "–", "wrong": "✗", "unsuited": "·"}
#: Works with `store: compact`, as a refusal advised.
COMPACT = "✓c"
#: Shares that should work, by cell: of causal language models, of all other classes.
GOALS = {
    "rtn": (95, 95),
    "magnitude": (95, 95),
    "gptq": (90, 80),
    "sparsegpt": (90, 80),
    "layers": (75, 50),
    "mlp": (75, 50),
}
#: Number of reasons that the page lists.
REASONS = 60
#: Number of reasons of the other tool that it lists.
PEER_REASONS = 12
Rows = Mapping[Subject, Mapping[str, dict[str, Any] | None]]
Peers = Mapping[Subject, dict[str, Any]]


def write(rows: Rows, path: Path, peers: Peers = MappingProxyType({})) -> int:
    """Write the page and print the counts; 1 where a cell is wrong, else 0.

    Args:
        peers: results of another tool, by class.
    """
    lines = text(rows, peers)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(_counts(rows)))
    wrong = [(s.name, c, r) for s, cells in rows.items() for c, r in cells.items() if r and r["verdict"] == "wrong"]
    for name, cell, result in wrong:
        print(f"wrong: {name} {cell}: {result['reason']}")
    return 1 if wrong else 0


def put(rows: Rows, path: Path) -> None:
    """Write the shares of the cells that have goals into the marked part of the README."""
    cells = {cell: CELLS[cell].title for cell in GOALS}
    table = [f"| classes | {' | '.join(cells.values())} |", "|---" * (1 + len(cells)) + "|"]
    groups = {"causal language models": [s for s in rows if CAUSAL in s.kinds]}
    groups["all others"] = [s for s in rows if s.kinds != (CAUSAL,)]
    for name, members in groups.items():
        table.append(f"| {name} ({len(members)}) | {' | '.join(_share(rows, members, cell) for cell in cells)} |")
    begin, end = "<!-- begin families -->", "<!-- end families -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    path.write_text("\n".join([f"{before}{begin}", "", *table, "", f"{end}{after}"]), encoding="utf-8")


def _share(rows: Rows, members: Sequence[Subject], cell: str) -> str:
    """Share of the classes, of those run, on which a cell works; empty without any."""
    run = [result for subject in members if (result := rows[subject][cell])]
    works = sum(result["verdict"] == "works" for result in run)
    return f"{100 * works / len(run):.0f} %" if run else ""


def text(rows: Rows, peers: Peers = MappingProxyType({})) -> list[str]:
    """The lines of the page."""
    codes = sorted({result["code"] for cells in rows.values() for result in cells.values() if result})
    lines = [
        "# Families",
        "",
        "Which passes work on which classes of transformers. `make families` runs the matrix and writes this page.",
        "",
        "Each class of a mapping becomes a pico model: a config of the same kind with few, narrow blocks, and random weights.",
        "Each cell applies one pass to it. transformers then loads the written checkpoint in a process without this package.",
        "",
        "| mark | meaning |",
        "|---|---|",
        "| ✓ | works: no key is missing, unexpected or of another shape; the outputs equal those of `compress.load`, and "
        "differ from the original's where the pass is lossy |",
        f"| {COMPACT} | works with `store: compact`, as the line says that refuses the other |",
        "| – | refused, with one line that says why |",
        "| ✗ | wrong: other outputs, other keys, or an error that is none of this package's |",
        "| · | there is no pico model of the class that transformers itself saves and runs |",
        "",
        "A cell that is blank was not run. The shares are of the cells that were.",
        "",
        "Random weights say nothing about quality.",
        "",
        *textwrap.wrap(
            f"Commits of the cells: {', '.join(sorted({code[:7] + '+' * code.endswith('+') for code in codes}))}.", 118
        ),
        "",
        "## Counts",
        "",
        *_counts(rows),
        "",
        *(_beside(rows, peers) if peers else []),
        "## Reasons",
        "",
        *_reasons(rows),
        "",
    ]
    for kind in KINDS:
        lines += [f"## {kind[0].upper()}{kind[1:]}", "", *_table(rows, kind), ""]
    return lines[:-1]


def _counts(rows: Rows) -> list[str]:
    """A table: kind of class × cell, share that works; then the goals."""
    lines = [
        f"| classes | number | {' | '.join(cell.title for cell in CELLS.values())} |",
        "|---" * (2 + len(CELLS)) + "|",
    ]
    groups: dict[str, list[Subject]] = {k: [s for s in rows if k in s.kinds] for k in KINDS}
    groups["all but causal LM"] = [s for s in rows if s.kinds != (CAUSAL,)]
    for name, members in groups.items():
        shares = []
        for cell in CELLS:
            part = _share(rows, members, cell)
            goal = GOALS.get(cell, (None, None))[name != CAUSAL] if name in (CAUSAL, "all but causal LM") else None
            shares.append(f"{part} (goal {goal})" if goal and part else part)
        lines.append(f"| {name} | {len(members)} | {' | '.join(shares)} |")
    verdicts = Counter(result["verdict"] for cells in rows.values() for result in cells.values() if result)
    total = ", ".join(f"{verdicts[key]} {key if key != 'unsuited' else 'without a pico model'}" for key in MARKS)
    return [*lines, "", f"Cells: {total}."]


def _beside(rows: Rows, peers: Peers) -> list[str]:
    """The section that compares int4 GPTQ with llm-compressor's."""
    lines = [
        "## Beside llm-compressor",
        "",
        *textwrap.wrap(
            '`make families ARGS="--peer PYTHON"` runs llm-compressor\'s `oneshot` with GPTQ (4 bits, a scale for each '
            "channel) on the same pico models, by an interpreter that has it, with its default pipeline, then with `basic`. "
            "It gets the same calibration inputs. It counts as read where its own transformers loads what it wrote "
            "with equal outputs; other runtimes may read more. Classes that its transformers does not load, or that need "
            "a package, are left out. "
            f"Versions: {'; '.join(sorted({str(result.get('versions')) for result in peers.values()} - {'None'}))}.",
            118,
        ),
        "",
        "| classes | number | compress: written and read | llm-compressor: written | written and read |",
        "|---|---|---|---|---|",
    ]
    known = {subject: result for subject, result in peers.items() if result["verdict"] not in ("absent", "unsuited")}
    for name, causal in (("causal LM", True), ("all others", False)):
        members = [subject for subject in known if (subject.kinds == (CAUSAL,)) == causal]
        verdicts = Counter(known[subject]["verdict"] for subject in members)
        share = [f"{100 * count / max(1, len(members)):.0f} %" for count in
                 (verdicts["works"] + verdicts["unread"], verdicts["works"])]  # fmt: skip
        lines.append(f"| {name} | {len(members)} | {_share(rows, members, 'gptq')} | {' | '.join(share)} |")
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for subject, result in known.items():
        if result["verdict"] != "works":
            reasons[result["verdict"], shape(result["reason"], subject.model_type)].append(subject.model_type)
    lines += ["", "| llm-compressor | reason | classes |", "|---|---|---|"]
    for (verdict, reason), types in sorted(reasons.items(), key=lambda item: -len(item[1]))[:PEER_REASONS]:
        lines.append(f"| {'not read' if verdict == 'unread' else 'not written'} | {_cell(reason)} | {len(types)} |")
    return [*lines, ""]


def _reasons(rows: Rows) -> list[str]:
    """Reasons of what does not work, the most frequent first."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for subject, cells in rows.items():
        for cell, result in cells.items():
            if result and result["verdict"] != "works":
                found[result["verdict"], shape(result["reason"], subject.model_type)].append((subject.model_type, cell))
    lines = ["| mark | reason | cells | such as |", "|---|---|---|---|"]
    order = sorted(found.items(), key=lambda item: (item[0][0] != "wrong", -len(item[1])))
    for (verdict, reason), where in order[:REASONS]:
        types = list(dict.fromkeys(model_type for model_type, _ in where))
        shown = ", ".join(types[:5]) + (f" and {len(types) - 5} more" if len(types) > 5 else "")
        lines.append(f"| {MARKS[verdict]} | {_cell(reason)} | {len(where)} | {shown} |")
    if len(order) > REASONS:
        left = [len(where) for _, where in order[REASONS:]]
        lines += ["", f"{len(left)} other reasons, each of at most {max(left)} cells, are in the results of a run."]
    return lines


def mark(result: Mapping[str, Any] | None) -> str:
    """The mark of a result; empty without one."""
    if result is None:
        return ""
    return COMPACT if result["verdict"] == "works" and result["reason"] else MARKS[result["verdict"]]


def shape(reason: str, model_type: str = "") -> str:
    """A reason without the numbers, names and paths in which cells differ."""
    if model_type:
        reason = re.sub(rf"\b{re.escape(model_type)}(_text|_model)?\b", "…", reason)
    reason = re.sub(r"/\S*families-\w+/?\S*?(?=[:;,. )]|$)", "…", reason)
    reason = re.sub(r"\b[\w.]*\.\d+\.[\w.]+", "…", reason)
    reason = re.sub(r"\b\w*For[A-Z]\w+|\b\w+(Model|Config|HeadModel)\b", "…", reason)
    reason = re.sub(r"`[^`]*`", "`…`", reason)
    return re.sub(r"\d[\d,.]*\d|\d", "n", reason)[:200]


def _cell(words: str) -> str:
    return re.sub(r"([|<>*_\[\]])", r"\\\1", words)


def _table(rows: Rows, kind: str) -> list[str]:
    lines = [f"| type | class | {' | '.join(cell.title for cell in CELLS.values())} |", "|---" * (2 + len(CELLS)) + "|"]
    for subject in sorted((s for s in rows if kind in s.kinds), key=lambda s: s.name):
        marks = [mark(rows[subject][cell]) for cell in CELLS]
        lines.append(f"| {subject.model_type} | {subject.class_name} | {' | '.join(marks)} |")
    return lines
