"""Storage codecs, a file each. `parts` and `encode` write a tensor, `reading.decode` reads it. docs/format.md specifies all.

A file holds all that concerns its codecs: a `base.Codec` for each storage chain (shapes, dtypes, encoding), and below a mark a
`reading.Reader` (names of the arrays, decoding), which is copied into the modelling file of compact checkpoints. A new file
needs no other line. Importing this package loads no torch; the functions that compute import it.

`bits` packs codes and keep-masks. `compressed_tensors` is the config of the codes that stock loaders read.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

from compress.checkpoint.storage.base import CODECS, Codec, StoredPart
from compress.checkpoint.storage.reading import READERS
from compress.spec.formats import QuantFormat
from compress.spec.spec import Tensor

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Value

__all__ = ["CHAINS", "CODECS", "MODULES", "Codec", "StoredPart", "encode", "format_chain", "parts"]

_SHARED = ("base", "bits", "reading")
#: Names of the modules whose lower halves the modelling file holds, in the order of its text.
MODULES = (
    *_SHARED[1:],
    *sorted(name for _, name, folder in pkgutil.iter_modules(__path__) if not folder and name not in _SHARED),
)
for _name in MODULES:
    import_module(f"{__name__}.{_name}")
#: Every storage chain; those without a keep-mask first.
CHAINS: tuple[tuple[str, ...], ...] = tuple(sorted(CODECS, key=lambda chain: (CODECS[chain].masked, chain)))


def parts(tensor: Tensor) -> list[StoredPart]:
    """Arrays of the tensor's storage chain, with names, dtypes and shapes.

    Other tools store some formats by a chain that is not chosen here, such as int8 weights alone by ``int-quantized``.
    """
    codec = CODECS[tensor.storage]
    grid = None if tensor.quant_format is None else tensor.quant_format.to_json()
    names, arrays = READERS[tensor.storage].names(grid), codec.arrays(tensor)
    assert names.keys() == arrays.keys(), tensor
    stored = [StoredPart(tensor.name + names[role], role, shape, dtype) for role, (shape, dtype) in arrays.items()]
    return stored + [_static(tensor, name) for name in codec.static_inputs(tensor)]


def encode(value: Value, tensor: Tensor) -> dict[str, torch.Tensor]:
    """Contiguous arrays by role, as `parts` lists them, of a value in canonical form (see `canonical`)."""
    codec = CODECS[tensor.storage]
    arrays = codec.encode(value, tensor)
    if value.codes is not None:
        arrays |= {name: value.codes.static_inputs[name] for name in codec.static_inputs(tensor)}
    return arrays


def format_chain(quant_format: QuantFormat) -> tuple[str, ...]:
    """Storage chain of a number format without a keep-mask: its format in compressed-tensors, or the codebook chain."""
    return next(codec.chain for codec in CODECS.values() if codec.stores(quant_format) and not codec.masked)


def _static(tensor: Tensor, name: str) -> StoredPart:
    """Static scale or zero point of a layer's inputs, stored beside its weight."""
    assert tensor.quant_format is not None
    dtype = {
        "input_scale": tensor.quant_format.given_dtype or tensor.dtype,
        "input_zero_point": "I8",
        "input_global_scale": "F32",
    }[name]
    return StoredPart(f"{tensor.module}.{name}", name, (1,), dtype)
