"""Exports to ONNX: a folder with the graph, the config and the tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from compress.exports.base import ExportPlan, ExportRow, Target, require
from compress.exports.onnx.settings import OnnxSettings
from compress.exports.onnx.supported import GRAPH, check_formats, is_causal, without_cache
from compress.spec.spec import DTYPE_BITS, Spec, Tensor

if TYPE_CHECKING:
    from compress.checkpoint.values import Checkpoint
    from compress.progress import Progress

#: Bytes of a graph without its arrays, about.
_GRAPH_BYTES = 60_000


class Onnx(Target[OnnxSettings]):
    """A folder that onnxruntime, onnxruntime-genai, transformers.js, OpenVINO and sentence-transformers open."""

    name = "onnx"
    summary = (
        "ONNX, for onnxruntime and genai, transformers.js, OpenVINO: integer and fp8 codes as they are, a KV cache."
    )
    ending = "-onnx"
    settings = OnnxSettings
    packages = ("onnx", "onnx_ir", "onnxruntime")
    extra = "onnx"

    def plan(self, spec: Spec, folder: Path, settings: OnnxSettings) -> ExportPlan:
        """About the size of the folder's graph, and its tensors."""
        check_formats(spec)
        if is_causal(spec):
            require(("onnxruntime_genai",), self.extra, "a causal model with a KV cache")
        if not has_cache(spec):
            require(("onnxscript",), self.extra, "an export by torch")
        if has_cache(spec):
            from compress.checkpoint.edits.twin import dense_spec

            dense_spec(spec)
        rows = [_row(tensor) for tensor in spec.weights()]
        kinds = Counter((row.source, row.type) for row in rows)
        joined = tuple(
            ExportRow(*kind, number, sum(row.bytes for row in rows if (row.source, row.type) == kind), True)
            for kind, number in kinds.items()
        )
        size = sum(row.bytes for row in rows) + _GRAPH_BYTES
        return ExportPlan(self.name, size, joined, exact=False, notes=tuple(_notes(spec)))

    def write(self, checkpoint: Checkpoint, path: Path, settings: OnnxSettings, progress: Progress) -> None:
        """Write the folder, and run the graph beside the model."""
        from compress.checkpoint.sidecars import copy_sidecars

        graph = path / GRAPH
        graph.parent.mkdir(parents=True)
        with progress.task("write ONNX", 1, "graphs") as task:
            if has_cache(checkpoint.spec):
                from compress.exports.onnx.decoder import write_decoder

                with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as work:
                    write_decoder(checkpoint, path, Path(work), settings.accuracy_level)
            else:
                from compress.exports.onnx.traced import write_traced

                write_traced(checkpoint, graph, settings.accuracy_level)
            task.advance()
        if checkpoint.folder is not None:
            copy_sidecars(checkpoint.folder, checkpoint.sidecars, path)
        _write_config(checkpoint.spec, path)


def has_cache(spec: Spec) -> bool:
    """Whether the graph has a KV cache."""
    return is_causal(spec) and without_cache(spec) is None


def _notes(spec: Spec) -> list[str]:
    formats = [tensor.quant_format for tensor in spec.stored() if tensor.quant_format is not None]
    notes = []
    if is_causal(spec) and (reason := without_cache(spec)) is not None:
        notes.append(f"{reason}: the graph has no KV cache, it scores texts")
    if any(each.activations for each in formats):
        notes.append("inputs of layers are not rounded as the checkpoint's config says")
    if spec.structure.cache_format:
        notes.append("the KV cache is float32")
    return notes


def _row(tensor: Tensor) -> ExportRow:
    quant_format = tensor.quant_format
    source = quant_format.format if quant_format else tensor.dtype.lower()
    if quant_format is not None:
        outputs, inputs = quant_format.rows(tensor.shape)
        bits = 4 if quant_format.bits <= 4 else 8
        groups = 1 if quant_format.whole else quant_format.groups(tensor.shape)
        zeros = 0 if quant_format.symmetric else outputs * groups * bits // 8
        scales = outputs * groups * DTYPE_BITS[tensor.dtype] // 8
        kind = "fp8" if quant_format.format == "fp8" else f"int{bits}"
        return ExportRow(source, kind, 1, outputs * inputs * bits // 8 + scales + zeros, True)
    narrow = len(tensor.shape) > 1 and DTYPE_BITS[tensor.dtype] == 16
    return ExportRow(source, source if narrow else "f32", 1, tensor.count * (2 if narrow else 4), True)


def _write_config(spec: Spec, output: Path) -> None:
    """The stock config, and what transformers.js takes by default: the one graph that there is."""
    config = dict(spec.structure.config)
    config["dtype"] = "float32"
    data = any(path.name.endswith("_data") for path in (output / GRAPH).parent.iterdir())
    config["transformers.js_config"] = {"dtype": "fp32", **({"use_external_data_format": True} if data else {})}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
