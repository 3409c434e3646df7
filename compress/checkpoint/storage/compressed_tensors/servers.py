"""Which compressed-tensors checkpoints servers open: their rules, read in their sources, as a table. Imports no torch.

vLLM 0.32.0: ``compressed_tensors.py`` (`_get_scheme_from_parts`), its schemes, ``compressed_tensors_embedding.py``,
``compressed_tensors_moe.py`` (`get_moe_method`), ``fp8_utils.py`` (`validate_fp8_block_shape`).
SGLang 0.5.23: ``compressed_tensors.py``, ``schemes/compressed_tensors_wNa16.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from compress.architectures.model_map import Linear, model_map
from compress.spec.formats import BLOCK, QuantFormat
from compress.spec.spec import Spec

#: Group sizes of the kernels for weights alone; 0 for one scale per output.
_MARLIN = (0, 32, 64, 128)
#: Names of the matrices that servers join into one, in their order.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))
_TURING, _ADA, _HOPPER, _HUMMING, _CPU = (
    "GPUs from Turing on",
    "GPUs from Ada on",
    "Hopper GPUs",
    "GPUs with the package humming",
    "CPUs",
)


class Server(NamedTuple):
    """A server.

    Attributes:
        kernel: a number format ▶ where it computes with such matrices; None where it refuses them.
        experts: the same for the matrices of experts.
        tables: the same for the tables that tokens are looked up in.
        caches: formats of the cache that it quantises; it ignores others.
    """

    name: str
    kernel: Callable[[QuantFormat], str | None]
    experts: Callable[[QuantFormat], str | None]
    tables: Callable[[QuantFormat], str | None]
    caches: frozenset[str]

    def place(self, linear: Linear) -> str | None:
        """Where it computes with a matrix of codes; None where it refuses it."""
        assert linear.tensor.quant_format is not None, linear
        rules = (
            self.tables if linear.role == "embedding" else self.experts if linear.expert is not None else self.kernel
        )
        return rules(linear.tensor.quant_format)


def _vllm(f: QuantFormat) -> str | None:
    inputs = f.activations
    if f.is_integer and inputs is None:
        return _TURING if f.bits in (4, 8) and f.group in _MARLIN and (f.symmetric or f.bits == 4) else _HUMMING
    if f.format == "int8":
        plain = f.symmetric and not f.group
        return _TURING if plain and (inputs or "").partition("-")[0] == "int8" and inputs != "int8-dynamic" else None
    if f.is_integer:
        if inputs in ("int8", "int4"):
            return _HUMMING
        return _HOPPER if (f.format, inputs, f.group, f.symmetric) == ("int4", "fp8", 128, True) else None
    if f.format == "fp8":
        return None if (f.group and not f.block) or not f.symmetric else _TURING if inputs is None else _ADA
    if f.format == "nvfp4":
        return _TURING if inputs in (None, "nvfp4", "nvfp4-wide") else None
    if f.format == "mxfp4":
        return "GPUs from Ampere on" if inputs in (None, "mxfp4", "fp8", "fp8-group") else None
    return _TURING if f.format == "mxfp8" else None


def _vllm_experts(f: QuantFormat) -> str | None:
    inputs = f.activations
    if f.is_integer and inputs is not None:
        if f.format == "int8":
            return _TURING if f.symmetric and not (f.group or f.whole) and inputs == "int8" else None
        return (
            _CPU if (f.format, inputs, f.symmetric) == ("int4", "int8", True) else _vllm(f) if inputs == "fp8" else None
        )
    if f.format == "fp8":
        pairs = {"fp8": not (f.whole or f.block), "fp8-group": f.block, "fp8-tensor": f.whole, "fp8-dynamic": f.whole}
        return _vllm(f) if pairs.get(inputs or "", False) else None
    return _vllm(f)


def _vllm_tables(f: QuantFormat) -> str | None:
    plain = f.is_integer and f.symmetric and f.activations is None and not f.whole
    return _TURING if plain and 32 % f.bits == 0 else None


def _sglang(f: QuantFormat) -> str | None:
    inputs = f.activations
    if f.is_integer and inputs is None:
        return _TURING if f.bits in (4, 8) and f.group in _MARLIN else None
    if f.format in ("int8", "fp8"):
        plain = f.symmetric and (not f.group or f.block)
        if f.format == "fp8" and inputs is None:
            return _TURING if plain and not f.block else None
        plain = plain and inputs != "int8-dynamic" and str(inputs).startswith(f.format)
        return (_ADA if f.format == "fp8" else _TURING) if plain else None
    return _TURING if f.format == "nvfp4" and inputs in (None, "nvfp4", "nvfp4-wide") else None


SERVERS = (
    Server("vLLM 0.32", _vllm, _vllm_experts, _vllm_tables, frozenset({"fp8", "fp8-tensor", "fp8-head"})),
    Server("SGLang 0.5.23", _sglang, _sglang, lambda _: None, frozenset({"fp8-tensor"})),
)
VLLM = SERVERS[0]


def refusals(spec: Spec, server: Server) -> list[str]:
    """Why a server does not open a checkpoint of codes as stock loaders read it, a phrase for each reason."""
    first: dict[QuantFormat, str] = {}
    for linear in _coded(spec):
        if (f := linear.tensor.quant_format) is not None and server.place(linear) is None:
            first.setdefault(f, linear.name)
    reasons = [f"no scheme for {_words(f)} ({name})" for f, name in first.items()]
    return [*reasons, *_unequal(spec), *_cut_blocks(spec)]


def _coded(spec: Spec) -> list[Linear]:
    """The matrices of codes that have bytes of their own."""
    linears = model_map(spec).linears
    return [linears[t.name] for t in spec.stored() if t.quant_format is not None]


def servers_note(spec: Spec) -> str | None:
    """A sentence on the servers that open a checkpoint, and on what they need; None for one without codes for stock loaders."""
    coded = _coded(spec)
    if spec.structure.compact or not coded:
        return None
    parts = []
    for server in SERVERS:
        if reasons := refusals(spec, server):
            parts.append(f"{server.name} does not open it: {'; '.join(reasons)}")
            continue
        needs = " and ".join(sorted({str(server.place(linear)) for linear in coded}))
        cache = spec.structure.kv_cache
        ignored = f" (it ignores the {cache} cache)" if cache and cache not in server.caches else ""
        parts.append(f"{server.name} opens it on {needs}{ignored}")
    return "; ".join(parts)


def _words(quant_format: QuantFormat) -> str:
    """A number format in words."""
    size = "blocks" if quant_format.block else f"groups of {quant_format.group}" if quant_format.group else ""
    zero = "" if quant_format.symmetric else " with zero points"
    inputs = f" and inputs in {quant_format.activations}" if quant_format.activations else ""
    return f"{quant_format.format}{f' in {size}' if size else ''}{zero}{inputs}"


def _joined(spec: Spec) -> Iterator[list[Linear]]:
    """The matrices that servers join, each group in its order."""
    by_module: dict[str, dict[str, Linear]] = {}
    for linear in model_map(spec).linears.values():
        stem, _, end = linear.module.rpartition(".")
        by_module.setdefault(stem, {})[end] = linear
    for beside in by_module.values():
        for names in _JOINED:
            if len(group := [beside[name] for name in names if name in beside]) > 1:
                yield group


def _unequal(spec: Spec) -> Iterator[str]:
    """Joined matrices, and experts of a block, of several formats."""
    experts: dict[str, list[Linear]] = {}
    for linear in model_map(spec).linears.values():
        if linear.expert is not None:
            experts.setdefault(linear.module.partition(f".{linear.expert}.")[0], []).append(linear)
    for group in [*_joined(spec), *experts.values()]:
        if len({linear.tensor.quant_format for linear in group}) > 1:
            yield f"{group[0].module} and {group[-1].module} have different formats, and it joins them"
            return


def _cut_blocks(spec: Spec) -> Iterator[str]:
    """Joined matrices but the last whose outputs are not a whole number of blocks."""
    for group in _joined(spec):
        for linear in group[:-1]:
            if (f := linear.tensor.quant_format) is not None and f.block and linear.O % BLOCK:
                yield f"{linear.module} has {linear.O} outputs, which are not a whole number of blocks"
                return
