"""Details of a pass as sections: a sentence, and a picture or a table for each kind of row that passes report.

Texts are in the Markdown of one line: names between backticks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.escape import in_one_line, markdown
from compress.formatting import fixed, percent, ratio, significant
from compress.passes.details import SECTIONS, LatentDetails, PassDetails, TrainingDetails
from compress.report.detail_rows import (
    block_rows,
    format_rows,
    gap_rows,
    shape_rows,
    sharing_error,
    sharing_rows,
    window_rows,
)
from compress.report.experts import TIMES, expert_rows
from compress.report.layout import table


@dataclass(frozen=True, slots=True)
class Section:
    """One section. ``picture``: file name of the picture below the text. ``right``: columns that are aligned right."""

    text: str
    head: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    right: Sequence[int] = ()
    picture: str = ""


def render_details(row: Mapping[str, Any], picture: str) -> list[str]:
    """Lines of Markdown on the details of a pass.

    Args:
        row: the pass in the report. picture: file name of the picture of its losses, if it trains.
    """
    return [line for section in sections(row, picture) for line in _lines(section)]


def _lines(section: Section) -> list[str]:
    if not section.head:
        return [f"- {section.text}", ""]
    lines = [section.text, ""]
    if section.picture:
        lines += [f"![losses by step]({section.picture})", ""]
    return [*lines, *table(section.head, section.rows, right=section.right), ""]


def sections(row: Mapping[str, Any], picture: str) -> list[Section]:
    """Sections on the details of a pass; arguments as of `render_details`."""
    name, details = row["name"], row["details"]
    made = []
    if others := {key: value for key, value in details.items() if key not in SECTIONS}:
        made.append(Section(in_one_line(f"`{name}`: {_details(others)}")))
    if "training" in details:
        made.append(_training(details["training"], name, picture))
    made += [*_removals(name, details), *_formats(name, details), *_shapes(name, details), *_sharing(name, details)]
    made += [*_gaps(name, details), *_windows(name, details)]
    return [*made, *_latent(name, details), *_experts(name, details), *_blocks(name, details)]


def _removals(name: str, details: PassDetails) -> list[Section]:
    """Divergence without each block, in each round of removals."""
    rounds = details.get("loss_without_block") or []
    if not rounds or not rounds[0]:
        return []
    samples, removed = details.get("samples_without_block") or [{}] * len(rounds), details.get("removed_blocks", [])
    head = ("block", *("divergence" if not gone else f"after {gone} removed" for gone in range(len(rounds))), "")
    rows = []
    for block in rounds[0]:
        cells = [_loss(losses.get(block), of.get(block)) for losses, of in zip(rounds, samples, strict=False)]
        rows.append((block, *cells, "removed" if int(block) in removed else ""))
    text = "Divergence from the original without each block, nats per token; in brackets the calibration samples it is from."
    return [Section(f"`{name}`, depth. {text}", head, rows, right=range(len(head) - 1))]


def _loss(loss: float | None, samples: int | None) -> str:
    if loss is None:
        return ""
    return fixed(loss, 4) + ("" if samples is None else f" ({samples})")


def _formats(name: str, details: PassDetails) -> list[Section]:
    if not (rows := format_rows(details)):
        return []
    text = "Divergence: nats per token expected from rounding only those matrices, to second order."
    curve = [(f"{bits:g}", fixed(loss, 4)) for bits, loss in details["curve"]]
    return [
        Section(
            f"`{name}`, formats within the budget. {text}", ("format", "matrices", "divergence"), rows, right=(1, 2)
        ),
        Section("Divergence at other budgets:", ("bits", "divergence"), curve, right=(0, 1)),
    ]


def _shapes(name: str, details: PassDetails) -> list[Section]:
    if not (rows := shape_rows(details)):
        return []
    columns = ("removed blocks", "heads", "neurons", "parameters", "size", "prefill", "divergence", "")
    text = (
        "Prefill: time for a prompt over the original's, if that is the target. Divergence from the original on held-out "
        "calibration samples, after least squares and without reconstruction."
    )
    return [Section(f"`{name}`, shapes that meet the target. {text}", columns, rows, right=(1, 2, 3, 4, 5, 6))]


def _sharing(name: str, details: PassDetails) -> list[Section]:
    made = []
    if (lost := sharing_error(details)) is not None:
        made.append(
            Section(f"`{name}`: shared matrices lose {percent(lost)} of the energy of their outputs on average")
        )
    if rows := sharing_rows(details):
        text = f"`{name}`, arrangements of shared blocks. Divergence from the original on held-out calibration samples."
        made.append(Section(text, ("arrangement", "blocks", "divergence", ""), rows, right=(2,)))
    return made


def _latent(name: str, details: PassDetails) -> list[Section]:
    if (latent := details.get("latent")) is None:
        return []
    lost = latent["expected"]
    made = [
        Section(
            f"`{name}`: a block caches {latent['cached']} numbers per token, {latent['cached_before']} before "
            f"({latent['keys']} of the key, {latent['values']} of the values, a constant). Expected divergence by second "
            f"order: {fixed(lost['keys'], 4)} nats per token of the keys, {fixed(lost['values'], 4)} of the values. "
            f"{_decode(latent)}"
        )
    ]
    rows = [
        (
            str(row["keys"]),
            str(row["values"]),
            fixed(row["divergence"], 4),
            "chosen" if row["keys"] == latent["keys"] else "",
        )
        for row in latent["tried"]
    ]
    if rows:
        text = f"`{name}`, divisions of the cache. Divergence from the original on held-out calibration samples."
        made.append(Section(text, ("keys", "values", "divergence", ""), rows, right=(0, 1, 2)))
    return made


def _decode(latent: LatentDetails) -> str:
    if (decode := latent.get("decode")) is None:
        return "transformers decodes more slowly than before, since it expands the whole latent at every step."
    return (
        f"transformers expands the whole latent at every step: after {decode['tokens']:,.0f} cached tokens a block takes "
        f"{ratio(decode['ratio'])} of the original's time for the next one."
    )


def _windows(name: str, details: PassDetails) -> list[Section]:
    if not (rows := window_rows(details)):
        return []
    text = "Loss: nats per token expected of a window there, to second order, and its share of the sum over all blocks."
    head = ("block", "window", "loss", "share")
    return [Section(f"`{name}`, windows by block. {text}", head, rows, right=(0, 1, 2, 3))]


def _experts(name: str, details: PassDetails) -> list[Section]:
    if not (rows := expert_rows(details)):
        return []
    head = ("block", "experts", "which", "fewest tokens of another", "tokens read", "would reach them")
    text = (
        "Experts that no calibration token reached, so that only their weights could be used. If no token in N reaches "
        f"an expert, {TIMES} N tokens likely do."
    )
    return [Section(f"`{name}`. {text}", head, rows, right=(0, 3, 4, 5))]


def _gaps(name: str, details: PassDetails) -> list[Section]:
    rows = gap_rows(details)
    text = "The last matrix in front of removed blocks takes over a part of them. Error of the block's output before ▶ after."
    return [Section(f"`{name}`. {text}", ("block", "matrix", "error"), rows, right=(0,))] if rows else []


def _blocks(name: str, details: PassDetails) -> list[Section]:
    if not (rows := block_rows(details)):
        return []
    columns = (
        "block",
        "layers",
        "sparsity, units, format or rank",
        "mean error",
        "worst layer",
        "reconstruction",
        "seconds",
    )
    text = "Relative error of each layer's output; reconstruction: error of the block's output before ▶ after."
    return [Section(f"`{name}`, by block. {text}", columns, rows, right=(0, 1, 2, 3, 6))]


def _training(training: TrainingDetails, name: str, picture: str) -> Section:
    """Sentences on a training, its picture, and a table of held-out losses."""
    held, of = training["held_out"], training.get("of", "tokens")
    text = (
        f"`{name}`, training: {training['tokens']:,} {of} in {training['steps']:,} steps, {training['epochs']:g} times "
        f"through the data, {training['tokens_per_second']:,.0f} {of} per second. Held-out loss {fixed(held[0]['loss'], 4)} ▶ "
        f"{fixed(min(row['loss'] for row in held), 4)}, best at step {training['best_step']}."
    )
    if "rate" in training:
        text += f" Peak learning rate {training['rate']:.3g}."
    if training["stopped"]:
        text += f" Stopped early: {training['stopped']}."
    if training.get("kept"):
        kept = markdown(", ".join(f"`{name}`" for name in training["kept"]))
        text += f" Copied unchanged from the input, as the model does not use them: {kept}."
    if "teacher_cache" in training:
        cache = training["teacher_cache"]
        text += (
            f" Teachers were read from a cache of {cache['k']} tokens, {cache['bytes_per_token']} bytes per token; "
            f"{cache['samples_added']:,} samples were added to it."
        )
    names = [key for key in training["losses"][-1] if key not in ("step", "loss")] if training["losses"] else []
    by_step = {row["step"]: row for row in training["losses"]}
    rows = []
    for row in held:
        mean = by_step.get(row["step"], {})
        shown = [fixed(mean[key], 4) if key in mean else "" for key in names]
        rows.append([f"{row['step']:,}", fixed(row["loss"], 4), *shown])
    head = ("step", "held out", *(f"{key}, trained on" for key in names))
    return Section(text, head, rows, right=range(len(head)), picture=picture)


def _details(details: Mapping[str, Any]) -> str:
    return "; ".join(f"{key}: {_short(value)}" for key, value in details.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return significant(value, 4)
    if isinstance(value, Mapping):
        shown = [f"{k} {_short(v)}" for k, v in list(value.items())[:12]]
        return ", ".join(shown) + (" …" if len(value) > 12 else "")
    if isinstance(value, (list, tuple)):
        return ", ".join(_short(v) for v in value[:32]) + (" …" if len(value) > 32 else "")
    return str(value)
