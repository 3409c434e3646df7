"""Figures of a cell of the table, from the outputs of a runtime and those of a reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import numpy as np

from tools.runtimes.environments import BUILD

#: Most characters of a reason.
LONGEST = 200


def log_softmax(logits: Any) -> Any:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def figures(values: Mapping[str, Any], reference: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Figures by name, or ``no``: why the runtime does not open the artefact. ``asked``: as of `models.asked`.

    ``largest``: largest difference of logits, or of hidden states; ``from_float64``: that of the first ones from what float64
    gives. ``kl``: nats per token. ``gap``: mean difference of the
    log-probabilities of the likeliest tokens; ``top1``: share of places with the same likeliest token. ``halves``: largest
    difference of the logits when the text is read in halves. ``greedy``: equal tokens; ``of``: decoded ones. ``ids``: whether
    the ids of the text are equal. ``bits_per_byte`` and its ``difference``. ``cosine``: least of embeddings. What ends in
    ``_by_default``: with the runtime's own settings, where others were chosen.
    """
    if "error" in values:
        return {"no": reason(values["error"])}
    result: dict[str, Any] = {}
    if "logits" in values and "logits" in reference:
        result["largest"] = float(np.abs(values["logits"] - reference["logits"]).max())
        if (wide := reference.get("wide")) is not None:
            result["from_float64"] = float(np.abs(values["logits"][: len(wide)] - wide).max())
        if asked["causal"]:
            p, q = log_softmax(reference["logits"]), log_softmax(values["logits"])
            result["kl"] = max(0.0, float((np.exp(p) * (p - q)).sum(-1).mean()))
    for end in ("", "_by_default"):
        if f"top_ids{end}" in values:
            wanted, places = log_softmax(reference["logits"]), values[f"top_ids{end}"]
            rows = np.arange(len(places))
            result[f"gap{end}"] = float(np.abs(values[f"top_logprobs{end}"] - wanted[rows[:, None], places]).mean())
            result[f"top1{end}"] = float((wanted[rows].argmax(-1) == places[:, 0]).mean())
    if "halves" in values:
        result["halves"] = float(np.abs(values["halves"] - values["logits"]).max())
    if "greedy" in values and "greedy" in reference:
        tokens = values["greedy"]
        result |= {"greedy": int((tokens == reference["greedy"][: len(tokens)]).sum()), "of": len(tokens)}
    if "text_ids" in values:
        result["ids"] = [int(number) for number in values["text_ids"]] == asked["text_ids"]
    exact = {}
    if "bits_per_byte" in values:
        result["difference"] = values["bits_per_byte"] - reference["bits_per_byte"]
        exact["bits_per_byte"] = round(values["bits_per_byte"], 4)
    if "embeddings" in values:
        exact["cosine"] = round(float((values["embeddings"] * reference["embeddings"]).sum(-1).min()), 7)
    return _rounded(result) | exact


def reason(error: str) -> str:
    """An error, shortened for a table, without the folder of the artefact."""
    text = re.sub(rf"{re.escape(str(BUILD))}/\S+", "FOLDER", error).removesuffix(" Reasons:")
    return shorten(text.replace("|", "¦"), LONGEST, placeholder=" …")


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Three significant digits, enough for a table."""
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in values.items()}
