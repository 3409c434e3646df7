"""Cast floating-point weights to another float dtype, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.checkpoint.spec import FLOAT_DTYPES, Spec, Structure, Tensor, widest
from compress.errors import PassError
from compress.passes.base import Context, Pass, PassSettings, matches, select

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.open import Checkpoint

Format = Literal["bf16", "fp16", "fp32"]
_DTYPE: dict[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


class CastSettings(PassSettings):
    """Settings of `cast`."""

    weights: Format = Field(description="Format of the weights: bf16, fp16 or fp32; rounds to nearest even.")
    overrides: dict[str, Format] = Field(
        default_factory=dict,
        description="Format by module pattern (glob, or `re:` expression); the first that matches wins over `weights`.",
    )


class Cast(Pass[CastSettings]):
    """Floats of other widths become the format asked; integers and buffers of other kinds stay."""

    name: ClassVar[str] = "cast"
    summary: ClassVar[str] = "Store the weights in another number format."
    settings = CastSettings
    mode = "stream"
    preserves = frozenset({"masks", "aliases"})
    source: ClassVar[str] = "IEEE 754-2019, 4.3.1 (round to nearest, ties to even)"

    def plan(self, spec: Spec, settings: CastSettings) -> Spec:
        """Exact: dtypes change, shapes and keep-masks stay; ``config.dtype`` becomes the widest float dtype kept."""
        modules = [tensor.module for tensor in spec.stored()]
        chosen = select(modules, settings, modules)
        select(
            modules, PassSettings(only=list(settings.overrides)), modules
        )  # a pattern that matches nothing is an error

        def change(tensor: Tensor) -> Tensor:
            if tensor.module not in chosen or tensor.dtype not in FLOAT_DTYPES:
                return tensor
            format_ = next((f for p, f in settings.overrides.items() if matches(p, tensor.module)), settings.weights)
            return replace(tensor, dtype=_DTYPE[format_])

        cast = spec.map(change)
        if cast.tensors == spec.tensors and not settings.allow_noop:
            raise PassError(f"every weight is {settings.weights} already", key="weights", fix="leave the pass out")
        dtypes = [t.dtype for t in cast.stored() if t.dtype in FLOAT_DTYPES]
        config = dict(spec.structure.config)
        if dtypes:
            config.pop("torch_dtype", None)
            config["dtype"] = FLOAT_DTYPES[widest(dtypes)]
        tensors = {
            n: replace(t, dtype=cast.tensors[t.alias_of].dtype) if t.alias_of else t for n, t in cast.tensors.items()
        }
        return replace(cast, structure=Structure(config, spec.structure.edits), tensors=tensors)

    def apply(self, checkpoint: Checkpoint, settings: CastSettings, context: Context) -> Checkpoint:
        """Lazily cast; fp16 refuses finite weights that would overflow and names the tensor."""
        from compress.checkpoint.open import Derived, Value, torch_dtype
        from compress.solvers.casting import overflowing

        spec = self.plan(checkpoint.spec, settings)

        def cast(name: str) -> Value:
            value, target = checkpoint.tensor(name), torch_dtype(spec.tensors[name].dtype)
            data: torch.Tensor = value.data
            if data.dtype == target:
                return value
            if spec.tensors[name].dtype == "F16" and (count := overflowing(data, target)):
                raise PassError(
                    f"{count} weights of {name} are beyond the range of fp16 (65504)",
                    key="weights",
                    fix=f"use bf16, or keep the module: skip: [{checkpoint.spec.tensors[name].module}]",
                )
            return Value(data.to(target), value.mask)

        return Derived(checkpoint, spec, cast)
