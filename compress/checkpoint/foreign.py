"""Reading the codes of compressed-tensors checkpoints that other tools wrote. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.checkpoint import codecs
from compress.checkpoint.grids import INTEGERS, Grid
from compress.checkpoint.headers import Entry
from compress.checkpoint.patterns import Matcher
from compress.checkpoint.quantization import KEY, METHOD, in_memory
from compress.checkpoint.spec import FP8, INT8, MXFP4, NVFP4, PACKED, Spec, Structure, Tensor
from compress.errors import CheckpointError


def parse(structure: Structure, entries: Mapping[str, Entry], where: str) -> dict[str, Tensor]:
    """Coded tensors of a compressed-tensors checkpoint, from its config and its arrays.

    Raises:
        CheckpointError: another method, patterns that cannot be used, or codes of a kind that `Grid` cannot express.
    """
    groups = Groups(structure.config[KEY], where)
    found: dict[str, Tensor] = {}
    for key, entry in entries.items():
        if not key.endswith(".weight_scale"):
            continue
        name = key.removesuffix("_scale")
        module = name.removesuffix(".weight")
        scheme = groups.scheme(in_memory(Spec(structure), module))
        if scheme is None:
            raise CheckpointError(f"has scales for {module}, which no group of its {KEY} names", where=where)
        grid, chain = _grid(scheme, module, where)
        packed = entries.get(f"{name}_packed") or entries.get(name)
        if packed is None or len(packed.shape) != 2 or len(entry.shape) != 2:
            raise CheckpointError(f"lacks the codes of {module}, or has them in a shape of its own", where=where)
        inputs = packed.shape[1]
        if chain == PACKED:
            inputs = entry.shape[1] * grid.group if grid.group else packed.shape[1] * 32 // grid.bits
        elif chain in (MXFP4, NVFP4):
            inputs *= 2
        dtype = "BF16" if chain in (MXFP4, NVFP4) else entry.dtype
        tensor = Tensor(name, (packed.shape[0], inputs), dtype, storage=chain, grid=grid)
        for part in codecs.parts(tensor):
            other = entries.get(part.key)
            if other is None or other.shape != part.shape or other.dtype != part.dtype:
                raise CheckpointError(f"array {part.key} is not what the {KEY} says", where=where)
        found[name] = tensor
    return found


class Groups:
    """The ``config_groups`` of a quantization config, by what they target."""

    def __init__(self, quantization: Any, where: str) -> None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method != METHOD:
            raise CheckpointError(
                f"holds weights quantised by {method!r}, which this version cannot read",
                where=where,
                fix="start from the unquantised checkpoint",
            )
        self._matcher = Matcher(where)
        self._format, self._where = quantization.get("format"), where
        self._ignored = self._names(quantization.get("ignore"))
        self._targets: dict[str, Mapping[str, Any]] = {}
        groups = quantization.get("config_groups") or {}
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise CheckpointError(f"has a {KEY} with damaged config_groups", where=where)
        for group in groups.values():
            self._targets.update((target, group) for target in self._names(group.get("targets")))
        self._ordered = sorted(self._targets, key=lambda target: ("re:" in target, target))

    def _names(self, found: Any) -> list[str]:
        if not isinstance(found or [], list) or not all(isinstance(name, str) for name in found or []):
            raise CheckpointError(
                f"has a {KEY} whose targets or ignored modules are no list of names", where=self._where
            )
        return found or []

    def scheme(self, module: str) -> Mapping[str, Any] | None:
        """The group that a linear layer belongs to, as compressed-tensors finds it; None where there is none.

        Names count before patterns, these before classes, and among several the first of the alphabet.

        Args:
            module: its name in memory.
        """
        if "Linear" in self._ignored or self._matcher.any(self._ignored, module):
            return None
        target = next((target for target in self._ordered if self._matcher.matches(target, module)), None)
        if target is None and "Linear" not in self._targets:
            return None
        group = self._targets[target or "Linear"]
        return {"format": self._format, **{k: v for k, v in group.items() if v is not None}}


def _grid(scheme: Mapping[str, Any], module: str, where: str) -> tuple[Grid, tuple[str, ...]]:
    weights, chain = scheme.get("weights") or {}, (str(scheme.get("format")),)
    strategy, bits = weights.get("strategy"), int(weights.get("num_bits", 0))
    group = int(weights.get("group_size") or 0)
    name = {
        PACKED: f"int{bits}", INT8: f"int{bits}", FP8: "fp8", MXFP4: "mxfp4", NVFP4: "nvfp4",
    }.get(chain)  # fmt: skip
    fits = strategy in ("group", "tensor_group", "channel") and weights.get("actorder") != "group"
    if name is None or not fits or (name.startswith("int") and name not in INTEGERS):
        raise CheckpointError(
            f"stores {module} as {scheme.get('format')}, {bits} bits by {strategy}, which this version cannot read",
            where=where,
        )
    acts = scheme.get("input_activations")
    activations = None if not acts else "int8" if acts.get("type") == "int" else "fp8"
    grid = Grid(name, max(group, 0), bool(weights.get("symmetric", True)), activations=activations)  # type: ignore[arg-type]
    return grid, chain
