"""Drafts of recipes: passes with the loss that they may cost, by goal and by the names of presets."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from compress.errors import CompressError
from compress.passes.cast import schemes
from compress.presets.facts import Facts

#: What a recipe is for: fewest bytes at little loss; fewer blocks and neurons, which every runtime computes faster; 8 bits.
GOALS = ("small", "fast", "accurate")
#: The loss that gates allow, from that of 16-bit floats to that of a changed structure.
Loss: TypeAlias = Literal["least", "little", "some", "much"]


@dataclass(frozen=True)
class Draft:
    """Passes for a checkpoint.

    Attributes:
        passes: entries of a recipe. notes: a sentence about each of them.
        loss: what the gates allow. store: of the result.
        measured: metrics besides those of the model's task.
    """

    passes: tuple[dict[str, dict[str, Any]], ...]
    notes: tuple[str, ...]
    loss: Loss
    store: Literal["stock", "compact"] = "stock"
    measured: tuple[str, ...] = ()


def of_goal(goal: str, facts: Facts) -> Iterator[Draft]:
    """Drafts for a goal, the best first; one that a plan refuses is passed over."""
    if goal == "fast":
        yield from _fast(facts)
    if goal == "small":
        smaller, stock = _cast(facts, "int4", table="int8"), _cast(facts, "int4")
        yield from (smaller, stock) if facts.table_bytes * 4 > _block_bytes(facts) else (stock, smaller)
        yield _cast(facts, "int4", method="mse")
    yield _cast(facts, "int8")
    yield _cast(facts, "int8", table="int8")
    if facts.wide:
        yield _floats()


def within(facts: Facts) -> Iterator[Draft]:
    """Drafts by the bytes that they leave, the most accurate first."""
    if facts.wide:
        yield _floats()
    yield _cast(facts, "int8")
    yield _cast(facts, "int8", table="int8")
    for format_ in ("int4", "int3"):
        yield _cast(facts, format_)
        yield _cast(facts, format_, table="int8")
    yield _cast(facts, "int3", table="int4")
    yield _cast(facts, "int2", table="int4")


def _block_bytes(facts: Facts) -> int:
    return sum(tensor.dense_bytes for tensor in facts.spec.stored()) - facts.table_bytes


def _floats() -> Draft:
    note = "16-bit floats in place of 32-bit floats: half of the bytes."
    return Draft(({"cast": {"weights": "bf16"}},), (note,), "least")


def _cast(facts: Facts, format_: str, *, table: str | None = None, method: str | None = None) -> Draft:
    """Codes for the matrices of the blocks, by rounding at 8 bits and else on calibration data; with ``table`` also for tables.

    Tables of 32-bit floats get 16 bits.
    """
    bits, settings = format_.removeprefix("int"), {"weights": format_}
    note = f"{bits}-bit integers in the blocks"
    if method or bits == "8" or not facts.calibrated:
        settings["method"] = method or ("rtn" if bits == "8" else "mse")
        note += ", rounded without data."
    else:
        note += ": GPTQ on calibration text, with error correction."
    modules = [tensor.module for tensor in facts.tables]
    if table is not None and modules:
        settings["overrides"] = dict.fromkeys(modules, table)  # type: ignore[assignment]
        note += f" The table of tokens gets {table.removeprefix('int')} bits."
    elif wide := [t.module for t in facts.tables if t.dtype in ("F32", "F64")]:
        settings["overrides"] = dict.fromkeys(wide, "bf16")  # type: ignore[assignment]
        note += " The table of tokens gets 16 bits."
    loss: Loss = "little" if bits == "8" else "some" if bits == "4" else "much"
    return Draft(({"cast": settings},), (note,), loss, "compact" if table is not None else "stock")


def _fast(facts: Facts) -> Iterator[Draft]:
    """Fewer blocks and neurons, which every runtime computes faster; then 8-bit inputs, which some do."""
    measured = ("latency",) if facts.decodes else ()
    layers = max(1, facts.map.depth // 8) if facts.map.known and facts.map.depth >= 4 else None
    what = {"mlp": "a quarter of the neurons", "layers": f"{layers} of {facts.map.depth} blocks" if layers else ""}
    for keys in (("layers", "mlp"), ("mlp",), ("layers",)):
        if facts.calibrated and not (layers is None and "layers" in keys):
            settings: dict[str, Any] = {"layers": layers, "mlp": "25%"}
            note = f"Remove {' and '.join(what[key] for key in keys)}; the rest makes up for it on calibration text."
            yield Draft(({"prune_structured": {k: settings[k] for k in keys}},), (note,), "much", measured=measured)
    note = "8-bit weights and inputs: fast where the runtime has kernels for them, as vLLM on a GPU."
    yield Draft(({"cast": {"scheme": "W8A8", "method": "rtn"}},), (note,), "some")


def _of_scheme(name: schemes.SchemeName) -> Draft:
    scheme = schemes.SCHEMES[name]
    few = scheme.weights in ("int3", "int2") or scheme.activations in ("int4", "mxfp4", "nvfp4")
    coarse = scheme.weights in ("int4", "nvfp4", "mxfp4") or scheme.activations is not None
    rounded = scheme.weights in ("int8", "fp8", "mxfp8")
    loss: Loss = "much" if few or scheme.weights == "int5" else "some" if coarse else "little"
    settings: dict[str, Any] = {"scheme": name, **({"method": "rtn"} if rounded else {})}
    note = f"weights in {scheme.weights}"
    note += (
        f", inputs in {scheme.activations}" if scheme.activations else "" if scheme.symmetric else ", with zero points"
    )
    return Draft(({"cast": settings},), (note,), loss, "stock" if scheme.symmetric else "compact")


#: Names of presets ▶ their drafts: the schemes of `cast`, and a few more.
PRESETS: Mapping[str, Draft] = MappingProxyType(
    {
        **{name: _of_scheme(name) for name in schemes.SCHEMES},
        "2:4": Draft(
            ({"prune_unstructured": {"pattern": "2:4"}},),
            ("two of every four weights removed, as sparse tensor cores read them",),
            "much",
        ),
        "50%": Draft(
            ({"prune_unstructured": {"sparsity": "50%"}},), ("half of the weights removed",), "much", "compact"
        ),
        "recovery": Draft(
            ({"prune_structured": {"mlp": "25%"}}, {"distill": {"teacher": "original", "epochs": 2}}),
            ("a quarter of the neurons removed", "distilled from the original"),
            "much",
        ),
    }
)
_NARROW_FLOATS = ("nvfp4", "mxfp4", "mxfp8")


def of_preset(name: str, facts: Facts) -> Draft:
    """The draft of a preset. The weights beside floats with fixed groups become bf16 first.

    Raises:
        CompressError: no preset has that name.
    """
    draft = PRESETS.get(name) or PRESETS.get(schemes.find(name) or "")
    if draft is None:
        raise _unknown(name)
    scheme = schemes.SCHEMES.get(draft.passes[0].get("cast", {}).get("scheme", ""))
    if scheme is not None and scheme.weights in _NARROW_FLOATS and not facts.bf16:
        passes = ({"cast": {"weights": "bf16"}}, *draft.passes)
        return replace(draft, passes=passes, notes=("weights in bf16", *draft.notes))
    return draft


def _unknown(name: str) -> CompressError:
    refused = schemes.refusal(name)
    if refused is None:
        lower = {known.lower(): known for known in PRESETS}
        close = difflib.get_close_matches(name.lower(), lower, n=1)
        fix = f"did you mean `{lower[close[0]]}`?" if close else f"there are: {', '.join(PRESETS)}"
        return CompressError(f"no preset is called `{name}`", where="--preset", fix=fix)
    what, _, nearest = refused.partition(": use `scheme: ")
    return CompressError(what, where="--preset", fix=f"use --preset {nearest.strip('`')}")
