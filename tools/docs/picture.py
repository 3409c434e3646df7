"""Draw docs/architecture.svg: the way of a recipe through a run, and the floors of the package.

The floors are the layers that import-linter checks (pyproject.toml), so the picture follows the code.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 900
INK, SOFT, LINE = "#1b2733", "#5a6b7b", "#b8c4ce"

#: What each package does; the picture shows one line for each floor.
ABOUT = {
    "cli": "commands, tables, exit statuses",
    "api": "the commands as Python functions",
    "pipeline": "order of stages, run folder, resume, publication",
    "inspection": "what a checkpoint holds",
    "report": "JSON, Markdown, JUnit, model card",
    "planning": "recipe + headers ▶ bytes, parameters, memory",
    "recipe": "YAML ▶ typed recipe, each mistake located",
    "gates": "verdicts",
    "passes": "a folder per pass: settings, plan, work on a block",
    "workspace": "the one way to cache, resume and write atomically",
    "training": "the training loop, losses, teachers",
    "sensitivity": "which matrix or block matters",
    "evaluation": "tasks and metrics",
    "blockwise": "runs a model block by block, collects Hessians",
    "solvers": "mathematics, tensors to tensors",
    "statistics": "intervals",
    "models": "checkpoint ▶ transformers model",
    "data": "text, images, batches",
    "checkpoint": "headers, lazy tensors, codecs, writer",
    "architectures": "one record per model family",
    "spec": "tensors and formats, as headers tell",
}
#: Floors that are small helpers share one line.
GROUND = ("distributed", "memory", "progress", "tabular", "settings", "formatting", "files", "errors", "escape")

STEPS = [
    ("recipe.yaml", "a model and\na list of passes"),
    ("check, plan", "from headers alone:\nno torch"),
    ("stages", "open ▶ pass ▶ write\n▶ verify ▶ rename"),
    ("evaluation", "each stage beside\nthe original"),
    ("gates", "passed, failed,\ninconclusive"),
    ("output", "published in\none rename"),
]


def picture() -> str:
    """Return the picture as SVG."""
    parts = _steps(20)
    y = 134
    for names in _floors():
        parts += _floor(y, names)
        y += 27
    parts += _arrow(WIDTH - 26, 138, WIDTH - 26, y - 8)
    parts.append(_text(WIDTH - 30, y + 10, "imports run downward", SOFT, 12, anchor="end"))
    height = y + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" role="img" aria-label="A run, and the floors of the package">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>', *parts, "</svg>", ""])


def _floors() -> list[list[str]]:
    """Return the packages of each floor, highest first; the helpers at the bottom are one floor."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [c for c in config["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    floors = [[name.strip().removeprefix("compress.") for name in layer.split("|")] for layer in contract["layers"]]
    helpers = [name for floor in floors for name in floor if name in GROUND]
    return [floor for floor in floors if floor[0] not in GROUND] + [helpers]


def _steps(y: int) -> list[str]:
    width, gap = 130, 16
    parts = []
    for i, (title, about) in enumerate(STEPS):
        x = 20 + i * (width + gap)
        parts.append(
            f'<rect x="{x:.0f}" y="{y}" width="{width}" height="84" rx="6" fill="#eef4fa" stroke="#7fa3c7"/>'
            + _text(x + width / 2, y + 26, title, INK, 15, weight=600, anchor="middle")
        )
        for row, text in enumerate(about.split("\n")):
            parts.append(_text(x + width / 2, y + 49 + 17 * row, text, SOFT, 11, anchor="middle"))
        if i:
            parts += _arrow(x - gap + 1, y + 42, x - 1, y + 42)
    return parts


def _floor(y: int, names: list[str]) -> list[str]:
    about = "" if names[0] in GROUND else "; ".join(ABOUT.get(name, "") for name in names)
    return [
        f'<rect x="20" y="{y}" width="{WIDTH - 62}" height="23" rx="4" fill="#f6f8fa" stroke="{LINE}"/>',
        _text(32, y + 16, " · ".join(names), INK, 13, weight=600),
        _text(300, y + 16, about, SOFT, 12),
    ]


def _arrow(x1: float, y1: float, x2: float, y2: float) -> list[str]:
    head = f"{x2 - 6:.1f},{y2 - 4:.1f} {x2:.1f},{y2:.1f} {x2 - 6:.1f},{y2 + 4:.1f}"
    if x1 == x2:
        head = f"{x2 - 4:.1f},{y2 - 6:.1f} {x2:.1f},{y2:.1f} {x2 + 4:.1f},{y2 - 6:.1f}"
    line = f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{SOFT}"/>'
    return [line, f'<polygon points="{head}" fill="{SOFT}"/>']


def _text(x: float, y: float, text: str, fill: str, size: int, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
