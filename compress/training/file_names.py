"""Names and shapes in the checkpoint's file of the weights of a trained model.

transformers renames, fuses and ties weights when it loads a file, and reverts that when it saves a model. Its result is
known on the meta device, so a student whose weights have no place in the file is refused before training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.checkpoint.edits import to_json
from compress.checkpoint.edits.editing import shared_parameters
from compress.errors import PassError
from compress.spec.spec import Spec


@dataclass(frozen=True)
class FileNames:
    """The tensor in the file of each weight of a model.

    Attributes:
        left_out: names in the model of parameters that belong to another block, by the structure's edits.
        kept: stored tensors that are not the model's, such as buffers of older versions; they stay as they are.
        names: all names of the file, which may lack the base model's prefix.
    """

    left_out: frozenset[str]
    kept: frozenset[str]
    names: frozenset[str]

    def tensors(self, model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values by name in the file, from the model's whole state dictionary. A tied parameter has all of its names."""
        return _as_in_files(model, {n: value for n, value in state.items() if n not in self.left_out}, self.names)


def file_names(spec: Spec, model: Any) -> FileNames:
    """Names in the file that ``spec`` describes of a model's weights, from names and shapes alone.

    Raises:
        PassError: transformers writes a weight under a name, or in a shape, that the file does not have.
    """
    left_out = frozenset(shared_parameters(model, to_json(spec.structure.edits)))
    held = {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in left_out}
    blank = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in held.items()}
    written = _as_in_files(model, blank, spec.tensors.keys())
    called = {id(tensor): name for name, tensor in written.items()}
    tied: dict[int, list[str]] = {}
    for name, value in held.items():
        if isinstance(value, torch.nn.Parameter) and id(blank[name]) in called:
            tied.setdefault(id(value), []).append(called[id(blank[name])])
    for names in tied.values():
        if not spec.tensors.keys() & names:
            raise _no_place(f"transformers writes {names[0]}, which the file does not have")
    stored = {tensor.name: tensor.shape for tensor in spec.stored()}
    for name, shape in stored.items():
        if name in written and tuple(written[name].shape) != shape:
            raise _no_place(
                f"transformers writes {name} as {list(written[name].shape)}, and the file has {list(shape)}"
            )
    return FileNames(left_out, frozenset(stored.keys() - written.keys()), frozenset(spec.tensors))


def _as_in_files(model: Any, state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """A state dictionary with the names and shapes of the file that the model was loaded from; ``names`` are the file's."""
    from transformers.core_model_loading import revert_weight_conversion

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    reverted: dict[str, Tensor] = revert_weight_conversion(
        model, {name: value for name, value in state.items() if name not in ignored}
    )
    prefix = f"{model.base_model_prefix}."

    def own(name: str) -> str:
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), name)

    return {own(name): value for name, value in reverted.items()}


def _no_place(what: str) -> PassError:
    return PassError(
        f"{what}, so this model cannot be trained in place",
        fix="load it with from_pretrained, save it with save_pretrained, and start from that",
    )
