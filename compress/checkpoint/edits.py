"""Edits applied to models: low-rank factors, low-rank residuals, shared parameters, thin embeddings, sizes of single layers.

This file imports only torch: its text is copied into the modelling file of compact checkpoints, which must not import this
package. docs/format.md specifies the edits. An edit is a JSON object with ``kind``, ``module`` and ``values``:

* ``factors``: the linear layer ``module`` becomes ``up(down(x))`` of rank ``rank``.
* ``residual``: the linear layer ``module`` adds ``residual_up(residual_down(x))`` of rank ``rank`` to its output.
* ``shared``: the parameters ``parts`` of block ``module`` are those of block ``source``.
* ``projected``: the embedding table or head ``module`` is ``rank`` wide, with a projection to or from the hidden states.
* ``sized``: the linear layer ``module`` has its own numbers of ``outputs`` and ``inputs``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# ---- editing: copied into the modelling file of compact checkpoints ----


class Factored(torch.nn.Module):
    """Two thin linear layers in place of one."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, **like: Any) -> None:
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
        result: torch.Tensor = self.up(self.down(x))
        return result


class Relaxed:
    """Mixin for a linear layer with a low-rank residual."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the layer plus its residual, […, O]."""
        layer: Any = self
        result: torch.Tensor = super().forward(x) + layer.residual_up(layer.residual_down(x))  # type: ignore[misc]
        return result


class Projected:
    """Mixin for a thin embedding table, or for a head that reads one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embedding: token ids ▶ vectors [r] ▶ hidden states. Head: hidden states ▶ [r] ▶ logits."""
        layer: Any = self
        if isinstance(self, torch.nn.Embedding):
            found: torch.Tensor = layer.projection(super().forward(x))  # type: ignore[misc]
        else:
            found = super().forward(layer.projection(x))  # type: ignore[misc]
        return found


def apply_edits(model: Any, edits: list[dict[str, Any]]) -> None:
    """Apply the edits to a model of the stock class. New modules get the dtype and device of those they replace.

    Raises:
        ValueError: this version does not know a kind, or the model does not have a module.
    """
    find = _finder(model, edits)
    for edit in edits:
        if edit["kind"] not in ("factors", "projected", "residual", "shared", "sized"):
            raise ValueError(f"unknown change of structure: {edit['kind']}")
        if edit["kind"] == "shared":
            continue
        path = find(edit["module"])
        module = model.get_submodule(path)
        if edit["kind"] == "sized":
            _resize(module, int(edit["values"]["outputs"]), int(edit["values"]["inputs"]))
            continue
        rank = int(edit["values"]["rank"])
        if edit["kind"] == "projected":
            _project(module, rank)
            continue
        like = {"dtype": module.weight.dtype, "device": module.weight.device}
        outputs, inputs = _sizes(module)
        if edit["kind"] == "factors":
            parent, _, name = path.rpartition(".")
            bias = module.bias is not None
            setattr(model.get_submodule(parent), name, Factored(inputs, outputs, rank, bias, **like))
        else:
            module.__class__ = _mixed(Relaxed, type(module))
            module.residual_down = torch.nn.Linear(inputs, rank, bias=False, **like)
            module.residual_up = torch.nn.Linear(rank, outputs, bias=False, **like)
    for target, source in shared_parameters(model, edits).items():
        parent, _, name = target.rpartition(".")
        model.get_submodule(parent)._parameters[name] = model.get_parameter(source)


def _resize(module: Any, outputs: int, inputs: int) -> None:
    """Resize a linear layer, with random weights."""
    linear = isinstance(module, torch.nn.Linear)
    new = module.weight.new_empty((outputs, inputs) if linear else (inputs, outputs))
    module.weight = torch.nn.Parameter(new.normal_(std=0.02), module.weight.requires_grad)
    if module.bias is not None:
        module.bias = torch.nn.Parameter(module.bias.new_zeros(outputs), module.bias.requires_grad)
    names = ("out_features", "in_features") if linear else ("nf", "nx")
    for name, size in zip(names, (outputs, inputs), strict=True):
        setattr(module, name, size)


def _project(module: Any, rank: int) -> None:
    """Make an embedding table or a head ``rank`` wide, with a projection; weights are random."""
    weight, looked_up = module.weight, isinstance(module, torch.nn.Embedding)
    count, hidden = weight.shape
    module.weight = torch.nn.Parameter(weight.new_empty(count, rank).normal_(std=0.02), weight.requires_grad)
    setattr(module, "embedding_dim" if looked_up else "in_features", rank)
    sizes = (rank, hidden) if looked_up else (hidden, rank)
    module.__class__ = _mixed(Projected, type(module))
    module.projection = torch.nn.Linear(sizes[0], sizes[1], bias=False, dtype=weight.dtype, device=weight.device)


def shared_parameters(model: Any, edits: list[dict[str, Any]]) -> dict[str, str]:
    """Name of each shared parameter ▶ name of its source."""
    result: dict[str, str] = {}
    find = _finder(model, edits)
    for edit in edits:
        if edit["kind"] != "shared":
            continue
        target, source = (find(name) for name in (edit["module"], edit["values"]["source"]))
        result |= {f"{target}.{part}": f"{source}.{part}" for part in edit["values"]["parts"]}
    return result


