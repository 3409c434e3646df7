"""Description of a checkpoint without its weights: structure, logical tensors, storage.

* structure: the stock class and its config, plus *edits* that the stock class cannot express;
* tensors: logical name, shape, dtype, alias, keep-mask;
* storage: a chain of codec names, outermost first, that says how a tensor is stored.

This module imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from compress.spec.classes import CAUSAL_LM, suffix_of
from compress.spec.formats import QuantFormat

if TYPE_CHECKING:
    import torch

#: Bits per element of every dtype string of the safetensors format.
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
        "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    }
)  # fmt: skip

#: What opens codes without code of this project.
Runtime = Literal["transformers", "vllm"]
#: Float dtypes that a cast may write, narrow to wide. The widest one of a checkpoint becomes ``config.dtype``.
FLOAT_DTYPES: Mapping[str, str] = MappingProxyType(
    {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
)


def widest(dtypes: list[str]) -> str:
    """Narrowest float dtype that holds all given ones exactly; F16 and BF16 together need F32."""
    if {"F16", "BF16"} <= set(dtypes):
        dtypes = [*dtypes, "F32"]
    return max(dtypes, key=list(FLOAT_DTYPES).index)


#: Storage chain of the values as they are; `compress.checkpoint.storage` has the others.
DENSE: tuple[str, ...] = ("dense",)
#: Name suffixes of static KV-cache scales, which are stored beside the projections of an attention.
CACHE_SCALES: tuple[str, ...] = (".k_scale", ".v_scale")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One logical tensor.

    Attributes:
        name: key in the state dict of the stock class, as the checkpoint spells it.
        shape: logical shape, which the model sees.
        dtype: safetensors dtype string of the logical values.
        kept: number of weights that the keep-mask keeps; None without one.
        alias_of: name of the tensor whose data this one shares. An alias is never stored.
        storage: chain of codec names, outermost first.
        quant_format: format of the codes that the values come from; None for plain values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kept: int | None = None
    alias_of: str | None = None
    storage: tuple[str, ...] = DENSE
    quant_format: QuantFormat | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the values if stored densely."""
        return self.count * DTYPE_BITS[self.dtype] // 8

    @property
    def is_float(self) -> bool:
        """Whether the values are floats."""
        return self.dtype.startswith(("F", "BF"))

    @property
    def is_cache_scale(self) -> bool:
        """Whether the name is that of a static KV-cache scale; it is one only if the structure has a ``kv_cache``."""
        return self.name.endswith(CACHE_SCALES)

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor: the name without its last part."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Quantized:
    """The form in which an input's files store a tensor that is dequantised on reading.

    Attributes:
        format: in words, for users.
        arrays: role ▶ name of an array in the files.
        bytes: of these arrays.
        decode: function from the arrays by role, and the tensor's dtype, to its values. Raises ValueError for values that are
            none.
    """

    format: str
    arrays: Mapping[str, str]
    bytes: int
    decode: Callable[[Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of structure that the stock class cannot express. docs/format.md lists kinds and values."""

    kind: str
    module: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Structure:
    """Stock config and edits.

    Attributes:
        config: JSON object, never changed in place.
        edits: in the order of application.
        kv_cache: format in which runtimes cache keys and values; None for the dtype of the computation. ``fp8``: no scales in
            the files. ``fp8-tensor``, ``fp8-head``: static scales for the keys and the values of each block, or of each
            head.
        compact: whether it was read from a compact checkpoint, whose loader decodes codes to floats.
        runtime: what opens its codes without code of this project.
    """

    config: Mapping[str, Any]
    edits: tuple[Edit, ...] = ()
    kv_cache: str | None = None
    compact: bool = field(default=False, compare=False)
    runtime: Runtime = field(default="transformers", compare=False)

    @property
    def cache_format(self) -> str | None:
        """`kv_cache` where a runtime rounds keys and values; a compact checkpoint's loader rounds none."""
        return None if self.compact else self.kv_cache

    @property
    def model_type(self) -> str:
        """``model_type`` of the stock config."""
        return str(self.config["model_type"])

    @property
    def own_class(self) -> str | None:
        """Class that wrote the checkpoint, from ``architectures``; None where the config has none."""
        names = self.config.get("architectures")
        return str(names[0]) if names else None

    @property
    def auto_model(self) -> tuple[str, str] | None:
        """(auto class, model class) of the checkpoint's remote code: for its own class if listed, else for one with a head."""
        auto_map = self.config.get("auto_map")
        models = {k: v for k, v in auto_map.items() if k.startswith("AutoModel")} if isinstance(auto_map, dict) else {}
        own = [(auto, name) for auto, name in models.items() if str(name).rpartition(".")[2] == self.own_class]
        return next(iter([*own, *((a, n) for a, n in models.items() if a != "AutoModel"), *models.items()]), None)

    @property
    def class_name(self) -> str | None:
        """`own_class`; its suffix tells the task. With remote code the suffix comes from the auto class."""
        if self.auto_model is None:
            return self.own_class
        auto, name = self.auto_model
        kind = suffix_of(auto)
        stock = self.own_class or str(name).rpartition(".")[2]
        return stock if not kind or stock.endswith((*CAUSAL_LM.suffixes[1:], kind)) else f"{stock}{kind}"


@dataclass(frozen=True, slots=True)
class Spec:
    """Structure and tensors of a checkpoint.

    Attributes:
        exact: False if the counts of a data-dependent pass are estimates.
        notes: sentences for the user about what opening left out or decided.
        left_out: bytes of the files whose tensors were left out.
        sources: for an opened checkpoint, the form in which its files store the tensors that are dequantised on reading.
        file_bytes: for one with sources, the bytes of its weight files.
    """

    structure: Structure
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    exact: bool = True
    notes: tuple[str, ...] = field(default=(), compare=False)
    left_out: int = field(default=0, compare=False)
    sources: Mapping[str, Quantized] = field(default_factory=dict, compare=False)
    file_bytes: int = field(default=0, compare=False)

    def stored(self) -> Iterable[Tensor]:
        """Tensors that are not aliases, in file order."""
        return (tensor for tensor in self.tensors.values() if tensor.alias_of is None)

    def weights(self) -> Iterable[Tensor]:
        """Stored tensors that are parameters of the model, so no KV-cache scales."""
        return (t for t in self.stored() if self.structure.kv_cache is None or not t.is_cache_scale)

    @property
    def parameters(self) -> int:
        """Number of float elements; shared tensors count once, removed weights count."""
        return sum(tensor.count for tensor in self.weights() if tensor.is_float)

    @property
    def kept_parameters(self) -> int:
        """Number of parameters that no keep-mask removes."""
        return sum(t.count if t.kept is None else t.kept for t in self.weights() if t.is_float)

    def map(self, change: Callable[[Tensor], Tensor]) -> Spec:
        """Copy with ``change`` applied to every stored tensor."""
        return replace(self, tensors={n: t if t.alias_of else change(t) for n, t in self.tensors.items()})
