"""Families, the amounts that each can give up, and the passes of a combination. Headers alone, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.architectures.model_map import model_map
from compress.recipe.fit import FamilyName
from compress.spec.spec import Spec

#: What a family gives up: a number of blocks or KV heads, a share of neurons or weights, stored blocks that remain, a format;
#: of trellis codes that they are used.
Concession = int | float | str
#: Family ▶ what it gives up.
Choice = Mapping[FamilyName, Concession]

_BLOCKS = (1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
_HEADS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
_NEURONS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
_WEIGHTS = (0.3, 0.5, 0.65)
_TABLES = ("int8", "int6", "int4", "int3")
_SHARED = (2, 3, 4)
#: The amount of the family of trellis codes.
TRELLIS = "codes"
#: Formats of a budget with trellis codes: of more than four bits integers are as good.
TRELLIS_FORMATS = ("int8", "int6", "int5", "trellis4", "trellis3", "trellis2")


def amounts(family: FamilyName, spec: Spec) -> list[Concession]:
    """The amounts that a family could give up of a checkpoint, least first; a plan tells whether its passes take them."""
    mapped = model_map(spec)
    depth, heads = mapped.depth, mapped.kv_heads
    if family == "depth":
        return sorted({max(1, round(share * depth)) for share in _BLOCKS} - {depth})
    if family == "width":
        return list(_NEURONS)
    if family == "kv_heads":
        return sorted({max(1, round(share * heads)) for share in _HEADS} - {heads})
    if family == "sharing":
        return [depth // each for each in _SHARED if depth % each == 0 and depth > each]
    if family == "trellis":
        return [TRELLIS]
    return list(_WEIGHTS) if family == "sparsity" else list(_TABLES)


def at_least(family: FamilyName, measured: Mapping[Concession, float], amount: Concession, spec: Spec) -> float:
    """The least divergence that a larger amount can be expected to have: each further part costs no less than the earlier ones.

    Args:
        measured: smaller amounts and their divergences, at least one.
    """
    last, cost = list(measured.items())[-1]
    if isinstance(last, str) or isinstance(amount, str):
        return cost
    before, now = (model_map(spec).depth - each if family == "sharing" else each for each in (last, amount))
    return cost * now / before


def tables(spec: Spec) -> list[str]:
    """Modules of the tables of tokens and of the head, those that store weights."""
    return list(dict.fromkeys(t.module for t in model_map(spec).tables))


@dataclass(frozen=True)
class Making:
    """How the passes of a combination are made.

    Attributes:
        effort: of passes that have one. tokens: of distillation after weights were removed or shared; 0 for none.
    """

    effort: str
    tokens: int = 0

    def smaller(self, choice: Choice) -> list[dict[str, Any]]:
        """The passes before the cast, as a recipe has them."""
        passes: list[dict[str, Any]] = []
        keys = {"depth": "layers", "width": "mlp", "kv_heads": "kv_heads"}
        removed = {key: choice[family] for family, key in keys.items() if family in choice}  # type: ignore[index]
        if removed:
            passes.append({"prune_structured": {**removed, "effort": self.effort}})
        if "sharing" in choice:
            passes.append({"share": {"groups": choice["sharing"], "effort": self.effort}})
        if passes and self.tokens:
            passes.append({"distill": {"teacher": "original", "tokens": self.tokens}})
        if "sparsity" in choice:
            passes.append({"prune_unstructured": {"sparsity": choice["sparsity"], "effort": self.effort}})
        return passes

    def cast(self, choice: Choice, modules: Sequence[str], amount: Mapping[str, Any]) -> dict[str, Any]:
        """The cast that ends a combination. ``modules``: of the tables. ``amount``: its bits, bytes or format."""
        cast = {**amount, "effort": self.effort}
        if "trellis" in choice and "weights" not in amount:
            cast["formats"] = list(TRELLIS_FORMATS)
        if "embeddings" in choice:
            cast["overrides"] = dict.fromkeys(modules, choice["embeddings"])
        return {"cast": cast}


def text(choice: Choice, spec: Spec) -> str:
    """A combination in words."""
    depth, heads = model_map(spec).depth, model_map(spec).kv_heads
    words: dict[FamilyName, str] = {
        "depth": "{} of " + str(depth) + " blocks removed",
        "width": "{} of the neurons removed",
        "kv_heads": "{} of " + str(heads) + " KV heads removed, with the heads that read them",
        "sharing": "{} of " + str(depth) + " blocks stored",
        "sparsity": "{} of the weights removed",
        "embeddings": "tables as {}",
        "trellis": "trellis {}",
    }
    shown = {f: f"{100 * a:g} %" if isinstance(a, float) else str(a) for f, a in choice.items()}
    return ", ".join(words[f].format(shown[f]) for f in choice) or "bits alone"
