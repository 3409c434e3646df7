"""Edits applied to models. An edit is a JSON object with ``kind``, ``module`` and ``values``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


# ---- editing: copied into the modelling file of compact checkpoints ----

#: Kind of edit ▶ how it changes models.
MODEL_EDITS: dict[str, ModelEdit] = {}


class ModelEdit:
    """Changes a model by one kind of edit. A subclass registers itself.

    ``table``: whether it changes an embedding table or a head.
    """

    kind: str
    table = False

    def __init_subclass__(cls) -> None:
        MODEL_EDITS[cls.kind] = cls()

    def apply(self, model: Any, path: str, values: dict[str, Any]) -> None:
        """Change the module ``path`` of the model."""

    def tied(self, find: Callable[[str], str], edit: dict[str, Any]) -> dict[str, str]:
        """Name of each parameter that the edit shares ▶ name of its source. ``find``: path in files ▶ path in the model."""
        return {}

    def expand(self, state: dict[str, torch.Tensor], path: str, values: dict[str, Any]) -> None:
        """Replace the module's tensors by those of the dense twin. Raises ValueError if there is none."""


def apply_edits(model: Any, edits: list[dict[str, Any]]) -> None:
    """Apply the edits to a model of the stock class. New modules get the dtype and device of those they replace.

    Raises:
        ValueError: this version does not know a kind, or the model does not have a module.
    """
    find = _finder(model, edits)
    for edit in edits:
        if edit["kind"] not in MODEL_EDITS:
            raise ValueError(f"unknown change of structure: {edit['kind']}")
        MODEL_EDITS[edit["kind"]].apply(model, find(edit["module"]), edit["values"])
    for target, source in shared_parameters(model, edits).items():
        parent, _, name = target.rpartition(".")
        model.get_submodule(parent)._parameters[name] = model.get_parameter(source)


def shared_parameters(model: Any, edits: list[dict[str, Any]]) -> dict[str, str]:
    """Name of each shared parameter ▶ name of its source."""
    names: dict[str, str] = {}
    find = _finder(model, edits)
    for edit in edits:
        names |= MODEL_EDITS[edit["kind"]].tied(find, edit)
    return names


def mixed(more: type, stock: type) -> type:
    """Subclass of both, under the name of the second."""
    return type(stock.__name__, (more, stock), {"__module__": stock.__module__})


def linear_sizes(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; transformers' ``Conv1D`` shapes its weight [in, out]."""
    import torch

    first, second = module.weight.shape
    return (first, second) if isinstance(module, torch.nn.Linear) else (second, first)


def product(up: torch.Tensor, down: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Product of factors [O, r] and [r, I]: [O, I], or [I, O] if ``transposed``; computed in float32 at least."""
    import torch

    wide = torch.promote_types(up.dtype, torch.float32)
    matrix = (up.to(wide) @ down.to(wide)).to(up.dtype)
    return matrix.T.contiguous() if transposed else matrix


def _finder(model: Any, edits: list[dict[str, Any]]) -> Callable[[str], str]:
    """Function from a module's path in files to its path in the model; one of them may have the base model's prefix."""
    prefix, modules = f"{model.base_model_prefix}.", {name for name, _ in model.named_modules()}
    tables = {edit["module"] for edit in _tables(edits)}

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


def _tables(edits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Edits of embedding tables and heads. If there are two, the dense twin has two tables."""
    return [edit for edit in edits if edit["kind"] in MODEL_EDITS and MODEL_EDITS[edit["kind"]].table]


def dense_state(model: Any, edits: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """State dict of the dense twin: the stock class computes the same with products for factors and copies of shared tensors.

    Raises:
        ValueError: a ``sized`` edit, which the stock class cannot express.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for target in shared_parameters(model, edits):
        state[target] = state[target].clone()
    if len(_tables(edits)) > 1:
        owners: dict[int, str] = {}
        for name, value in state.items():
            if owners.setdefault(value.data_ptr(), name) != name:
                state[name] = value.clone()
    find = _finder(model, edits)
    for edit in edits:
        MODEL_EDITS[edit["kind"]].expand(state, find(edit["module"]), edit["values"])
    return state


def edited_class(stock: Any, edits: list[dict[str, Any]]) -> Any:
    """Subclass of a transformers class that applies the edits. A shared tensor is one parameter.

    Its `save_pretrained` writes the dense twin, of the stock class.
    """
    import torch

    if not edits:
        return stock

    class Edited(stock):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            apply_edits(self, edits)
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=False)
            if _tables(edits):
                self.tie_weights()  # ties the head to the new table

        def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
            keys: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
            return {**keys, **shared_parameters(self, edits)}

        def _adjust_bias(self, output_embeddings: Any, input_embeddings: Any) -> None:
            if isinstance(output_embeddings, torch.nn.Linear):  # for Conv1D it would confuse inputs with outputs
                super()._adjust_bias(output_embeddings, input_embeddings)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            state = kwargs.pop("state_dict", None)
            if state is not None:  # the caller chose it
                return super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)
            config = type(self.config).from_dict(self.config.to_dict())
            if len(_tables(edits)) > 1:
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
