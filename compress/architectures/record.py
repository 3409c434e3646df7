"""The declarative record of a model family, and what can be read off it. Imports neither torch nor numpy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compress.checkpoint.spec import DTYPE_BITS, FLOAT_DTYPES, Spec
from compress.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        model_type: as in ``config.json``.
        prefix: name of the base model inside a class with a head (``model.`` of ``model.layers``); files written by the base
            class alone leave it out.
        blocks: path of the list of repeated blocks below the prefix.
        embeddings: modules below the prefix that look up vectors.
        head: module (no prefix) that projects onto the vocabulary, None for a base model.
        head_tie: the parameter that ``tie_word_embeddings`` ties to the first embedding.
        depth_key, hidden_key, heads_key: config fields; ``kv_heads_key`` and ``head_dim_key`` where the family has them.
        per_layer: config fields that hold one entry per block.
        input_axis: axis of a weight matrix that its inputs run along: -1 for Linear, 0 for GPT-2's Conv1D.
        causal: whether it decodes with a key-value cache.
        tie_default: value of ``tie_word_embeddings`` where the config does not say it.
    """

    model_type: str
    prefix: str
    blocks: str
    embeddings: tuple[str, ...]
    head: str | None = "lm_head"
    head_tie: str = "lm_head.weight"
    depth_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = None
    head_dim_key: str | None = None
    per_layer: tuple[str, ...] = ()
    input_axis: int = -1
    causal: bool = True
    tie_default: bool = False

    @cached_property
    def _block(self) -> re.Pattern[str]:
        return re.compile(rf"^((?:{re.escape(self.prefix)}\.)?{re.escape(self.blocks)}\.)(\d+)(\..+)$")

    def block_index(self, name: str) -> int | None:
        """Number of the block that a tensor belongs to, None outside the blocks."""
        match = self._block.match(name)
        return int(match[2]) if match else None

    def renumber(self, name: str, index: int) -> str:
        """The tensor's name in block ``index``."""
        return self._block.sub(rf"\g<1>{index}\g<3>", name)

    def is_block_matrix(self, name: str) -> bool:
        """Whether a matrix of that name is a linear layer of a block (what pruning takes by default)."""
        return self.block_index(name) is not None and name.endswith(".weight")

    def depth(self, config: Mapping[str, Any]) -> int:
        """Number of blocks."""
        return int(config[self.depth_key])

    def cut_depth(self, config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
        """The config with only the blocks ``keep``: depth and every per-layer list."""
        result = dict(config)
        depth = self.depth(config)
        result[self.depth_key] = len(keep)
        for key in self.per_layer:
            values = result.get(key)
            if isinstance(values, list) and len(values) == depth:
                result[key] = [values[i] for i in keep]
        return result

    def head_dim(self, config: Mapping[str, Any]) -> int:
        """Width of one attention head."""
        explicit = config.get(self.head_dim_key) if self.head_dim_key else None
        return int(explicit or config[self.hidden_key] // config[self.heads_key])

    def kv_bytes_per_token(self, config: Mapping[str, Any]) -> int | None:
        """Bytes of keys and values that decoding caches per token, in ``config.dtype``; None without a cache."""
        if not self.causal:
            return None
        heads = (config.get(self.kv_heads_key) if self.kv_heads_key else None) or config[self.heads_key]
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        bits = next((DTYPE_BITS[k] for k, v in FLOAT_DTYPES.items() if v == dtype), 32)
        return 2 * self.depth(config) * int(heads) * self.head_dim(config) * bits // 8

    def ties(self, spec: Spec) -> Iterator[tuple[str, str]]:
        """(target, source) of parameters that the config ties and the file leaves out."""
        if not spec.structure.config.get("tie_word_embeddings", self.tie_default) or not self._has_head(spec):
            return
        source = self._find(spec, f"{self.embeddings[0]}.weight")
        if source and self.head_tie not in spec.tensors:
            yield self.head_tie, source

    def _has_head(self, spec: Spec) -> bool:
        name = spec.structure.class_name or ""
        return self.head is not None and name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining"))

    def _find(self, spec: Spec, name: str) -> str | None:
        return next((n for n in (f"{self.prefix}.{name}", name) if n in spec.tensors), None)

    def check(self, spec: Spec, where: str) -> None:
        """Config and weights agree on depth and embedding shape. Raises `CheckpointError`."""
        config = spec.structure.config
        for key in (self.depth_key, self.hidden_key, self.heads_key):
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise CheckpointError(f"config.json has no usable `{key}`", where=where)
        found = {i for i in map(self.block_index, spec.tensors) if i is not None}
        depth = self.depth(config)
        if found != set(range(depth)):
            wrong = min(found ^ set(range(depth)))
            side = "the weights hold none" if wrong < depth else f"the config says {depth}"
            raise CheckpointError(f"config and weights disagree: block {wrong}: {side}", where=where)
        embedding = self._find(spec, f"{self.embeddings[0]}.weight")
        if embedding is None:
            raise CheckpointError(
                f"config and weights disagree: there is no {self.prefix}.{self.embeddings[0]}.weight", where=where
            )
        vocabulary = config.get("vocab_size")
        shape = spec.tensors[embedding].shape
        if isinstance(vocabulary, int) and shape[0] != vocabulary:
            raise CheckpointError(
                f"config and weights disagree: {embedding} has {shape[0]} rows, the config says vocab_size {vocabulary}",
                where=where,
            )
