"""GGUF files as checkpoints: config, logical tensors and their sources, from the header. Imports no torch."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.architectures.gguf import SCALE, gguf_model
from compress.checkpoint.dequantize import stored_note
from compress.checkpoint.dequantize.ggml import GgmlType, dequantize
from compress.checkpoint.files import read_bytes, read_json
from compress.checkpoint.gguf.reader import GgufHeader, read_gguf
from compress.checkpoint.gguf.view import view
from compress.checkpoint.headers import Header, TensorEntry
from compress.checkpoint.sidecars import LinkedFolder, safe_file
from compress.errors import CheckpointError
from compress.spec.spec import FLOAT_DTYPES, Quantized, Tensor

if TYPE_CHECKING:
    import torch

ENDING = ".gguf"
#: Fields in which a config beside the file must agree with its metadata.
_AGREEING = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
#: Largest tensor, in values, that is read as part of the config.
_SMALL = 1 << 16


@dataclass(frozen=True, slots=True)
class GgufContents:
    """Contents of a GGUF file as a checkpoint.

    Attributes:
        config: of the stock class. headers: an entry of bytes for each tensor of the file, by file.
        tensors, sources: logical tensors, and their form in the file. bytes: of the file. notes: for the user.
        metadata: of the file.
    """

    config: dict[str, Any]
    headers: dict[str, Header]
    tensors: dict[str, Tensor]
    sources: dict[str, Quantized]
    bytes: int
    notes: tuple[str, ...]
    metadata: Mapping[str, Any]


def _place(reference: Path) -> tuple[Path, str] | None:
    """Folder and name of a GGUF file, given itself or by the folder that has it and no safetensors; None for others.

    Raises:
        CheckpointError: the folder has several.
    """
    if reference.is_file():
        return (LinkedFolder(reference.parent), reference.name) if reference.suffix == ENDING else None
    if any(reference.glob("*.safetensors")) or any(reference.glob("*.safetensors.index.json")):
        return None
    names = sorted(path.name for path in reference.glob(f"*{ENDING}") if not path.name.startswith("mmproj"))
    if len(names) > 1:
        raise CheckpointError(
            f"holds {len(names)} GGUF files, such as {names[0]}", where=str(reference), fix="name one"
        )
    return (reference, names[0]) if names else None


def gguf_contents(reference: Path) -> GgufContents | None:
    """Contents of a GGUF file, or of a folder with one; None for other checkpoints. Raises `CheckpointError`."""
    if (place := _place(reference)) is None:
        return None
    contents = read_contents(*place)
    if not reference.is_dir() or not (reference / "config.json").exists():
        return contents
    config = read_json(reference, "config.json")
    for key in _AGREEING:
        if not isinstance(config, dict) or config.get(key) != contents.config[key]:
            raise CheckpointError(
                f"is not the config of {place[1]}, whose `{key}` is {contents.config[key]}",
                where=str(reference / "config.json"),
                fix="put the model's own config.json there, or remove it",
            )
    own = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    return replace(contents, config={**own, "dtype": contents.config["dtype"]})


def with_tokenizer(reference: Path) -> Path:
    """The folder of a checkpoint; for a GGUF file without config and tokenizer beside it, one in the cache that has them."""
    if (place := _place(reference)) is None:
        return reference
    if reference.is_dir() and all((reference / name).exists() for name in ("config.json", "tokenizer.json")):
        return reference
    contents = read_contents(*place)
    return view(safe_file(*place), contents.config, contents.metadata)


def read_contents(folder: Path, name: str) -> GgufContents:
    """Contents of a GGUF file of a folder. Raises `CheckpointError`."""
    path = safe_file(folder, name)
    header = read_gguf(path)
    shapes = {key: tensor.shape for key, tensor in header.tensors.items()}

    def floats(key: str) -> tuple[float, ...]:
        if (tensor := header.tensors.get(key)) is None:
            raise CheckpointError(f"lacks the tensor {key}", where=str(path))
        if tensor.kind.name != "F32" or (count := tensor.shape[-1]) > _SMALL or len(tensor.shape) > 1:
            raise CheckpointError(f"stores {key} as {tensor.kind.name} {list(tensor.shape)}", where=str(path))
        return struct.unpack(f"<{count}f", read_bytes(folder)((name, tensor.start), 4 * count))

    model = gguf_model(header.metadata, shapes, floats, str(path))
    dtype = _dtype(header)
    tensors, sources = dict[str, Tensor](), dict[str, Quantized]()
    entries: dict[str, TensorEntry] = {}
    for key, new in model.names.items():
        stored = header.tensors[key]
        experts = stored.shape[0] if "{}" in new else 1
        shape, size = stored.shape[1:] if "{}" in new else stored.shape, (stored.end - stored.start) // experts
        for number in range(experts):  # a tensor that holds all experts has one after the other
            part, start = f"{key}[{number}]" if "{}" in new else key, stored.start + number * size
            decode = partial(
                _decode,
                kind=stored.kind,
                shape=shape,
                heads=model.heads.get(key, 0),
                raised=key in model.raised,
                transposed=key in model.transposed,
            )
            name_in_model = new.format(number)
            logical = shape[::-1] if key in model.transposed else shape
            tensors[name_in_model] = Tensor(name_in_model, logical, dtype)
            arrays = {"blocks": part}
            entries[part] = TensorEntry("U8", (size,), start, start + size)
            if (scale := _scale(header, key, number, experts, str(path))) is not None:
                arrays["scale"] = f"{part}{SCALE}"
                entries[arrays["scale"]] = scale
            bytes_ = sum(entries[array].end - entries[array].start for array in arrays.values())
            sources[name_in_model] = Quantized(f"GGUF {stored.kind.name}", arrays, bytes_, decode)
    return GgufContents(
        config={**model.config, "dtype": FLOAT_DTYPES[dtype]},
        headers={name: Header(entries, {}, 0)},
        tensors=tensors,
        sources=sources,
        bytes=header.size,
        notes=(stored_note(tensors, sources),),
        metadata=header.metadata,
    )


def _scale(header: GgufHeader, key: str, number: int, experts: int, where: str) -> TensorEntry | None:
    """Where the factor of a matrix, or of one of its experts, lies; None where it has none. Raises `CheckpointError`."""
    if (stored := header.tensors.get(f"{key.removesuffix('.weight')}{SCALE}")) is None or not key.endswith(".weight"):
        return None
    if stored.kind.name != "F32" or stored.shape != (experts,):
        raise CheckpointError(f"stores the scale of {key} as {stored.kind.name} {list(stored.shape)}", where=where)
    start = stored.start + 4 * number
    return TensorEntry("F32", (1,), start, start + 4)


def _dtype(header: GgufHeader) -> str:
    """Dtype of the values: bfloat16, or that of the matrices if all of them are floats of 16 or 32 bits."""
    kinds = {tensor.kind.dtype for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return "F16" if kinds <= {"F16", "F32"} and "F16" in kinds else "F32" if kinds == {"F32"} else "BF16"


def _decode(
    arrays: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    kind: GgmlType,
    shape: tuple[int, ...],
    heads: int,
    raised: bool,
    transposed: bool,
) -> torch.Tensor:
    """Values of a tensor; rows of ``heads`` heads are put back in order, and one is taken from ``raised`` norms.

    ``transposed``: the stock class stores the matrix [I, O].
    """
    import torch

    scale = arrays.get("scale")
    values = dequantize(arrays["blocks"], kind, shape, torch.float32 if raised or scale is not None else dtype)
    if scale is not None:
        values = (values * scale).to(dtype)
    if raised:
        values = (values - 1).to(dtype)
    if heads:  # the converter stores the two halves of a head's rows alternately
        values = values.reshape(heads, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)
    return values.T.contiguous() if transposed else values
