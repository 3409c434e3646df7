"""Open what this project writes in each runtime, compare, and write docs/runtimes.md. `make runtimes` runs it.

Each runtime has an environment of its own under build/runtimes, with the packages pinned in requirements.json. Finished cells
are kept in build/runtimes/cells; `--fresh` computes them again. The figures go to compress/checkpoint/runtimes.json, by which
plans and cards say where an output opens; rows of models that are not named stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

from compress.checkpoint.open import open_headers
from compress.checkpoint.runtimes import TABLE, holdings
from compress.evaluation.throughput_settings import RuntimeName
from compress.spec.classes import auto_class
from tools.runtimes.cells import RUNTIMES, cells
from tools.runtimes.environments import BUILD
from tools.runtimes.figures import figures
from tools.runtimes.models import MODELS, add, artefact, asked, folder_of, rates
from tools.runtimes.page import write

PAGE = BUILD.parent.parent / "docs" / "runtimes.md"
RECIPE = Path("recipes/cast_export.yaml")


def measured(
    name: str, runtimes: tuple[str, ...], artefacts: list[str], fresh: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of a model in the table, with figures of some artefacts in some runtimes, and these runtimes."""
    model = MODELS[name]
    outputs = {}
    for runtime in dict.fromkeys(("compress", *(["transformers"] if "vLLM" in runtimes else []), *runtimes)):
        start = time.perf_counter()
        outputs[runtime] = cells(runtime, name, artefacts, fresh)
        print(f"{name} in {runtime}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    question = json.loads(asked(name).read_text())
    rows = {}
    for one in artefacts:
        made = model.artefacts[one]
        spec, _ = open_headers(artefact(name, one, "checkpoint"), trust_remote_code=True)
        opens = {each: figures(outputs[each][one], reference(outputs, each, one), question) for each in runtimes}
        rows[one] = {"what": made.what, "holds": holdings(spec), "opens": opens}
        if measured_rates := rates(name, one):
            rows[one]["rates"] = measured_rates
    versions = {each: max(str(one.get("version", "")) for one in outputs[each].values()) for each in runtimes}
    used = {each: {"version": versions[each], "opens": RUNTIMES[each][0]} for each in runtimes}
    auto = auto_class(open_headers(folder_of(name))[0].structure.class_name)
    return {"what": model.what, "tokens": model.tokens, "auto_class": auto, "artefacts": rows}, used


def reference(outputs: dict[str, Any], runtime: str, name: str) -> dict[str, Any]:
    """Outputs from which those of a runtime differ: of stock transformers for servers of checkpoints.

    Exports hold no rounding of inputs: theirs are compared with logits without it.
    """
    ours = dict(outputs["compress"][name])
    if runtime in ("transformers", "lm-eval") or "error" in ours:
        return {key: value for key, value in ours.items() if key != "greedy"}
    if runtime == "vLLM" and "error" not in outputs["transformers"][name]:
        return dict(outputs["transformers"][name])
    return ours | {"logits": ours["unrounded"]}


def merged(before: dict[str, Any] | None, row: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """A model's row with what was measured before, where only a part was measured again."""
    old = {} if before is None else before["artefacts"]
    artefacts = {}
    for one in order:
        if one in old or one in row["artefacts"]:
            facts = row["artefacts"].get(one, old.get(one))
            artefacts[one] = old.get(one, {}) | facts | {"opens": old.get(one, {"opens": {}})["opens"] | facts["opens"]}
    return row | {"artefacts": artefacts}


def main() -> None:
    """Write the table and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="compute finished cells again")
    parser.add_argument(
        "--models", nargs="*", choices=MODELS, default=list(MODELS), help="to open; others keep their rows"
    )
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="to open them in; others keep their figures")
    parser.add_argument("--artefacts", nargs="+", help="rows to measure; others keep their figures")
    parser.add_argument("--model", type=Path, help="one more: a causal model of your own, which --recipe compresses")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="with exports to gguf and onnx")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument(
        "--speed", nargs="+", default=[], choices=get_args(RuntimeName), help="and measure tokens per second"
    )
    given = parser.parse_args()
    if given.model:
        given.models.append(add(given.model, given.recipe, given.set, given.speed))
    part = given.runtimes or given.artefacts
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        chosen = tuple(each for each in MODELS[name].runtimes if each in (given.runtimes or RUNTIMES))
        names = [one for one in MODELS[name].artefacts if one in (given.artefacts or MODELS[name].artefacts)]
        row, used = measured(name, chosen, names, given.fresh)
        table = json.loads(TABLE.read_text(encoding="utf-8"))  # another process may have written it meanwhile
        before = table["models"].get(name) if part else None
        table["models"][name] = merged(before, row, list(MODELS[name].artefacts))
        table["runtimes"] |= used
        TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        write(table, PAGE)


if __name__ == "__main__":
    main()
