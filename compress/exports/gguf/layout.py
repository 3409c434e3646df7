"""A GGUF file before its data are written: metadata and tensors with their types and places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress.architectures.gguf import GgufLayout, GgufPlace, gguf_layout
from compress.errors import CompressError
from compress.exports.base import ExportError, ExportPlan, ExportRow
from compress.exports.gguf.settings import GgufSettings
from compress.exports.gguf.tokenizer import tokenizer_metadata
from compress.exports.gguf.types import Chosen, chosen
from compress.spec.spec import Spec, Tensor

#: Files of these types are named so by llama.cpp: type of most matrices ▶ general.file_type.
_FILE_TYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17,
    "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30,
    "IQ1_M": 31, "BF16": 32, "MXFP4": 38, "NVFP4": 39, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17,
}  # fmt: skip
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor of the file: name, shape in torch's order, type, bytes, and the stock tensors in it, in order."""

    name: str
    shape: tuple[int, ...]
    chosen: Chosen
    bytes: int
    sources: tuple[Tensor, ...]
    place: GgufPlace


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The file: model, tensors in order, float factors, further metadata by full key, and notes."""

    model: GgufLayout
    tensors: tuple[FileTensor, ...]
    metadata: Mapping[str, Any]

    @property
    def scales(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Names of tensors that hold nvfp4's global scales ▶ the stock tensors whose they are."""
        coded = [t for t in self.tensors if t.chosen.coded and t.chosen.type == "NVFP4"]
        return {f"{t.name.removesuffix('.weight')}.scale": t.sources for t in coded}

    def writer(self, path: Path) -> Any:
        """A `gguf.GGUFWriter` with metadata and tensors, at the beginning of the data."""
        import gguf
        import numpy as np

        writer = gguf.GGUFWriter(path, self.model.architecture)
        for key, value in self.metadata.items():
            _add(writer, key, value)
        for key, value in self.model.metadata.items():
            _add(writer, f"{self.model.architecture}.{key}", value)
        for name, values in (*self.model.factors.items(), *self.scales.items()):
            writer.add_tensor_info(name, (len(values),), np.dtype(np.float32), 4 * len(values))
        for tensor in self.tensors:
            kind = gguf.GGMLQuantizationType[tensor.chosen.type]
            shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer

    def plan(self) -> ExportPlan:
        """Its size, and tensors by storage and type."""
        with TemporaryDirectory() as place:
            writer = self.writer(Path(place) / "header.gguf")
            header = writer.fout[0].tell()
            writer.close()
        floats = (*self.model.factors.values(), *self.scales.values())
        sizes = [4 * len(values) for values in floats] + [t.bytes for t in self.tensors]
        total = _padded(header) + sum(map(_padded, sizes))
        rows: dict[tuple[str, str, bool], list[int]] = {}
        for tensor in self.tensors:
            key = (_stored(tensor.sources[0]), tensor.chosen.type, tensor.chosen.exact)
            rows.setdefault(key, []).append(tensor.bytes)
        table = tuple(
            ExportRow(source, kind, len(sizes), sum(sizes), exact) for (source, kind, exact), sizes in rows.items()
        )
        return ExportPlan("gguf", total, table, notes=(*self.model.notes, *self._notes()))

    def _notes(self) -> list[str]:
        """Sentences on values that are not those of the checkpoint."""
        coded = [t for t in self.tensors if t.chosen.coded]
        notes = []
        if any(t.chosen.type in ("Q4_1", "Q5_1") for t in coded):
            notes.append("minima (scale times zero point) are rounded to float16")
        if self.scales:
            notes.append("one over nvfp4's global scales is rounded to float32")
        if any(t.sources[0].dtype == "F32" and t.chosen.type != "NVFP4" for t in coded):
            notes.append("scales are rounded from float32 to float16")
        if any(f.activations for t in coded if (f := t.sources[0].quant_format) is not None):
            notes.append("inputs are not rounded as the config asks: llama.cpp has its own way")
        return notes


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _stored(tensor: Tensor) -> str:
    """Storage of a tensor in words."""
    return tensor.dtype if tensor.quant_format is None else tensor.quant_format.format


def _add(writer: Any, key: str, value: Any) -> None:
    """Add metadata in the type that llama.cpp reads."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def gguf_file(spec: Spec, folder: Path, settings: GgufSettings) -> GgufFile:
    """The file for a checkpoint. Raises `CompressError` where GGUF, llama.cpp or its tokenizers have not what it needs."""
    if edits := [edit for edit in spec.structure.edits if edit.kind != "sized"]:
        raise ExportError(
            f"GGUF has no place for {edits[0].kind} of {edits[0].module}",
            fix="`compress unpack` writes the dense twin, which it may hold",
        )
    stored = [t for t in spec.stored() if not (spec.structure.kv_cache and t.is_cache_scale)]
    model = gguf_layout(spec.structure.config, {t.name: t.shape for t in stored})
    groups: dict[str, list[Tensor]] = {}
    for tensor in stored:
        groups.setdefault(model.tensors[tensor.name].name, []).append(tensor)
    tensors = tuple(_file_tensor(name, group, model, spec, settings) for name, group in groups.items())
    kinds = [t.chosen.type for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1 and not t.place.wide]
    most = max(set(kinds), key=kinds.count)
    metadata = {
        "general.file_type": _FILE_TYPES.get(settings.type or most, _FILE_TYPES.get(most, 0)),
        "general.quantization_version": 2,
        **tokenizer_metadata(folder, int(spec.structure.config["vocab_size"])),
    }
    return GgufFile(model, tensors, metadata)


def _file_tensor(name: str, group: list[Tensor], model: GgufLayout, spec: Spec, settings: GgufSettings) -> FileTensor:
    """A tensor of the file, of one stock tensor or of those of all experts."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    places = {t.name: model.tensors[t.name] for t in group}
    group = sorted(group, key=lambda t: places[t.name].expert or 0)
    place = places[group[0].name]
    types = {chosen(t, place, spec, settings) for t in group}
    if len(types) > 1 or len({t.shape for t in group}) > 1:
        raise CompressError(f"the experts of {name} are stored in several ways, and GGUF has one tensor for all")
    shape = group[0].shape[::-1] if place.transposed else group[0].shape
    if place.expert is not None:
        shape = (len(group), *shape)
    kind = types.pop()
    if kind.type == "NVFP4" and not model.scaled:
        raise ExportError(
            f"llama.cpp leaves out nvfp4's global scales in models of the type `{spec.structure.config['model_type']}`",
            where=group[0].name,
            fix="cast to mxfp4 or int4, or add `--type Q4_K` to round the values again",
        )
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.type]]
    total = sum(t.count for t in group)
    return FileTensor(name, shape, kind, total // values * size, tuple(group), place)
