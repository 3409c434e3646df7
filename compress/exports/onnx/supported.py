"""Which checkpoints ONNX can hold, told from headers. Imports no torch and none of ONNX's packages."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from compress.architectures.model_map import model_map
from compress.exports.base import ExportError
from compress.spec.classes import CAUSAL_LM
from compress.spec.spec import Spec

#: File of the graph, where transformers.js and sentence-transformers look for it; genai reads its name from the config.
GRAPH = "onnx/model.onnx"


def check_formats(spec: Spec) -> None:
    """Raise `ExportError` for a format of codes that ONNX has no operator for, and for codes of the table of tokens."""
    table = model_map(spec).embedding
    if table is not None and spec.tensors[table].quant_format is not None:
        fix = "leave it out of `overrides`, or export what `compress unpack` writes"
        raise ExportError("ONNX cannot hold codes of the table of tokens", where=table, fix=fix)
    for tensor in spec.stored():
        quant_format = tensor.quant_format
        if quant_format is None or (
            (quant_format.is_integer or quant_format.format == "fp8") and not quant_format.experts
        ):
            continue
        what = "codes of experts" if quant_format.experts else f"{quant_format.format} codes"
        raise ExportError(
            f"ONNX cannot hold {what}",
            where=tensor.name,
            fix="cast with weights: int4 or int8, or export what `compress unpack` writes",
        )


#: Sizes of heads are multiples of this in onnxruntime's attention.
_HEAD = 16


def is_causal(spec: Spec) -> bool:
    """Whether the model is a causal language model."""
    return (spec.structure.class_name or "").endswith(CAUSAL_LM.suffixes)


def without_cache(spec: Spec) -> str | None:
    """Why the graph of a causal model has no KV cache, in words; None where it has one."""
    config = spec.structure.config
    if spec.structure.class_name not in built_classes():
        return f"onnxruntime-genai's builder does not know {spec.structure.class_name}"
    size = config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"])
    if size % _HEAD:
        return f"onnxruntime's attention takes heads of a multiple of {_HEAD}, these have {size}"
    return None


@cache
def built_classes() -> frozenset[str]:
    """Classes that the installed builder of onnxruntime-genai has a graph for, as its source lists them."""
    package = find_spec("onnxruntime_genai")
    if package is None or package.origin is None:
        return frozenset()
    source = Path(package.origin).parent / "models" / "builder.py"
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    return frozenset(re.findall(r'architectures\[0\] == "(\w+ForCausalLM)"', text))
