"""docs/runtimes.md, from the measured table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.runtimes.environments import HERE

#: Runtime ▶ what its column has.
COLUMNS = {
    "transformers": "largest difference",
    "vLLM": "mean difference, same token",
    "llama.cpp": "KL",
    "onnxruntime": "largest difference",
    "onnxruntime-genai": "equal tokens",
    "OpenVINO": "largest difference",
    "transformers.js": "largest difference",
}


def page(table: dict[str, Any]) -> Iterator[str]:
    """Lines of the page."""
    yield from (HERE / "page.md").read_text().splitlines()
    for name, model in table["models"].items():
        yield from _section(table, name, model)


def _section(table: dict[str, Any], title: str, model: dict[str, Any]) -> Iterator[str]:
    artefacts, reasons = model["artefacts"], dict[tuple[str, str], int]()
    names = [name for name in COLUMNS if any(name in one["opens"] for one in artefacts.values())]
    yield from ("", f"## {title}", "", f"{model['what']}; {model['tokens']:,} tokens.", "")
    yield f"| artefact | | {' | '.join(f'{name}: {COLUMNS[name]}' for name in names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    for artefact, facts in artefacts.items():
        cells = [_cell(name, facts["opens"].get(name), reasons) for name in names]
        yield f"| {artefact} | {facts['what']} | {' | '.join(cells)} |"
    if reasons:
        yield ""
    for (runtime, reason), number in reasons.items():
        yield from textwrap.wrap(
            f"- [{number}] {runtime}: {reason}", 119, subsequent_indent="  ", break_on_hyphens=False
        )
    yield from ("", "| runtime | opens | text in halves | greedy tokens | ids of the text |", "|---|---|---|---|---|")
    for name in names:
        facts = table["runtimes"][name]
        yield f"| {name} {facts['version']} | {facts['opens']} | {' | '.join(_over_all(name, artefacts))} |"


def _cell(runtime: str, figures: dict[str, Any] | None, reasons: dict[tuple[str, str], int]) -> str:
    """Figures of one artefact in one runtime, or the number of the reason why there are none."""
    if figures is None:
        return "not tried"
    if "no" in figures:
        return f"[{reasons.setdefault((runtime, figures['no']), len(reasons) + 1)}]"
    if "gap" in figures:
        return f"{figures['gap']:.3f}, {figures['top1']:.1%}"
    if "largest" not in figures:
        return f"{figures['greedy']} of {figures['of']}"
    return f"{figures['kl']:.1e}" if runtime == "llama.cpp" else f"{figures['largest']:.1e}"


def _over_all(runtime: str, artefacts: dict[str, Any]) -> Iterator[str]:
    """The worst of all artefacts: halves, greedy tokens, ids."""
    each = [one["opens"][runtime] for one in artefacts.values() if "no" not in one["opens"].get(runtime, {"no": ""})]
    halves = [figures["halves"] for figures in each if "halves" in figures]
    greedy = [f"{figures['greedy']} of {figures['of']}" for figures in each if "greedy" in figures]
    ids = [figures["ids"] for figures in each if "ids" in figures]
    yield f"{max(halves):.0e}" if halves else ""
    yield min(greedy, key=lambda text: int(text.split()[0])) if greedy and runtime != "transformers" else ""
    yield "" if not ids else "equal" if all(ids) else "differ"


def write(table: dict[str, Any], path: Path) -> None:
    """Write the page."""
    path.write_text("\n".join(page(table)) + "\n", encoding="utf-8")
