"""``projected``: the embedding table or head ``module`` is ``rank`` wide, with a projection to or from the hidden states."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.edits.base import check_matrix, with_edits
from compress.checkpoint.edits.editing import ModelEdit, mixed, product
from compress.spec.edits import EditKind, TwinTensor, computed, copied
from compress.spec.spec import Edit, Spec, Tensor

if TYPE_CHECKING:
    import torch


class ProjectedTable(EditKind):
    """A thin table of embeddings, or a thin head, with a projection."""

    kind = "projected"
    keys = ("rank",)
    storage = "factored"
    label = "tables with a projection"
    role = "projection"
    adds = ("projection",)

    def check(self, edit: Edit, spec: Spec, where: str) -> None:
        """Check the rank of the projection and of its table, which is missing if the config ties it to another."""
        table, rank = f"{edit.module}.weight", edit.values["rank"]
        check_matrix(spec, f"{edit.module}.projection.weight", f"of rank {rank}", lambda shape: rank in shape, where)
        if table in spec.tensors:
            check_matrix(spec, table, f"of rank {rank}", lambda shape: shape[1] == rank, where)

    def twin(self, edit: Edit, spec: Spec, tensor: Tensor) -> TwinTensor | None:
        """The product in place of the table; the bias as it is."""
        if tensor.module != edit.module:
            return None
        if tensor.name != f"{edit.module}.weight":
            return copied(tensor)
        between = spec.tensors[f"{edit.module}.projection.weight"]
        shape = (tensor.shape[0], max(between.shape))
        return computed(tensor, tensor.name, shape, (tensor.name, between.name), unprojected)

    def untied(self, edits: Sequence[Edit], spec: Spec) -> Collection[str]:
        """With two projections all aliases: they make two tables of one."""
        return [t.name for t in spec.tensors.values() if t.alias_of is not None] if len(edits) > 1 else ()

    def twin_config(self, edits: Sequence[Edit]) -> Mapping[str, Any]:
        """Two projections make two tables of one."""
        return {"tie_word_embeddings": False} if len(edits) > 1 else {}


def projected(spec: Spec, tables: Iterable[str], rank: int) -> Spec:
    """Spec with thin tables: that of the embeddings [V, h] ▶ [V, r], then that of the head, each with a projection."""
    tensors, edits = dict(spec.tensors), []
    for number, name in enumerate(tables):
        tensor = tensors[name]
        count, hidden = tensor.shape
        tensors[name] = replace(tensor, shape=(count, rank))
        beside = f"{tensor.module}.projection.weight"
        shape = (rank, hidden) if number else (hidden, rank)
        tensors[beside] = replace(tensor, name=beside, shape=shape, alias_of=None)
        edits.append(Edit("projected", tensor.module, {"rank": rank}))
    return with_edits(spec, edits, tensors)


# ---- editing: copied into the modelling file of compact checkpoints ----


class Projected:
    """Mixin for a thin embedding table, or for a head that reads one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embedding: token ids ▶ vectors [r] ▶ hidden states. Head: hidden states ▶ [r] ▶ logits."""
        import torch

        layer: Any = self
        if isinstance(self, torch.nn.Embedding):
            outputs: torch.Tensor = layer.projection(super().forward(x))  # type: ignore[misc]
        else:
            outputs = super().forward(layer.projection(x))  # type: ignore[misc]
        return outputs


class ProjectedModel(ModelEdit):
    """Makes a table thin; the product replaces it in the dense twin."""

    kind = "projected"
    table = True

    def apply(self, model: Any, path: str, values: dict[str, Any]) -> None:
        """Make an embedding table or a head ``rank`` wide, with a projection; weights are random."""
        import torch

        module, rank = model.get_submodule(path), int(values["rank"])
        weight, looked_up = module.weight, isinstance(module, torch.nn.Embedding)
        count, hidden = weight.shape
        module.weight = torch.nn.Parameter(weight.new_empty(count, rank).normal_(std=0.02), weight.requires_grad)
        setattr(module, "embedding_dim" if looked_up else "in_features", rank)
        sizes = (rank, hidden) if looked_up else (hidden, rank)
        module.__class__ = mixed(Projected, type(module))
        module.projection = torch.nn.Linear(sizes[0], sizes[1], bias=False, dtype=weight.dtype, device=weight.device)

    def expand(self, state: dict[str, torch.Tensor], path: str, values: dict[str, Any]) -> None:
        """Replace the table by its product with the projection."""
        state[f"{path}.weight"] = unprojected(state[f"{path}.weight"], state.pop(f"{path}.projection.weight"))


def unprojected(table: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Full table [V, h] of a thin one [V, r] and its projection: [h, r] of embeddings, [r, h] of a head, r < h."""
    return product(table, projection if len(projection) == table.shape[1] else projection.T, False)
