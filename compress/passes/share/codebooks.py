"""Codebooks: store a matrix as indices into a small table of values, one table for each matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.architectures.model_map import model_map
from compress.errors import PassError
from compress.passes.base import Context
from compress.passes.blockwise import open_runner
from compress.passes.cast.plan import FINE
from compress.spec.formats import QuantFormat
from compress.spec.spec import FLOAT_DTYPES, Spec, Tensor

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value


def clustered(spec: Spec, names: Collection[str], bits: int) -> Spec:
    """Spec with codebooks of 2**bits values for these tensors; exact. Keep-masks stay.

    Args:
        names: stored float tensors with two axes or more.
        bits: 2 to 8.

    Raises:
        PassError: a tensor is not such a matrix, or has codes already.
    """
    chosen = frozenset(names)
    for name in sorted(chosen):
        tensor = spec.tensors[name]
        if tensor.alias_of or tensor.quant_format or tensor.dtype not in FLOAT_DTYPES or len(tensor.shape) < 2:
            what = "shared with " + tensor.alias_of if tensor.alias_of else "not a matrix of floats"
            raise PassError(f"{name} is {what}, and gets no codebook", fix=f"skip it: skip: [{tensor.module}]")
    quant_format = QuantFormat(f"codebook{bits}")
    return spec.map(lambda tensor: replace(tensor, quant_format=quant_format) if tensor.name in chosen else tensor)


def cluster(
    checkpoint: Checkpoint, spec: Spec, names: Collection[str], context: Context, calibrated: bool
) -> Checkpoint:
    """The checkpoint with these tensors clustered, lazily; ``spec`` is the result of `clustered`.

    Args:
        calibrated: cluster the matrices of blocks with a block runner, here, weighted by their inputs; GPTQ compensates for
            each rounding. All other tensors are clustered by their weights alone.
    """
    from compress.checkpoint.values import Derived

    chosen = frozenset(names)
    layers = model_map(spec).layers if calibrated else ()
    inside = sorted(x.name for x in layers if x.name in chosen and len(x.tensor.shape) == 2)
    read = _cluster_blocks(checkpoint, spec, inside, context) if inside else checkpoint.tensor

    def change(name: str) -> Value:
        value = read(name)
        return value if name not in chosen or value.codes is not None else _by_weights(value, spec.tensors[name])

    return Derived(checkpoint, spec, change)


def _cluster_blocks(checkpoint: Checkpoint, spec: Spec, names: list[str], context: Context) -> Callable[[str], Value]:
    """Cluster the matrices of blocks; return a function that reads a tensor of the result."""
    from compress.checkpoint.values import torch_dtype
    from compress.passes.share.codebook_block import CodebookOptions, codebook_block

    bits = {name: _bits(spec.tensors[name]) for name in names}
    options = CodebookOptions(bits, {name: torch_dtype(spec.tensors[name].dtype) for name in names})
    coarse = any(b < FINE for b in bits.values())
    runner = open_runner(
        checkpoint, names, context, workspace=context.workspace.folder("codebooks"), with_targets=coarse
    )
    result = runner.run(lambda block: codebook_block(block, options), "clustering weights", late_targets=coarse)
    context.details["blocks"] = result.details
    return result.reader()


def _by_weights(value: Value, tensor: Tensor) -> Value:
    from compress.checkpoint.values import Value, torch_dtype
    from compress.passes.cast.convert import check_finite
    from compress.solvers.codebook import rounded
    from compress.solvers.quant_format import dequantize

    check_finite(tensor.name, value.data)
    codes = rounded(value.data, _bits(tensor), torch_dtype(tensor.dtype), None, value.mask)
    return Value(lambda: dequantize(codes, value.mask), value.mask, codes)


def _bits(tensor: Tensor) -> int:
    assert tensor.quant_format is not None
    return tensor.quant_format.bits
