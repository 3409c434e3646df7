"""Codes that stock loaders read. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from compress.architectures.inferred import Inferred, starred
from compress.architectures.model_map import model_map
from compress.checkpoint.storage import format_chain
from compress.checkpoint.storage.compressed_tensors.servers import VLLM
from compress.checkpoint.storage.packed import INT8, PACKED
from compress.checkpoint.storage.small_float import FP8, MXFP4
from compress.spec.formats import QuantFormat
from compress.spec.spec import Runtime, Spec, Tensor


def stock_holds(spec: Spec) -> Callable[[Tensor], bool]:
    """Predicate: whether the runtime that the spec is for reads a tensor as stored, without code of this project."""
    return _vllm_holds(spec) if spec.structure.runtime == "vllm" else _transformers_holds(spec)


def runtime_of(spec: Spec) -> Runtime:
    """The runtime for which a checkpoint was written that is no compact one: transformers, unless it refuses some codes."""
    holds = _transformers_holds(spec)
    return "transformers" if all(holds(tensor) for tensor in spec.stored()) else "vllm"


def _vllm_holds(spec: Spec) -> Callable[[Tensor], bool]:
    """vLLM's own rules, for the linear layers, experts and tables that it builds; it has no matrices stored [in, out]."""
    mapped = model_map(spec)

    def holds(tensor: Tensor) -> bool:
        quant_format, linear = tensor.quant_format, mapped.linears.get(tensor.name)
        if quant_format is None:
            return True
        if linear is None or quant_format.compact_only or quant_format.transposed or len(tensor.shape) != 2:
            return False
        return VLLM.place(linear) is not None

    return holds


def _transformers_holds(spec: Spec) -> Callable[[Tensor], bool]:
    """Tried with transformers 5.24 and compressed-tensors 0.20.

    They refuse packed zero points, although the format defines them, and codes of tables that tokens are looked up in.
    Experts are fused in memory and decoded on loading, so all must have one format. Dense experts are not found beside codes of
    any format but fp8. Experts that files hold in one tensor have no codes there.
    Nor have layers that transformers splits, joins or shares; beside weights that it joins, only fp8 is read.
    """
    mapped = model_map(spec)
    coded = [t for t in spec.stored() if t.quant_format is not None]
    if not mapped.known or not coded:
        return lambda tensor: tensor.quant_format is None
    record = mapped.record
    outside = [*record.embeddings, *([record.head] if record.head and isinstance(record, Inferred) else [])]
    matrices = (t for t in spec.stored() if len(t.shape) == 2 and t.name.endswith(".weight"))
    experts = {t.quant_format for t in matrices if mapped.is_expert(t.name)}
    fused = {quant_format and fusible(quant_format) for quant_format in experts} == {True} and len(experts) == 1
    fp8 = all(t.quant_format and format_chain(t.quant_format) == FP8 for t in coded)
    beside = not experts or fused or (experts == {None} and fp8)
    whole: tuple[str, ...] = ()
    if isinstance(record, Inferred):
        whole = record.whole
        beside = beside and (fp8 or not record.joined)

    def holds(tensor: Tensor) -> bool:
        quant_format = tensor.quant_format
        if quant_format is None:
            return True
        if (
            not beside
            or len(tensor.shape) != 2
            or starred(tensor.name) in whole
            or quant_format.transposed
            or quant_format.compact_only
            or (format_chain(quant_format) == PACKED and not quant_format.symmetric)
        ):
            return False
        if not record.packable and format_chain(quant_format) not in (INT8, FP8):
            return False
        return not any(f".{module}." in f".{tensor.name}" for module in outside)

    return holds


def fusible(quant_format: QuantFormat) -> bool:
    """Whether transformers, which fuses experts in memory, reads experts of this format. It rounds none of their inputs.

    It fails for codes of a byte but fp8, for scales of blocks, and for static scales of inputs. It decodes nvfp4 wrongly.
    """
    return (
        quant_format.symmetric
        and not quant_format.compact_only
        and not quant_format.block
        and not quant_format.static_inputs
        and format_chain(quant_format) in (PACKED, FP8, MXFP4)
    )
