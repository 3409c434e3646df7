"""The best model within a bound beside single families: `make bench-pareto [MODEL= TRAIN= HELDOUT= ARGS=]`.

For each ratio of bytes: `fit`, what `compress fit` finds, and recipes of one family that keep the same bound: `bits` (a cast
with dense tables of tokens), `bits, tables` (a cast with tables of 8, and of 4 bits), `trellis, tables` (the same with trellis
codes), `depth`, `width` and `sparsity` (the least amount that keeps it). All are made with `--effort` and the compact store.
Scores are those of benchmarks/scoring.py. `peer`: other tools' codes and masks of the same model (`make bench-peers`), with
the bytes that the compact store takes for them. A section of docs/benchmarks.md, with a picture. What is done is kept in
--results, where a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import page, scoring  # noqa: E402

#: Scores of a row, with their formats.
_SCORES = (("rise", "+.4f"), ("kl", ".4f"), ("kl_error", ".4f"), ("bits_per_byte", ".4f"), ("second_rise", "+.4f"))
#: Steps of an amount that is searched.
_STEPS = 40


def single(sizes: Any, most: int, effort: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way of one family that can keep the bound, with its pass."""
    from compress.errors import PassError
    from compress.fits.families import TRELLIS_FORMATS, tables

    modules = tables(sizes.spec)
    for codes, formats in (("bits", {}), ("trellis", {"formats": list(TRELLIS_FORMATS)})):
        for override in (*((None,) if codes == "bits" else ()), "int8", "int4"):
            overrides = {} if override is None else {"overrides": dict.fromkeys(modules, override)}
            name = codes if override is None else f"{codes}, tables {override}"
            yield name, {"cast": {"max_bytes": most, "effort": effort, **formats, **overrides}}
    for name, key, of_pass in (("depth", "layers", "prune_structured"), ("width", "mlp", "prune_structured"),
                               ("sparsity", "sparsity", "prune_unstructured")):  # fmt: skip
        for step in range(1, _STEPS):
            amount = step if name == "depth" else round(step / _STEPS, 4)
            entry = {of_pass: {key: amount, "effort": effort}}
            try:
                planned = sizes.bytes(sizes.planned([entry]))
            except PassError:
                break
            if planned <= most:
                yield name, entry
                break


def apply(entry: Mapping[str, Mapping[str, Any]], model: str, output: Path, data: dict[str, Any]) -> None:
    """Apply one pass."""
    import compress

    (name, settings), *_ = entry.items()
    compress.apply(name, model, output, store="compact", **data, **settings)


def fitted(args: argparse.Namespace, most: int, folder: Path) -> tuple[Path, str]:
    """The checkpoint that a search within the bound makes, and what it gives up."""
    import compress

    (train,) = args.train
    file, _, field = train.partition(".safetensors:")
    files = (
        {"files": [f"{file}.safetensors"], "field": field} if field else {"files": [train], "length": scoring.WINDOW}
    )
    recipe: dict[str, Any] = {
        "model": args.model,
        "output": str(folder / "fit"),
        "store": "compact",
        "data": {"calibration": {**files, "samples": args.samples}},
        "fit": {"max_bytes": most, "effort": args.effort, "finalists": args.finalists},
    }
    if not field:
        recipe["document_separator"] = "<|doc|>"
    done = compress.fit(recipe)
    assert done.run is not None
    return done.run.checkpoint, f"{done.document['text']}, {done.document['chosen']['bits']:.2f} bits"


def peers(model: str, sizes: Any) -> list[dict[str, Any]]:
    """Rows of other tools: codes of one integer format, and masks."""
    rows = []
    for peer in page.known_peers(model):
        amount = peer["amount"]
        if amount.startswith("int"):
            entry: dict[str, Any] = {"cast": {"weights": amount}}
        elif amount.endswith("%"):
            entry = {"prune_unstructured": {"sparsity": amount}}
        else:
            continue
        size = sizes.bytes(sizes.planned([entry]))
        what = f"{peer['tool']}, {peer['method']} {amount}"
        rows.append({**peer, "way": "peer", "what": what, "bytes": size, "ratio": size / sizes.bytes(sizes.spec)})
    return rows


