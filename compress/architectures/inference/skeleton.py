"""The model of a config on the meta device: its modules and parameters, without weights."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from compress.spec.floats import decoded
from compress.spec.spec import Structure

if TYPE_CHECKING:
    import torch

#: Config fields that say nothing of the structure.
_BESIDE = frozenset(
    {"dtype", "torch_dtype", "quantization_config", "transformers_version", "_name_or_path", "use_cache"}
)
_KEPT = 6


def config_key(structure: Structure) -> str:
    """The config as text, without what says nothing of the structure."""
    config = {key: value for key, value in structure.config.items() if key not in _BESIDE}
    return json.dumps([config, structure.class_name], sort_keys=True, default=repr)


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        model: of the class that the config names, on the meta device. config: its config object.
    """

    model: Any
    config: Any

    @property
    def class_name(self) -> str:
        """Name of the class."""
        return type(self.model).__name__

    @cached_property
    def modules(self) -> dict[str, Any]:
        """Path ▶ module, those that have several paths too."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def names(self) -> dict[int, str]:
        """id of a module ▶ its first path."""
        result: dict[int, str] = {}
        for name, module in self.modules.items():
            result.setdefault(id(module), name)
        return result

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """Name ▶ parameter or saved buffer on the meta device; tied ones under each of their names."""
        return dict(self.model.state_dict(keep_vars=True))

    @cached_property
    def ties(self) -> dict[str, str]:
        """Parameter ▶ the parameter that it is tied to, by the class and its config."""
        tied: dict[str, str] = dict(self.model.get_expanded_tied_weights_keys(all_submodels=True))
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if (source := first.setdefault(id(parameter), name)) != name and name not in tied and source not in tied:
                tied[name] = source
        return {name: source for name, source in tied.items() if name in self.state and source in self.state}

    @cached_property
    def _rules(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = get_model_conversion_mapping(self.model)
        return [x for x in mapping if isinstance(x, WeightRenaming)], [
            x for x in mapping if isinstance(x, WeightConverter)
        ]

    def loaded_as(self, name: str) -> tuple[str, str] | None:
        """The parameter that a tensor of a file becomes, or a part of, and its name before parts are joined.

        None where the class has no place for it.
        """
        from transformers.core_model_loading import apply_renamings, rename_source_key

        prefix = self.model.base_model_prefix
        renamings, converters = self._rules
        target, joined = rename_source_key(name, renamings, converters, prefix, self.state)
        if target not in self.state and name in self.state:
            target, joined = rename_source_key(name, [], [], prefix, self.state)
        if target not in self.state:
            return None
        if joined is None:
            return target, target
        part = apply_renamings(name, renamings)
        start = f"{prefix}."
        if target.startswith(start) and not part.startswith(start):
            part = start + part
        elif part.startswith(start) and not target.startswith(start):
            part = part.removeprefix(start)
        return target, part

    def converter_of(self, name: str) -> str | None:
        """The pattern of the rule that makes parameters of a tensor by more than another name; None without one."""
        from transformers.core_model_loading import rename_source_key

        pattern: str | None = rename_source_key(name, *self._rules, self.model.base_model_prefix, self.state)[1]
        return pattern

    def packable(self, paths: Iterable[str]) -> bool:
        """Whether the class sets itself up where the linear layers below some paths have no ``weight``, as packed codes do."""
        import torch

        inside = [m for path in paths for m in self.modules[path].modules()]
        linears = [m for m in inside if isinstance(m, torch.nn.Linear) and "weight" in m._parameters]
        kept = [(module, dict(module._parameters)) for module in linears]
        try:
            for module, _ in kept:
                del module._parameters["weight"]
            with torch.no_grad():
                self.model.initialize_weights()  # does nothing to tensors on the meta device
        except AttributeError:
            return False
        except Exception:  # whatever else fails there is not for want of a weight
            return True
        finally:
            for module, parameters in kept:
                module._parameters.clear()
                module._parameters.update(parameters)
        return True

    def ignores(self, target: str) -> bool:
        """Whether transformers leaves out a tensor without a word that the class has no place for."""
        patterns = set(self.model._keys_to_ignore_on_load_unexpected or ())
        buffers = [name for name, _ in self.model.named_buffers()]
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(name.endswith("position_ids") for name in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return any(re.search(pattern, target) for pattern in patterns)


def skeleton_of(structure: Structure) -> tuple[Skeleton | None, str]:
    """The model of a config without weights; without one, None and the reason in words."""
    if structure.config.get("auto_map"):
        return None, "its code comes with the checkpoint"
    return _built(config_key(structure), _Config(structure))


class _Config:
    """A structure that all caches take for the same: the text beside it is the key."""

    __slots__ = ("structure",)

    def __init__(self, structure: Structure) -> None:
        self.structure = structure

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config)


@lru_cache(maxsize=_KEPT)
def _built(key: str, config: _Config) -> tuple[Skeleton | None, str]:
    import transformers

    structure = config.structure
    if structure.model_type not in transformers.CONFIG_MAPPING:
        version = transformers.__version__
        return None, f"transformers {version} does not know the model type, so no result is checked by loading it"
    try:
        with _quiet():
            return _build(structure), ""
    except Exception as error:  # configs hold anything, and classes check little; loading says more
        return None, f"its class cannot be built ({type(error).__name__})"


def _build(structure: Structure) -> Skeleton:
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**_plain(structure.config))
    cls: Any = getattr(transformers, structure.own_class, None) if structure.own_class else None
    if cls is None:
        cls = transformers.AutoModel._model_mapping[type(config)]
        cls = cls[0] if isinstance(cls, (tuple, list)) else cls
    with contextlib.ExitStack() as stack:
        for context in cls.get_init_context(torch.float32, False, False, None):
            stack.enter_context(context)
        model = cls(config)
    return Skeleton(model, config)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without stored codes, which would change the class."""
    result: dict[str, Any] = decoded({key: value for key, value in config.items() if key != "quantization_config"})
    return result


@contextlib.contextmanager
def _quiet() -> Any:
    import warnings

    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
