"""The model of a GGUF file: config of the stock class and names of tensors, from metadata and shapes. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.architectures.gguf.families import FACTORS, FAMILIES, config_of
from compress.architectures.gguf.metadata import Metadata, ReadFloats

#: Ending of tensors with what products of a matrix are multiplied with.
SCALE = ".scale"
_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)|(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """Config, and for each tensor by its name in the file: its name in the stock class, and what is to be undone.

    ``names``: with ``{}`` for the number of an expert where the tensor holds all. ``heads``: by name in the file, into how many
    heads its permuted rows fall. ``raised``: names of tensors with one added.
    ``transposed``: names of matrices that the stock class stores [I, O].
    """

    config: dict[str, Any]
    names: dict[str, str]
    heads: dict[str, int]
    raised: frozenset[str]
    transposed: frozenset[str]


def gguf_model(
    data: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: ReadFloats, where: str
) -> GgufModel:
    """The model of a GGUF file.

    Args:
        data: metadata by key. shapes: of the tensors. read: reads a small tensor.

    Raises:
        CheckpointError: an architecture without an entry here, metadata that are missing, tensors that are unknown.
    """
    metadata = Metadata(data, shapes, read, where)
    kind = metadata.architecture + " with experts" * metadata.has("expert_count")
    if (family := FAMILIES.get(kind)) is None:
        raise metadata.error(
            f"holds a model of the architecture `{kind}`, which is not read from GGUF",
            f"it reads {', '.join(FAMILIES)}; for others, start from the safetensors checkpoint",
        )
    config = config_of(family, metadata)
    names, heads, raised, transposed = {}, {}, set(), set()
    for name in shapes:
        if name in FACTORS or (name.endswith(SCALE) and f"{name.removesuffix(SCALE)}.weight" in shapes):
            continue
        match = _NAME.fullmatch(name)
        block, part, end, outside, outer = match.groups() if match else (None,) * 5
        module = family.blocks.get(part or "") if block else family.outside.get(outside or "")
        if module is None:
            raise metadata.error(f"has the tensor {name[:60]}, which {family.class_name} does not have")
        names[name] = f"{family.prefix}.{block}.{module}.{end}" if block else f"{module}.{outer}"
        if (len(shapes[name]) == 3) != ("{}" in module):
            raise metadata.error(f"has {name} of the shape {list(shapes[name])}, which {family.class_name} has not")
        if family.permuted and part in ("attn_q", "attn_k"):
            heads[name] = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            if shapes[name][0] % (2 * heads[name]):
                raise metadata.error(f"has {shapes[name][0]} rows in {name}, which {heads[name]} heads do not divide")
        if family.raised and (part or outside or "").endswith("norm"):
            raised.add(name)
        if family.transposed and len(shapes[name]) == 2 and module.endswith(family.transposed):
            transposed.add(name)
    return GgufModel(config, names, heads, frozenset(raised), frozenset(transposed))
