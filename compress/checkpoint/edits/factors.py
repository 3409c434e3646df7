"""``factors``: the linear layer ``module`` becomes ``up(down(x))`` of rank ``rank``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.architectures.model_map import model_map
from compress.checkpoint.edits.base import check_low_rank, with_edits
from compress.checkpoint.edits.editing import ModelEdit, linear_sizes, product
from compress.spec.edits import EditKind, TwinTensor, computed, copied
from compress.spec.spec import DENSE, Edit, Spec, Tensor

if TYPE_CHECKING:
    import torch


class Factors(EditKind):
    """Two thin matrices in place of one."""

    kind = "factors"
    keys = ("rank", "transposed")
    storage = "factored"
    label = "matrices as factors"
    role = "factor"
    adds = ("down", "up")

    def check(self, edit: Edit, spec: Spec, where: str) -> None:
        """Check the shapes of the factors."""
        path = edit.module
        check_low_rank(spec, f"{path}.down.weight", f"{path}.up.weight", edit.values["rank"], where)

    def twin(self, edit: Edit, spec: Spec, tensor: Tensor) -> TwinTensor | None:
        """Product and bias in place of the factors."""
        path, turned = edit.module, bool(edit.values["transposed"])
        if tensor.name == f"{path}.down.weight":
            return None
        if tensor.name == f"{path}.up.bias":
            return copied(tensor, f"{path}.bias")
        if tensor.name != f"{path}.up.weight":
            return copied(tensor)
        down = spec.tensors[f"{path}.down.weight"]
        shape = (tensor.shape[0], down.shape[1])
        return computed(
            tensor,
            f"{path}.weight",
            shape[::-1] if turned else shape,
            (tensor.name, down.name),
            lambda up, down: product(up, down, turned),
        )


def factored(spec: Spec, ranks: Mapping[str, int]) -> Spec:
    """Spec with factors in place of weight matrices. ``ranks``: name of the matrix ▶ rank."""
    tensors: dict[str, Tensor] = {}
    edits = []
    linears = model_map(spec).linears
    biases = {f"{spec.tensors[name].module}.bias": spec.tensors[name].module for name in ranks}
    for name, tensor in spec.tensors.items():
        if name in ranks:
            linear = linears[name]
            shapes = {"down": (ranks[name], linear.I), "up": (linear.O, ranks[name])}
            for part, shape in shapes.items():
                new = f"{tensor.module}.{part}.weight"
                tensors[new] = replace(tensor, name=new, shape=shape, kept=None, storage=DENSE)
            edits.append(Edit("factors", tensor.module, {"rank": ranks[name], "transposed": linear.transposed}))
        elif name in biases:
            new = f"{biases[name]}.up.bias"
            tensors[new] = replace(tensor, name=new)
        else:
            tensors[name] = tensor
    return with_edits(spec, edits, tensors)


# ---- editing: copied into the modelling file of compact checkpoints ----


class Factored:
    """Two thin linear layers in place of one; a mixin for `torch.nn.Module`."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, **like: Any) -> None:
        import torch

        super().__init__()
        self.down = torch.nn.Linear(inputs, rank, bias=False, **like)
        self.up = torch.nn.Linear(rank, outputs, bias=bias, **like)

    @property
    def weight(self) -> torch.Tensor:
        """Product of the factors, [O, I]; models read its dtype and device."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> torch.nn.Parameter | None:
        """Bias of the second layer."""
        return self.up.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, I] ▶ […, O]."""
        outputs: torch.Tensor = self.up(self.down(x))
        return outputs


class FactorsModel(ModelEdit):
    """Replaces the linear layer; the product replaces the factors in the dense twin."""

    kind = "factors"

    def apply(self, model: Any, path: str, values: dict[str, Any]) -> None:
        """Replace the linear layer, in its dtype and on its device."""
        import torch

        module = model.get_submodule(path)
        outputs, inputs = linear_sizes(module)
        layer: Any = type("Factored", (Factored, torch.nn.Module), {"__module__": __name__})
        like = {"dtype": module.weight.dtype, "device": module.weight.device}
        parent, _, name = path.rpartition(".")
        new = layer(inputs, outputs, int(values["rank"]), module.bias is not None, **like)
        setattr(model.get_submodule(parent), name, new)

    def expand(self, state: dict[str, torch.Tensor], path: str, values: dict[str, Any]) -> None:
        """Replace the factors by their product."""
        down, up = state.pop(f"{path}.down.weight"), state.pop(f"{path}.up.weight")
        state[f"{path}.weight"] = product(up, down, values["transposed"])
        if (bias := state.pop(f"{path}.up.bias", None)) is not None:
            state[f"{path}.bias"] = bias
