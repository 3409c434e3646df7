"""docs/runtimes.md, from the measured table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.formatting import significant
from tools.runtimes.environments import HERE

#: Runtime ▶ what its column has.
COLUMNS = {
    "transformers": "largest difference; in bfloat16",
    "lm-eval": "bits per byte",
    "vLLM": "mean difference, same token",
    "llama.cpp": "KL",
    "onnxruntime": "largest difference",
    "onnxruntime-genai": "equal tokens",
    "OpenVINO": "largest difference",
    "transformers.js": "largest difference",
    "sentence-transformers": "least cosine",
}


def page(table: dict[str, Any]) -> Iterator[str]:
    """Lines of the page."""
    yield from (HERE / "page.md").read_text().splitlines()
    for name, model in table["models"].items():
        yield from _section(table, name, model)


def _section(table: dict[str, Any], title: str, model: dict[str, Any]) -> Iterator[str]:
    artefacts, reasons = model["artefacts"], dict[str, list[str]]()
    names = [name for name in COLUMNS if any(name in one["opens"] for one in artefacts.values())]
    yield from ("", f"## {title}", "", f"{model['what']}; {model['tokens']:,} tokens.", "")
    yield f"| artefact | | {' | '.join(f'{name}: {COLUMNS[name]}' for name in names)} |"
    yield f"|---|---|{'---|' * len(names)}"
    for artefact, facts in artefacts.items():
        cells = [_cell(name, facts["opens"].get(name), reasons) for name in names]
        yield f"| {artefact} | {facts['what']} | {' | '.join(cells)} |"
    if reasons:
        yield ""
    for number, (reason, runtimes) in enumerate(reasons.items(), 1):
        yield from textwrap.wrap(
            f"- [{number}] {', '.join(runtimes)}: {reason}", 119, subsequent_indent="  ", break_on_hyphens=False
        )
    yield from _rates(artefacts)
    titles = ("runtime", "opens", "floats, from float64", "text in halves", "greedy tokens", "ids of the text")
    yield from ("", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|")
    for name in names:
        facts = table["runtimes"][name]
        yield f"| {name} {facts['version']} | {facts['opens']} | {' | '.join(_over_all(name, artefacts))} |"


def _cell(runtime: str, figures: dict[str, Any] | None, reasons: dict[str, list[str]]) -> str:
    """Figures of one artefact in one runtime, or the number of the reason why there are none, with its runtimes."""
    if figures is None:
        return "–"
    if "no" in figures:
        runtimes = reasons.setdefault(figures["no"], [])
        runtimes += [] if runtime in runtimes else [runtime]
        return f"[{list(reasons).index(figures['no']) + 1}]"
    if runtime == "transformers":
        return "; ".join([f"{figures['largest']:.1e}", *_likeliest(figures, "")])
    if "gap" in figures:
        default = "".join(f" ({text})" for text in _likeliest(figures, "_by_default"))
        return f"{next(_likeliest(figures, ''))}{default}"
    if "bits_per_byte" in figures:
        return f"{figures['bits_per_byte']:.4f}, {figures['difference']:+.0e}"
    if "cosine" in figures:
        return f"{figures['cosine']:.6f}"
    if "largest" not in figures:
        return f"{figures['greedy']} of {figures['of']}"
    return f"{figures['kl']:.1e}" if runtime == "llama.cpp" else f"{figures['largest']:.1e}"


def _rates(artefacts: dict[str, Any]) -> Iterator[str]:
    """Tokens per second, of the artefacts whose recipes measured them."""
    measured = [(name, rates) for name, facts in artefacts.items() for rates in facts.get("rates", ())]
    if measured:
        yield from ("", "| tokens per second | | prompt | ratio | decode | ratio |", "|---|---|---|---|---|---|")
    for name, facts in measured:
        how = f"{facts['runtime']} {facts['version']}, {facts['prompt']} + {facts['generated']} tokens"
        columns = [text for kind in ("prefill", "decode") for text in _change(*facts[kind])]
        threads = "one thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
        yield f"| {name} | {how}, {threads}, median of {facts['rounds']} rounds | {' | '.join(columns)} |"


def _change(before: float, after: float) -> tuple[str, str]:
    return f"{significant(before)} ▶ {significant(after)}", f"{after / before:.2f}"


def _likeliest(figures: dict[str, Any], end: str) -> Iterator[str]:
    """Mean difference of the likeliest tokens' log-probabilities, and the share of places with the same likeliest one."""
    if f"gap{end}" in figures:
        yield f"{figures[f'gap{end}']:.3f}, {figures[f'top1{end}']:.1%}"


def _over_all(runtime: str, artefacts: dict[str, Any]) -> Iterator[str]:
    """The worst of all artefacts: difference from float64 of those without codes, halves, greedy tokens, ids."""
    opened = [one for one in artefacts.values() if "no" not in one["opens"].get(runtime, {"no": ""})]
    each = [one["opens"][runtime] for one in opened]
    wide = [one["opens"][runtime].get("from_float64") for one in opened if not one["holds"]]
    halves = [figures["halves"] for figures in each if "halves" in figures]
    greedy = [(figures["greedy"], figures["of"]) for figures in each if "greedy" in figures]
    ids = [figures["ids"] for figures in each if "ids" in figures]
    yield f"{max(filter(None, wide)):.1e}" if any(wide) else ""
    yield f"{max(halves):.0e}" if halves else ""
    fewest = min(greedy, key=lambda counts: counts[0] / counts[1], default=None)
    yield "" if fewest is None or runtime == "transformers" else f"{fewest[0]} of {fewest[1]}"
    yield "" if not ids else "equal" if all(ids) else "differ"


def write(table: dict[str, Any], path: Path) -> None:
    """Write the page."""
    path.write_text("\n".join(page(table)) + "\n", encoding="utf-8")
