"""Exports to ``.pt2``: a program of torch.export, which needs torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.exports.base import ExportPlan, ExportRow, Target
from compress.settings import Settings
from compress.spec.spec import DTYPE_BITS, FLOAT_DTYPES, Spec

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.progress import Progress


class Pt2Settings(Settings):
    """Numbers of the program."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Dtype of the program's weights and computation. Codes are decoded to it."
    )


class Pt2(Target[Pt2Settings]):
    """One file; batch and length stay free. There is no KV cache."""

    name = "pt2"
    summary = "A program of torch.export: `torch.export.load(path).module()` needs torch alone. Codes are decoded."
    ending = ".pt2"
    settings = Pt2Settings

    def plan(self, spec: Spec, folder: Path, settings: Pt2Settings) -> ExportPlan:
        """About the size of the file."""
        dtype = next(name for name, title in FLOAT_DTYPES.items() if title == settings.dtype)
        tensors = list(spec.weights())
        size = sum(t.count * DTYPE_BITS[dtype if t.is_float else t.dtype] // 8 for t in tensors)
        exact = DTYPE_BITS[dtype] == 32
        row = ExportRow("all", settings.dtype, len(tensors), size, exact)
        return ExportPlan(
            self.name, size, (row,), exact=False, notes=("there is no KV cache: the program scores texts",)
        )

    def write(self, checkpoint: Checkpoint, path: Path, settings: Pt2Settings, progress: Progress) -> None:
        """Write the program, load it again and compare its outputs with those of the model."""
        import torch

        from compress.exports.forward import check_same, exporting, forward_of, free_axes, sample
        from compress.models.loading import load_checkpoint

        with progress.task("write pt2", 1, "programs") as task:
            model: Any = load_checkpoint(checkpoint, dtype=settings.dtype, quantized_activations=False)
            forward = forward_of(model)
            inputs = sample(forward)
            free = {
                name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in free_axes(inputs).items()
            }  # a name would be a bound that the model may not have
            with exporting(type(model).__name__, "torch.export"):
                program = torch.export.export(forward, (), kwargs=inputs, dynamic_shapes=free)
                with path.open("wb") as file:
                    torch.export.save(program, file)
            loaded = torch.export.load(path).module()
            with torch.no_grad():
                for shape in ((2, 16), (3, 11)):
                    inputs = sample(forward, *shape)
                    names = [str(number) for number in range(len(forward.outputs) or 1)]
                    wanted, given = forward(**inputs), loaded(**inputs)
                    check_same(dict(zip(names, wanted, strict=True)), dict(zip(names, given, strict=True)), 1e-3)
            task.advance()
