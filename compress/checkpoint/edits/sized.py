"""``sized``: the linear layer ``module`` has its own numbers of ``outputs`` and ``inputs``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.base import check_matrix, with_edits
from compress.checkpoint.edits.editing import ModelEdit
from compress.spec.edits import EditKind
from compress.spec.spec import Edit, Spec

if TYPE_CHECKING:
    import torch


class Sized(EditKind):
    """A matrix whose shape differs from what the config says of all blocks."""

    kind = "sized"
    keys = ("outputs", "inputs")
    storage = "uneven"
    label = "matrices of a width of their own"
    has_twin = False
    alone = ("has a width of its own", "prune with `allocation: uniform`")

    def check(self, edit: Edit, spec: Spec, where: str) -> None:
        """Check that the matrix has the shape of the edit."""
        outputs, inputs = edit.values["outputs"], edit.values["inputs"]
        linear = model_map(spec).linears.get(f"{edit.module}.weight")
        fits = linear is not None and (outputs, inputs) == (linear.O, linear.I)
        check_matrix(spec, f"{edit.module}.weight", f"of {outputs} x {inputs}", lambda shape: fits, where)


def sized(spec: Spec, modules: Iterable[str]) -> Spec:
    """Spec with ``sized`` edits for modules whose tensors have their new shapes already."""
    linears = model_map(spec).linears
    edits = []
    for module in modules:
        linear = linears[f"{module}.weight"]
        edits.append(Edit("sized", module, {"outputs": linear.O, "inputs": linear.I}))
    return with_edits(spec, edits, spec.tensors)


# ---- editing: copied into the modelling file of compact checkpoints ----


class SizedModel(ModelEdit):
    """Resizes a linear layer."""

    kind = "sized"

    def apply(self, model: Any, path: str, values: dict[str, Any]) -> None:
        """Resize a linear layer, with random weights."""
        import torch

        module, outputs, inputs = model.get_submodule(path), int(values["outputs"]), int(values["inputs"])
        linear = isinstance(module, torch.nn.Linear)
        new = module.weight.new_empty((outputs, inputs) if linear else (inputs, outputs))
        module.weight = torch.nn.Parameter(new.normal_(std=0.02), module.weight.requires_grad)
        if module.bias is not None:
            module.bias = torch.nn.Parameter(module.bias.new_zeros(outputs), module.bias.requires_grad)
        names = ("out_features", "in_features") if linear else ("nf", "nx")
        for name, size in zip(names, (outputs, inputs), strict=True):
            setattr(module, name, size)

    def expand(self, state: dict[str, torch.Tensor], path: str, values: dict[str, Any]) -> None:
        """Raise ValueError: there is no dense twin."""
        raise ValueError(f"{path} has its own width, which no stock class can express")