def picture(rows: list[dict[str, Any]], name: str) -> str:
    """The file of the picture, below docs."""
    from compress.report.pictures.front import Axis, TrialPoint, front_picture
    from compress.report.pictures.svg import standalone

    points = [
        TrialPoint(
            i,
            (row["ratio"],) * 3,
            (math.log10(max(row["kl"], 1e-6)),) * 3,
            "front" if row["way"] == "fit" else "beaten",
        )
        for i, row in enumerate(rows, 1)
        if "kl" in row
    ]
    drawn = front_picture(
        points,
        Axis("share of the bytes", True, lambda v: f"{100 * v:g} %"),
        Axis("KL (nats)", True, lambda v: f"{10**v:.2g}"),
    )
    assert drawn is not None
    path = page.PAGE.parent / "_static" / f"pareto-{name}.svg"
    path.write_text(standalone(drawn))
    return f"_static/{path.name}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-lm"))
    parser.add_argument("--train", nargs=1, default=[str(ROOT / "examples/text/train.txt")])
    scoring.options(parser)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.6, 0.4, 0.3, 0.2, 0.1])
    parser.add_argument("--effort", default="balanced", choices=["fast", "balanced", "best"])
    parser.add_argument("--ways", nargs="+", help="all by default")
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--results", type=Path, help="folder of what is done")
    parser.add_argument("--section", default="pareto", help="of docs/benchmarks.md; '-' prints only")
    args = parser.parse_args()
    from compress.checkpoint.open import open_headers
    from compress.fits.search import PlannedBytes

    folder = args.results or Path(tempfile.mkdtemp(prefix="compress-pareto-"))
    folder.mkdir(parents=True, exist_ok=True)
    file, texts = folder / "rows.json", scoring.held_out(args)
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    spec, _ = open_headers(args.model)
    sizes = PlannedBytes(spec, "compact", 1 << 62)
    whole, data = sizes.bytes(spec), scoring.calibration(args.train[0], args.samples)
    for ratio in args.ratios:
        most = int(ratio * whole)
        for way, entry in [("fit", {}), *single(sizes, most, args.effort)]:
            if (args.ways and way not in args.ways) or any((r["ratio"], r["way"]) == (ratio, way) for r in rows):
                continue
            before, output, what = _cpu(), folder / "out", str(next(iter(entry.values()), ""))
            shutil.rmtree(output, ignore_errors=True)
            try:
                if way == "fit":
                    output, what = fitted(args, most, folder)
                else:
                    apply(entry, args.model, output, data)
            except Exception as error:
                if type(error).__module__ != "compress.errors":
                    raise
                print(ratio, way, error, flush=True)
                continue
            size = sum(f.stat().st_size for f in output.glob("*.safetensors"))
            figures = texts.figures(texts.score(output))
            rows.append({"ratio": ratio, "way": way, "what": what, "bytes": size, "cpu": _cpu() - before, **figures})
            file.write_text(json.dumps(rows))
            print(*rows[-1].values(), flush=True)
    page.deliver(args.section, _section(args, parser, texts, [*rows, *peers(args.model, sizes)]))


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _section(args: argparse.Namespace, parser: Any, texts: scoring.HeldOut, rows: list[dict[str, Any]]) -> list[str]:
    model = page.model_name(args.model)
    cells = []
    for row in sorted(rows, key=lambda row: (-row["ratio"], row["way"] != "fit")):
        passes = row["what"].strip("{}").replace("'", "")
        scores = [format(row[key], form) if key in row else "–" for key, form in _SCORES]
        spent = row.get("cpu", row.get("cpu_s"))
        end = "–" if spent is None else f"{spent:.0f}"
        cells.append([f"{100 * row['ratio']:.3g} %", row["way"], passes, f"{row['bytes']:,}", *scores, end])
    head = ["bound", "way", "passes", "bytes", "ΔNLL", "KL", "± (95 %)", "bits per byte", "ΔNLL, second text", "CPU s"]
    section = [
        f"## Within a bound: {model}",
        "",
        f"`{page.command('bench-pareto', parser, args)}`: {page.environment()} {args.samples} × {scoring.WINDOW} calibration "
        f"tokens. {texts.note()} `benchmarks/pareto.py` describes the ways; searches share their trials.",
        "",
        *page.table(head, cells),
    ]
    if args.section != "-" and len(rows) > 1:
        section += ["", f"![KL by bytes: `compress fit` (joined) beside single families]({picture(rows, model)})"]
    return section


if __name__ == "__main__":
    main()
