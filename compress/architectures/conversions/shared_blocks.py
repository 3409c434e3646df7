"""Families whose blocks share all their tensors, in equal runs of neighbours, and how a checkpoint becomes one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress import architectures
from compress.architectures.model_map import model_map
from compress.spec.spec import Spec, Tensor


@dataclass(frozen=True)
class SharedBlocks:
    """How a model whose neighbouring blocks share all tensors becomes a stock model of another family.

    Attributes:
        source, target: model types. classes: how class names of each begin. kinds: how the names of those classes end that
            compute the same in both.
        fits: config ▶ whether the target computes the same with it.
        inside: path of the block's modules below a block of the target.
        modules: module of a block here ▶ there. outside: (pattern, replacement) pairs, applied in order to the names of tensors
            outside the blocks, without the prefix.
        identities: linear modules of the target, below its prefix, that must do nothing: the identity and a bias of zeros.
        fields: config fields that the target has by the same name.
        defaults: values of fields that the source's config may leave out, and whose default differs in the target.
        settings: (config, number of groups) ▶ further fields of the target's config.
        tokenizer_class: the tokenizer's class, which the model type no longer tells.
    """

    source: str
    target: str
    classes: tuple[str, str]
    kinds: tuple[str, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    inside: str
    modules: Mapping[str, str]
    outside: tuple[tuple[str, str], ...]
    identities: tuple[str, ...]
    fields: tuple[str, ...]
    defaults: Mapping[str, Any]
    settings: Callable[[Mapping[str, Any], int], Mapping[str, Any]]
    tokenizer_class: str

    def takes(self, spec: Spec) -> bool:
        """Whether the target has a class that computes what this model does, once its blocks share their tensors."""
        name = spec.structure.class_name
        known = name in {self.classes[0] + kind for kind in self.kinds}
        return spec.structure.model_type == self.source and known and self.fits(spec.structure.config)

    def expresses(self, spec: Spec, groups: Sequence[Sequence[int]]) -> bool:
        """Whether the target can say which blocks share: all blocks, in equal runs of neighbours."""
        size = len(groups[0])
        runs = [list(range(i * size, (i + 1) * size)) for i in range(len(groups))]
        return [list(group) for group in groups] == runs and len(groups) * size == model_map(spec).depth

    def converted(self, spec: Spec, groups: int) -> tuple[Spec, dict[str, str]]:
        """The spec of the target, for blocks that share their tensors in so many runs.

        Returns:
            The spec; and the name of each of its tensors ▶ that of the source. `identities` have none.
        """
        mapped, target = model_map(spec), architectures.of({"model_type": self.target})
        old, new = f"{mapped.record.prefix}.", f"{target.prefix}."
        if not any(name.startswith(old) for name in spec.tensors):  # files of the base class
            old = new = ""
        size = mapped.depth // groups
        sources: dict[str, str] = {}
        for name in spec.tensors:
            path, index = mapped.record.block_path(name), mapped.block_of(name)
            if path is None or index is None:
                sources[self._outside(name, old, new)] = name
            elif index % size == 0:
                module, _, last = path[1].rpartition(".")
                start = f"{new}{target.blocks}.{index // size}.{self.inside}"
                sources[f"{start}.{self.modules[module]}.{last}"] = name
        renamed = {name: new_name for new_name, name in sources.items()}
        tensors = {}
        for new_name, name in sources.items():
            tensor = spec.tensors[name]
            alias = tensor.alias_of and renamed[tensor.alias_of]
            tensors[new_name] = replace(tensor, name=new_name, alias_of=alias)
        dtype = spec.tensors[str(mapped.embedding)].dtype
        for module in self.identities:
            for part, shape in (("weight", (mapped.hidden, mapped.hidden)), ("bias", (mapped.hidden,))):
                name = f"{new}{module}.{part}"
                tensors[name] = Tensor(name, shape, dtype)
        structure = replace(spec.structure, config=self._config(spec, groups), edits=())
        return replace(spec, structure=structure, tensors=tensors), sources

    def _outside(self, name: str, old: str, new: str) -> str:
        rest = name.removeprefix(old)
        start = new if rest != name else ""
        for pattern, replacement in self.outside:
            rest = re.sub(pattern, replacement, rest)
        return start + rest

    def _config(self, spec: Spec, groups: int) -> dict[str, Any]:
        config = spec.structure.config
        kind = str(spec.structure.class_name).removeprefix(self.classes[0])
        return {
            **self.defaults,
            **{key: config[key] for key in self.fields if key in config},
            "model_type": self.target,
            "architectures": [self.classes[1] + kind],
            **self.settings(config, groups),
        }
