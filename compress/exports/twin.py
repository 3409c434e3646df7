"""The float32 twin of a checkpoint, which exporters of other projects read: a stock class, code times scale unrounded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.checkpoint.edits.twin import dense
from compress.spec.spec import DENSE, Spec, Tensor

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint, Value


def float32_twin(checkpoint: Checkpoint) -> Checkpoint:
    """The dense stock twin with float32 values, read tensor by tensor.

    Raises:
        PassError: no stock class can express an edit.
    """
    import torch

    from compress.checkpoint.values import Derived, Value
    from compress.models.loading import values_in

    def read(name: str) -> Value:
        tensor = checkpoint.spec.tensors[name]
        values = values_in(checkpoint, tensor, torch.float32)
        return Value(values.float() if tensor.is_float else values)

    twin = dense(Derived(checkpoint, _widened(checkpoint.spec), read))
    config = {**twin.spec.structure.config, "dtype": "float32"}
    config.pop("torch_dtype", None)
    structure = replace(twin.spec.structure, config=config, kv_cache=None, compact=False)
    return Derived(twin, replace(twin.spec, structure=structure), twin.tensor)


def _widened(spec: Spec) -> Spec:
    def change(tensor: Tensor) -> Tensor:
        plain = replace(tensor, storage=DENSE, quant_format=None, kept=None)
        return replace(plain, dtype="F32") if tensor.is_float else plain

    wide = spec.map(change)
    tensors = {n: replace(t, dtype="F32") if t.alias_of and t.is_float else t for n, t in wide.tensors.items()}
    return replace(wide, tensors=tensors)
