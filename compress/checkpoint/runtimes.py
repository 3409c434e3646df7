"""Where an output opens, by the measured table ``runtimes.json``, which `make runtimes` writes. Imports no torch."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from compress.architectures.model_map import model_map
from compress.checkpoint.storage import CODECS
from compress.checkpoint.store import needs_code
from compress.spec.classes import auto_class
from compress.spec.formats import QuantFormat
from compress.spec.spec import Spec

TABLE = Path(__file__).with_name("runtimes.json")


class MeasuredRuntime(NamedTuple):
    """A runtime that was tried.

    Attributes:
        name, version: of the runtime. opens: ``checkpoint``, or the target of ``compress export`` that it reads.
    """

    name: str
    version: str
    opens: str


@cache
def table() -> dict[str, Any]:
    """The measured table: ``runtimes`` by name, and ``models``, each with its artefacts and what runtimes made of them."""
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


def holdings(spec: Spec) -> list[str]:
    """Formats of codes, and parts that only compact checkpoints have, which a runtime must read. Empty for floats alone."""
    tables = {tensor.name for tensor in model_map(spec).tables}
    coded = [(t.quant_format, t.name in tables) for t in spec.stored() if t.quant_format is not None]
    held = {_words(quant_format, is_table) for quant_format, is_table in coded}
    held |= {edit.kind for edit in spec.structure.edits}
    held |= {"keep-masks" for t in spec.stored() if CODECS[t.storage].masked}
    return sorted(held | ({"compact"} if needs_code(spec) else set()))


def _words(quant_format: QuantFormat, is_table: bool) -> str:
    parts = [quant_format.format, "tables" if is_table else "", "in blocks" if quant_format.block else ""]
    parts += ["" if quant_format.symmetric else "with zero points"]
    parts += [f"with inputs in {quant_format.activations}" if quant_format.activations else ""]
    return " ".join(part for part in parts if part)


def opened(spec: Spec) -> dict[MeasuredRuntime, bool]:
    """Runtimes ▶ whether they opened all that a checkpoint holds; without those that were not tried with it.

    What counts are the artefacts of models that the same class of transformers loads, such as AutoModelForCausalLM. A runtime
    opens a checkpoint if, for each thing that the checkpoint holds, it opened an artefact with that.
    """
    answers = _answers(spec)
    result = {}
    for name, facts in table()["runtimes"].items():
        each = [answers.get((name, held)) for held in holdings(spec) or ["floats"]]
        if all(each):
            result[MeasuredRuntime(name, facts["version"], facts["opens"])] = all(
                True in answer for answer in each if answer
            )
    return result


def unopened(spec: Spec, runtime: str) -> list[str]:
    """Formats and parts of a checkpoint that a runtime was tried with and opened in no artefact."""
    answers = _answers(spec)
    return [held for held in holdings(spec) or ["floats"] if answers.get((runtime, held)) == {False}]


def _answers(spec: Spec) -> dict[tuple[str, str], set[bool]]:
    """Runtime and thing held ▶ whether artefacts with it were opened, of models that the checkpoint's class loads."""
    auto = auto_class(spec.structure.class_name)
    answers: dict[tuple[str, str], set[bool]] = {}
    for model in table()["models"].values():
        for artefact in model["artefacts"].values() if model["auto_class"] == auto else ():
            for name, figures in artefact["opens"].items():
                for held in artefact["holds"] or ["floats"]:
                    answers.setdefault((name, held), set()).add("no" not in figures)
    return answers


def runtimes_note(spec: Spec) -> str | None:
    """A sentence on the runtimes that open a checkpoint, itself or exported; None where nothing like it was tried."""
    verdicts = opened(spec)
    direct, exported = "", []
    for form in dict.fromkeys(runtime.opens for runtime in verdicts):
        tried = [r for r, opens in verdicts.items() if opens and r.opens == form]
        names = ", ".join(f"{r.name} {r.version.split()[0]}" for r in tried)
        if names and form == "checkpoint":
            direct = f"opens on a CPU in {names}"
        elif names:
            exported.append(f"{form} in {names}")
    closed = ", ".join(runtime.name for runtime, opens in verdicts.items() if not opens)
    if not direct and not exported:
        return None
    parts = [direct, f"once exported: {', '.join(exported)}" if exported else "", f"not in {closed}" if closed else ""]
    return "; ".join(part for part in parts if part)
