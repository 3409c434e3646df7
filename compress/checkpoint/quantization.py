"""``quantization_config`` of compressed-tensors checkpoints: written from a spec's grids, and read from files of other tools.

Format: https://github.com/vllm-project/compressed-tensors. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress import architectures
from compress.checkpoint import codecs
from compress.checkpoint.grids import INTEGERS, Grid
from compress.checkpoint.headers import Entry
from compress.checkpoint.spec import FP8, INT8, MXFP4, NVFP4, PACKED, Spec, Tensor
from compress.errors import CheckpointError

KEY = "quantization_config"
_METHOD = "compressed-tensors"
_EIGHT = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
#: Formats of cached keys and values ▶ scheme. vLLM takes these 8 bits alone (compressed_tensors.py, validate_kv_cache_scheme).
#: Dynamic: without scales in the file; vLLM takes 1, SGLang does not quantise.
_CACHES: Mapping[str, dict[str, Any]] = {
    "fp8": {**_EIGHT, "strategy": "tensor", "dynamic": True},
    "fp8-tensor": {**_EIGHT, "strategy": "tensor", "dynamic": False},
    "fp8-head": {**_EIGHT, "strategy": "attn_head", "dynamic": False},
}


def render(spec: Spec) -> dict[str, Any] | None:
    """The config for the grids of a spec as stored; None where nothing is coded.

    One group of equal codes targets all linear layers but those it ignores; several name their modules.
    """
    by_grid: dict[Grid, list[str]] = {}
    for tensor in spec.stored():
        if tensor.grid is not None:
            by_grid.setdefault(tensor.grid, []).append(tensor.module)
    if not by_grid:
        return None
    groups = {}
    for number, (grid, modules) in enumerate(by_grid.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(by_grid) == 1 else [f"re:.*{re.escape(m)}$" for m in modules],
            "weights": _weights(grid),
            "input_activations": _activations(grid),
            "output_activations": None,
            "format": codecs.stock_chain(grid)[0],
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": _METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": _ignored(spec) if len(by_grid) == 1 else [],
        "kv_cache_scheme": _CACHES[spec.structure.kv_cache] if spec.structure.kv_cache else None,
        "global_compression_ratio": None,
    }


def _weights(grid: Grid) -> dict[str, Any]:
    strategy = "tensor_group" if grid.format == "nvfp4" else "group" if grid.group else "channel"
    result: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "int" if grid.is_integer else "float",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group or None,
        "dynamic": False,
    }
    if grid.format == "mxfp4":
        result["scale_dtype"] = "torch.uint8"
    return result


def _activations(grid: Grid) -> dict[str, Any] | None:
    if grid.activations is None:
        return None
    kind = "int" if grid.activations == "int8" else "float"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def _ignored(spec: Spec) -> list[str]:
    """Modules with matrices that are no codes, and the head, which tied files leave out."""
    record = architectures.of(spec.structure.config)
    matrices = [t.module for t in spec.stored() if t.grid is None and len(t.shape) == 2 and t.name.endswith(".weight")]
    if record.head is not None and not any(t.module == record.head and t.grid for t in spec.stored()):
        matrices.append(record.head)
    return list(dict.fromkeys(matrices))


def parse(config: Mapping[str, Any], entries: Mapping[str, Entry], where: str) -> dict[str, Tensor]:
    """Coded tensors of a compressed-tensors checkpoint that another tool wrote, from its config and its arrays.

    Raises:
        CheckpointError: another method, or codes of a kind that `Grid` cannot express.
    """
    quantization = config[KEY]
    if not isinstance(quantization, dict) or quantization.get("quant_method") != _METHOD:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"holds weights quantised by {method!r}, which this version cannot read",
            where=where,
            fix="start from the unquantised checkpoint",
        )
    found: dict[str, Tensor] = {}
    for key, entry in entries.items():
        if not key.endswith(".weight_scale"):
            continue
        name = key.removesuffix("_scale")
        module = name.removesuffix(".weight")
        scheme = _scheme(quantization, module)
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


def _scheme(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """The group that a module belongs to: one that names it, else one for all linear layers."""
    groups = [g for g in (quantization.get("config_groups") or {}).values() if isinstance(g, dict)]
    if any(_named(target, module) for target in quantization.get("ignore") or ()):
        return None
    for group in groups:
        if any(_named(target, module) for target in group.get("targets") or ()):
            return {"format": quantization.get("format"), **{k: v for k, v in group.items() if v is not None}}
    for group in groups:
        if "Linear" in (group.get("targets") or ()):
            return {"format": quantization.get("format"), **{k: v for k, v in group.items() if v is not None}}
    return None


def _named(target: str, module: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module


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


def strip(spec: Spec) -> Spec:
    """The spec whose config says nothing of quantisation: the tensors say it, and the structure how keys are cached."""
    config = dict(spec.structure.config)
    scheme = (config.pop(KEY, None) or {}).get("kv_cache_scheme") or {}
    cached = next(
        (
            name
            for name, known in _CACHES.items()
            if known.items() <= {"group_size": None, "symmetric": True, "dynamic": False, **scheme}.items()
        ),
        None,
    )
    return replace(spec, structure=replace(spec.structure, config=config, kv_cache=cached))