def _mixed(more: type, stock: type) -> type:
    return type(stock.__name__, (more, stock), {"__module__": stock.__module__})


def _sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; transformers' ``Conv1D`` shapes its weight [in, out]."""
    first, second = module.weight.shape
    return (first, second) if isinstance(module, torch.nn.Linear) else (second, first)


def _finder(model: Any, edits: list[dict[str, Any]]) -> Callable[[str], str]:
    """Function from a module's path in files to its path in the model; one of them may have the base model's prefix."""
    prefix, modules = f"{model.base_model_prefix}.", {name for name, _ in model.named_modules()}
    tables = {edit["module"] for edit in edits if edit["kind"] == "projected"}

    def find(path: str) -> str:
        for name in (path, path.removeprefix(prefix), prefix + path):
            if name in modules:
                return name
        head = model.get_output_embeddings() if path in tables else None  # files may call the head otherwise
        if head is None:
            raise ValueError(f"the model has no module {path}")
        names: list[str] = [name for name, module in model.named_modules() if module is head]
        return names[0]

    return find


def dense_state(model: Any, edits: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """State dict of the dense twin: the stock class computes the same with products for factors and copies of shared tensors.

    Raises:
        ValueError: a ``sized`` edit, which the stock class cannot express.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for target in shared_parameters(model, edits):
        state[target] = state[target].clone()
    if _untied(edits):
        owners: dict[int, str] = {}
        for name, value in state.items():
            if owners.setdefault(value.data_ptr(), name) != name:
                state[name] = value.clone()
    find = _finder(model, edits)
    for edit in edits:
        if edit["kind"] == "shared":
            continue
        if edit["kind"] == "sized":
            raise ValueError(f"{edit['module']} has its own width, which no stock class can express")
        path = find(edit["module"])
        if edit["kind"] == "projected":
            state[f"{path}.weight"] = unprojected(state[f"{path}.weight"], state.pop(f"{path}.projection.weight"))
        elif edit["kind"] == "factors":
            down, up = state.pop(f"{path}.down.weight"), state.pop(f"{path}.up.weight")
            state[f"{path}.weight"] = product(up, down, edit["values"]["transposed"])
            if (bias := state.pop(f"{path}.up.bias", None)) is not None:
                state[f"{path}.bias"] = bias
        else:
            down, up = state.pop(f"{path}.residual_down.weight"), state.pop(f"{path}.residual_up.weight")
            state[f"{path}.weight"] = with_residual(state[f"{path}.weight"], up, down, edit["values"]["transposed"])
    return state


def _untied(edits: list[dict[str, Any]]) -> bool:
    """Whether the dense twin has two tables: two projections make two tables of one."""
    return len([edit for edit in edits if edit["kind"] == "projected"]) > 1


def product(up: torch.Tensor, down: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Product of factors [O, r] and [r, I]: [O, I], or [I, O] if ``transposed``; computed in float32 at least."""
    wide = torch.promote_types(up.dtype, torch.float32)
    found = (up.to(wide) @ down.to(wide)).to(up.dtype)
    return found.T.contiguous() if transposed else found


def unprojected(table: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Full table [V, h] of a thin one [V, r] and its projection: [h, r] of embeddings, [r, h] of a head, r < h."""
    return product(table, projection if len(projection) == table.shape[1] else projection.T, False)


def with_residual(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Weight plus residual of a layer, computed in float32."""
    return (weight.float() + product(up.float(), down.float(), transposed)).to(weight.dtype)


def edited_class(stock: Any, edits: list[dict[str, Any]]) -> Any:
    """Subclass of a transformers class that applies the edits. A shared tensor is one parameter.

    Its `save_pretrained` writes the dense twin, of the stock class.
    """
    if not edits:
        return stock

    class Edited(stock):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            apply_edits(self, edits)
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=False)
            if any(edit["kind"] == "projected" for edit in edits):
                self.tie_weights()  # ties the head to the new table

        def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
            found: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
            return {**found, **shared_parameters(self, edits)}

        def _adjust_bias(self, output_embeddings: Any, input_embeddings: Any) -> None:
            if isinstance(output_embeddings, torch.nn.Linear):  # for Conv1D it would confuse inputs with outputs
                super()._adjust_bias(output_embeddings, input_embeddings)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            state = kwargs.pop("state_dict", None)
            if state is not None:  # the caller chose it
                return super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)
            config = type(self.config).from_dict(self.config.to_dict())
            if _untied(edits):
                config.tie_word_embeddings = False
            without = {"add_pooling_layer": False} if getattr(self, "pooler", self) is None else {}
            with torch.device("meta"):
                twin = stock(config, **without)
            twin.load_state_dict(dense_state(self, edits), assign=True, strict=False)
            twin.tie_weights()
            if self.can_generate():
                twin.generation_config = self.generation_config
            return twin.save_pretrained(save_directory, *args, **kwargs)

    Edited.__name__, Edited.__qualname__, Edited.__module__ = stock.__name__, stock.__qualname__, stock.__module__
    return Edited
