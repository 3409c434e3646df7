"""``residual``: the linear layer ``module`` adds ``residual_up(residual_down(x))`` of rank ``rank`` to its output."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import Linear
from compress.checkpoint.edits.base import check_low_rank
from compress.checkpoint.edits.editing import ModelEdit, linear_sizes, mixed, product
from compress.spec.edits import EditKind, TwinTensor, computed, copied
from compress.spec.spec import DENSE, Edit, Spec, Tensor

if TYPE_CHECKING:
    import torch


class Residual(EditKind):
    """Two thin matrices beside a matrix, which is shared."""

    kind = "residual"
    keys = ("rank", "transposed")
    storage = "shared"
    label = "residuals"
    role = "residual"
    adds = ("residual_down", "residual_up")

    def check(self, edit: Edit, spec: Spec, where: str) -> None:
        """Check the shapes of the thin matrices."""
        down, up = (f"{edit.module}.{part}.weight" for part in self.adds)
        check_low_rank(spec, down, up, edit.values["rank"], where)

    def twin(self, edit: Edit, spec: Spec, tensor: Tensor) -> TwinTensor | None:
        """The sum in place of the matrix; the bias as it is."""
        path, turned = edit.module, bool(edit.values["transposed"])
        if tensor.module != path:
            return None
        if tensor.name != f"{path}.weight":
            return copied(tensor)
        return computed(
            tensor,
            tensor.name,
            tensor.shape,
            (tensor.name, f"{path}.residual_up.weight", f"{path}.residual_down.weight"),
            lambda weight, up, down: with_residual(weight, up, down, turned),
        )


def residual(linear: Linear, rank: int) -> tuple[Edit, dict[str, Tensor]]:
    """Edit and new tensors by which a matrix gets a residual."""
    tensor, tensors = linear.tensor, {}
    for part, shape in (("up", (linear.O, rank)), ("down", (rank, linear.I))):
        name = f"{tensor.module}.residual_{part}.weight"
        tensors[name] = replace(tensor, name=name, shape=shape, kept=None, storage=DENSE)
    return Edit("residual", tensor.module, {"rank": rank, "transposed": linear.transposed}), tensors


# ---- editing: copied into the modelling file of compact checkpoints ----


class WithResidual:
    """Mixin for a linear layer with a low-rank residual."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the layer plus its residual, […, O]."""
        layer: Any = self
        outputs: torch.Tensor = super().forward(x) + layer.residual_up(layer.residual_down(x))  # type: ignore[misc]
        return outputs


class ResidualModel(ModelEdit):
    """Adds the residual to a linear layer; the sum replaces the weight in the dense twin."""

    kind = "residual"

    def apply(self, model: Any, path: str, values: dict[str, Any]) -> None:
        """Add two linear layers, in the dtype and on the device of the weight."""
        import torch

        module, rank = model.get_submodule(path), int(values["rank"])
        outputs, inputs = linear_sizes(module)
        like = {"dtype": module.weight.dtype, "device": module.weight.device}
        module.__class__ = mixed(WithResidual, type(module))
        module.residual_down = torch.nn.Linear(inputs, rank, bias=False, **like)
        module.residual_up = torch.nn.Linear(rank, outputs, bias=False, **like)

    def expand(self, state: dict[str, torch.Tensor], path: str, values: dict[str, Any]) -> None:
        """Add the residual to the weight."""
        down, up = state.pop(f"{path}.residual_down.weight"), state.pop(f"{path}.residual_up.weight")
        state[f"{path}.weight"] = with_residual(state[f"{path}.weight"], up, down, values["transposed"])


def with_residual(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Weight plus residual of a layer, computed in float32."""
    return (weight.float() + product(up.float(), down.float(), transposed)).to(weight.dtype)
