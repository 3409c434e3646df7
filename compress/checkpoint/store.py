"""The storage chain of each tensor, in a stock checkpoint or a compact one. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from compress.checkpoint.storage import CHAINS, CODECS, parts
from compress.checkpoint.storage.compressed_tensors.loaders import stock_holds
from compress.spec.spec import DENSE, Spec, Tensor

if TYPE_CHECKING:
    from compress.checkpoint.values import Value

Store = Literal["stock", "compact"]


def with_storage(spec: Spec, store: Store) -> Spec:
    """Spec with the smallest storage chain that ``store`` allows for each tensor; dense wins ties.

    Stock files cannot store the keep-mask of quantised weights, so the zeros are written and the mask is lost. Codes that stock
    loaders cannot read are written as floats.
    """
    if store == "compact":  # transformers opens it, with the bundled file
        spec = replace(spec, structure=replace(spec.structure, runtime="transformers"))
    holds = stock_holds(spec)

    def choose(tensor: Tensor) -> Tensor:
        if store == "stock" and not holds(tensor):
            return replace(tensor, quant_format=None, kept=None, storage=DENSE)
        return smallest(tensor, store)

    return spec.map(choose)


def smallest(tensor: Tensor, store: Store) -> Tensor:
    """The tensor with the smallest storage chain of the store; dense wins ties, and codes without a mask lose it."""
    options = [
        replace(tensor, storage=chain)
        for chain in CHAINS
        if CODECS[chain].takes(tensor) and (store == "compact" or not CODECS[chain].compact)
    ]
    best = min(options, key=lambda t: sum(part.bytes for part in parts(t)))  # the first of equals has no mask
    return best if best.quant_format is None or CODECS[best.storage].masked else replace(best, kept=None)


def needs_code(spec: Spec) -> bool:
    """Whether only the bundled modelling file can load the spec as stored, so that the checkpoint is a compact one."""
    holds = stock_holds(spec)
    return bool(spec.structure.edits) or any(CODECS[t.storage].compact or not holds(t) for t in spec.stored())


def stock_value(value: Value, tensor: Tensor) -> Value:
    """The value without the parts that the tensor's storage drops: codes, or the keep-mask of codes."""
    if value.codes is None or (tensor.quant_format is not None and tensor.kept is not None):
        return value
    from compress.checkpoint.values import Value

    return Value(lambda: value.data, None, None if tensor.quant_format is None else value.codes)
