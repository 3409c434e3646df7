"""Opening a checkpoint: folder or hub id ▶ spec, and logical tensors on demand."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import architectures
from compress.architectures.agreement import check_agreement
from compress.architectures.inferred import Inferred
from compress.checkpoint import dequantize, hub, tidy
from compress.checkpoint import edits as structure_edits
from compress.checkpoint.claims import check_fields, check_sizes
from compress.checkpoint.dequantize.base import all_finite
from compress.checkpoint.edits.base import alias
from compress.checkpoint.files import ReadBytes, SameBytes, read_bytes, read_json, same_bytes, weight_headers
from compress.checkpoint.gguf.opening import GgufContents, gguf_contents, with_tokenizer
from compress.checkpoint.headers import Header
from compress.checkpoint.layout import METADATA_KEY, SINGLE_NAME
from compress.checkpoint.older_keys import without_older_keys
from compress.checkpoint.remote import without_code
from compress.checkpoint.sidecars import find_sidecars
from compress.checkpoint.storage import CODECS, parts
from compress.checkpoint.storage.compressed_tensors import parse
from compress.checkpoint.storage.compressed_tensors.loaders import runtime_of
from compress.checkpoint.storage.compressed_tensors.write import KEY, strip
from compress.checkpoint.storage.reading import READERS
from compress.checkpoint.values import Checkpoint, Codes, Value, torch_dtype
from compress.errors import CheckpointError
from compress.files import expanded
from compress.spec.formats import QuantFormat
from compress.spec.spec import FLOAT_DTYPES, Quantized, Spec, Structure, Tensor

if TYPE_CHECKING:
    import torch


#: ``model_type`` of compact checkpoints: distinct, so that stock loaders refuse instead of guessing.
COMPACT_TYPE = "compress"


class Stored(Checkpoint):
    """A checkpoint on disk."""

    folder: Path

    def __init__(
        self,
        folder: Path,
        spec: Spec,
        headers: Mapping[str, Header],
        *,
        trust_remote_code: bool = False,
        ignore_auto_map: bool = False,
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.trust_remote_code, self.ignore_auto_map = trust_remote_code, ignore_auto_map
        self.sidecars = find_sidecars(folder)
        if spec.sources:
            self.sidecars = tuple(name for name in self.sidecars if name not in dequantize.STALE)
        self.files = tuple(headers)
        self.metadata = _metadata(headers)
        self._where = {key: (file, header, e) for file, header in headers.items() for key, e in header.entries.items()}
        self.entries = {key: entry for key, (_, _, entry) in self._where.items()}

    def tensor(self, name: str) -> Value:
        """Value of a tensor, read by pread into fresh memory, so that no mapped pages stay resident."""
        from compress.checkpoint.storage.reading import decode, decode_codes, logical_values, part_names

        tensor = self.spec.tensors[name]
        if tensor.alias_of:
            return self.tensor(tensor.alias_of)
        if (source := self.spec.sources.get(name)) is not None:
            return self._dequantized(tensor, source)
        quant_format = None if tensor.quant_format is None else tensor.quant_format.to_json()
        parts = {role: self._read(key) for role, key in part_names(name, tensor.storage, quant_format).items()}
        try:
            if quant_format is None:
                data, mask = decode(parts, tensor.storage, tensor.shape, tensor.kept is not None)
                value = Value(data, mask)
            else:
                codes, mask = decode_codes(parts, tensor.storage, tensor.shape, quant_format)
                value = Value(
                    partial(logical_values, codes, mask, quant_format, tensor.shape),
                    mask,
                    Codes(*codes, static_inputs=self.static_inputs(name)),
                )
        except ValueError as error:
            raise CheckpointError(f"tensor {name}: {error}", where=str(self.folder)) from None
        if mask is not None and int(mask.sum()) != tensor.kept:
            raise CheckpointError(
                f"tensor {name} keeps {int(mask.sum())} weights, but its metadata says {tensor.kept}",
                where=str(self.folder),
                fix="it was changed after it was written; create it again",
            )
        return value

    def _dequantized(self, tensor: Tensor, source: Quantized) -> Value:
        """Value of a tensor that other tools have quantised."""
        dtype = torch_dtype(tensor.dtype)
        try:
            data = source.decode({role: self._read(key) for role, key in source.arrays.items()}, dtype)
        except ValueError as error:
            raise CheckpointError(f"tensor {tensor.name}: {error}", where=str(self.folder)) from None
        if not all_finite(data):
            raise CheckpointError(
                f"tensor {tensor.name}: its values are NaN, infinite or beyond the range of {FLOAT_DTYPES[tensor.dtype]}",
                where=str(self.folder),
            )
        assert tuple(data.shape) == tensor.shape, (tensor, data.shape)
        assert data.dtype == dtype, (tensor, data.dtype)
        return Value(data)

    def static_inputs(self, name: str) -> dict[str, torch.Tensor]:
        """Static input scales and zero points of the layer of a quantised tensor, by name suffix."""
        tensor = self.spec.tensors[name]
        return (
            {}
            if tensor.quant_format is None
            else {end: self._read(f"{tensor.module}.{end}") for end in tensor.quant_format.static_inputs}
        )

    def _read(self, key: str) -> torch.Tensor:
        import torch

        file, header, entry = self._where[key]
        assert self.folder is not None
        size = entry.end - entry.start
        buffer = torch.empty(size, dtype=torch.uint8)
        view = memoryview(buffer.numpy().data) if size else memoryview(b"")
        path = self.folder / file
        try:
            with path.open("rb", buffering=0) as stream:
                done = 0
                while done < size:
                    got = os.preadv(
                        stream.fileno(), [view[done : done + (1 << 27)]], header.data_start + entry.start + done
                    )
                    if got == 0:
                        raise CheckpointError(f"ended while tensor {key} was read", where=str(path))
                    done += got
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
        return buffer.view(torch_dtype(entry.dtype)).reshape(entry.shape)


def open_checkpoint(
    reference: str | Path, *, trust_remote_code: bool = False, ignore_auto_map: bool = False, offline: bool = False
) -> Stored:
    """Open a folder or a GGUF file, or download a hub id (``org/name``, ``org/name@revision``). Reads headers only.

    Args:
        trust_remote_code: allow Python code that the checkpoint brings (`auto_map`).
        ignore_auto_map: ignore such code and use the class of transformers.

    Raises:
        CheckpointError: config, headers and edits are damaged or disagree.
    """
    folder = expanded(reference)
    if not folder.exists() and hub.is_hub_id(str(reference)):
        folder = hub.download(str(reference), offline=offline)
    folder = with_tokenizer(folder)
    spec, headers = _read_folder(folder, trust_remote_code, ignore_auto_map)
    return Stored(folder, spec, headers, trust_remote_code=trust_remote_code, ignore_auto_map=ignore_auto_map)


def open_headers(
    reference: str | Path, *, trust_remote_code: bool = False, ignore_auto_map: bool = False, offline: bool = False
) -> tuple[Spec, dict[str, str]]:
    """Spec and metadata, without torch. Headers of a hub id are read by range requests; no weights are downloaded."""
    folder = expanded(reference)
    if not folder.exists() and hub.is_hub_id(str(reference)):
        config, headers, same, read, notes = hub.read_headers(str(reference), offline=offline)
        config = check_config(config, str(reference), trust_remote_code, ignore_auto_map)
        spec, headers = _spec(config, headers, str(reference), same, read, notes)
        return spec, _metadata(headers)
    spec, headers = _read_folder(folder, trust_remote_code, ignore_auto_map)
    return spec, _metadata(headers)


def _metadata(headers: Mapping[str, Header]) -> dict[str, str]:
    """String metadata of all weight files, without the table of stored tensors."""
    return {k: v for header in headers.values() for k, v in header.metadata.items() if k != METADATA_KEY}


def _read_folder(folder: Path, trust_remote_code: bool, ignore_auto_map: bool) -> tuple[Spec, dict[str, Header]]:
    if (contents := gguf_contents(folder)) is not None:
        config = check_config(contents.config, f"{folder}/config.json", trust_remote_code, ignore_auto_map)
        home = folder.parent if folder.is_file() else folder
        return _spec(config, contents.headers, str(folder), same_bytes(home), read_bytes(home), (), contents)
    if folder.is_file():
        raise CheckpointError(
            "is a file, not a checkpoint folder", where=str(folder), fix="name the folder that holds config.json"
        )
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=str(folder))
    config = check_config(
        read_json(folder, "config.json"), str(folder / "config.json"), trust_remote_code, ignore_auto_map
    )
    headers, notes = weight_headers(folder)
    return _spec(config, headers, str(folder), same_bytes(folder), read_bytes(folder), notes)


def check_config(config: Any, where: str, trust_remote_code: bool, ignore_auto_map: bool = False) -> dict[str, Any]:
    """The config, checked: it has a model type, a known format, and remote code only if that is allowed."""
    if not isinstance(config, dict):
        raise CheckpointError("is not a JSON object", where=where)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise CheckpointError("has no `model_type`", where=where, fix="a config.json written by transformers has one")
    if config.get("transformers_weights") not in (None, SINGLE_NAME):
        raise CheckpointError(
            f"has `transformers_weights`: {config['transformers_weights']!r}, which is not supported",
            where=where,
            fix=f"rename that file to {SINGLE_NAME} and remove the key",
        )
    if config["model_type"] == COMPACT_TYPE:
        if not isinstance(config.get("base"), dict) or not isinstance(config["base"].get("model_type"), str):
            raise CheckpointError("has the model type of a compact checkpoint, but no `base` config", where=where)
        if config.get("format") != 1:
            raise CheckpointError(
                f"has the compact format {config.get('format')!r}; this version reads format 1",
                where=where,
                fix="update compress",
            )
    elif ignore_auto_map:
        return without_code(config)
    elif config.get("auto_map") and not trust_remote_code:
        raise CheckpointError(
            "needs Python code that the checkpoint brings (`auto_map`)",
            where=where,
            fix="if you trust it, set trust_remote_code: true; to use the class of transformers, set ignore_auto_map: true",
        )
    check_fields(config["base"] if config["model_type"] == COMPACT_TYPE else config, where)
    return config


def _spec(
    config: dict[str, Any],
    headers: Mapping[str, Header],
    where: str,
    same: SameBytes,
    read: ReadBytes,
    notes: tuple[str, ...],
    contents: GgufContents | None = None,
) -> tuple[Spec, dict[str, Header]]:
    """Spec of a checkpoint, and its headers with the spec's tensor names.

    Args:
        same: compares two byte ranges, each given by file and offset. read: reads one. notes: notes so far.
        contents: of a GGUF file, which has its tensors and their sources.
    """
    compact = config["model_type"] == COMPACT_TYPE
    stock, chosen = tidy.without_choices(config["base"] if compact else without_older_keys(config))
    if compact:
        stock.pop("auto_map", None)  # compact checkpoints bring only the bundled file, which loads a stock class
    edits = structure_edits.from_json(config.get("edits"), f"{where}/config.json") if compact else ()
    structure, headers = Structure(stock, edits, compact=compact), tidy.with_new_names(headers, stock)
    places = {
        key: (file, header.data_start + entry.start, entry.end - entry.start)
        for file, header in headers.items()
        for key, entry in header.entries.items()
    }
    if contents is None:
        tensors, sources, more = _tensors(structure, headers, where, lambda key: read(places[key][:2], places[key][2]))
    else:
        tensors, sources, more = contents.tensors, contents.sources, contents.notes
    if not tensors:
        raise CheckpointError("has no tensors", where=where)
    if sources:
        structure = replace(structure, config=dequantize.config_of(structure.config, tensors.values()))
    check_sizes(Spec(structure, tensors), where)

    def alike(a: str, b: str) -> bool:
        return not sources.keys() & {a, b} and same(places[a][:2], places[b][:2], places[a][2])

    whole = strip(Spec(structure, tensors, notes=(*notes, *more, *chosen), sources=sources))
    spec = tidy.without_copies(tidy.without_leftovers(whole), alike, where)
    if sources:
        ends = (h.data_start + max((e.end for e in h.entries.values()), default=0) for h in headers.values())
        files = sum(ends) if contents is None else contents.bytes
        spec = replace(spec, file_bytes=files)
    else:
        gone = whole.tensors.keys() - spec.tensors.keys()
        spec = replace(spec, left_out=sum(places[name][2] for name in gone if name in places))
    if not compact and any(t.quant_format is not None for t in spec.tensors.values()):
        spec = replace(spec, structure=replace(spec.structure, runtime=runtime_of(spec)))
    return with_aliases(_told(spec), where), headers


def _tensors(
    structure: Structure, headers: Mapping[str, Header], where: str, read: dequantize.ReadArray
) -> tuple[dict[str, Tensor], dict[str, Quantized], tuple[str, ...]]:
    """Logical tensors in file order, the sources of those that are dequantised on reading, and notes."""
    tensors: dict[str, Tensor] = {}
    sources: dict[str, Quantized] = {}
    left: set[str] = set()
    notes: tuple[str, ...] = ()
    tables = {file: _table(header, f"{where}/{file}") for file, header in headers.items()}
    owners = {part.key: name for table in tables.values() for name, t in table.items() for part in parts(t)}
    if structure.config.get(KEY) and not any(t.quant_format for table in tables.values() for t in table.values()):
        every = {key: entry for header in headers.values() for key, entry in header.entries.items()}
        if dequantize.knows(structure.config[KEY]):
            others, sources, left, notes = dequantize.parse(structure.config, every, read, where)
            owners |= {key: name for name, source in sources.items() for key in source.arrays.values()}
        else:
            others, left, notes = parse.parse(structure, every, where)
            owners |= {part.key: name for name, t in others.items() for part in parts(t)}
        for file, header in headers.items():
            names = {owners[key] for key in header.entries if key in owners}
            tables[file] |= {name: tensor for name, tensor in others.items() if name in names}
    elif not structure.config.get(KEY):
        dequantize.check_said((key for header in headers.values() for key in header.entries), where)
    for file, header in headers.items():
        table = tables[file]
        for key, entry in header.entries.items():
            name = owners.get(key, key)
            if key in left:
                continue
            if name in tensors and name not in table:
                raise CheckpointError(f"tensor {name} is in two files", where=where)
            tensors[name] = table.get(name) or Tensor(name, entry.shape, entry.dtype)
    return tensors, sources, notes


def _told(spec: Spec) -> Spec:
    """Spec with a note where the architecture is told by names and shapes alone."""
    record = architectures.record_for(spec)
    if not isinstance(record, Inferred) or record.source != "shapes":
        return spec
    note = f"{', '.join(record.unknown)}; linear layers are told by the names and shapes of tensors"
    return replace(spec, notes=(*spec.notes, note))


def _table(header: Header, where: str) -> dict[str, Tensor]:
    """Tensors of the metadata's table, checked against the arrays in the same file."""
    if METADATA_KEY not in header.metadata:
        return {}
    try:
        rows = json.loads(header.metadata[METADATA_KEY])
        result = {}
        for name, row in rows.items():
            storage = tuple(row["storage"])
            if storage not in CODECS:
                raise CheckpointError(
                    f"tensor {name} is stored by {' ∘ '.join(storage)}, which this version cannot read", where=where
                )
            quant_format = QuantFormat.from_json(row["grid"]) if "grid" in row else None
            assert CODECS[storage].stores(quant_format), quant_format
            if quant_format is None:
                dtype = header.entries[name + READERS[storage].names(None)["values"]].dtype
            else:
                dtype = row["dtype"]
            shape, kept = tuple(row["shape"]), row["kept"]
            assert all(type(n) is int and n >= 0 for n in shape)
            assert kept is None or (type(kept) is int and 0 <= kept <= prod(shape))
            assert dtype in FLOAT_DTYPES or (quant_format is None and kept is None), dtype
            assert quant_format is None or quant_format.fits(shape), quant_format
            tensor = Tensor(name, shape, dtype, kept=kept, storage=storage, quant_format=quant_format)
            assert CODECS[storage].takes(tensor), tensor
            for part in parts(tensor):
                if header.entries[part.key].shape != part.shape or header.entries[part.key].dtype != part.dtype:
                    raise CheckpointError(f"array {part.key} does not match the metadata", where=where)
            result[name] = tensor
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise CheckpointError(f"has a damaged table of stored tensors: {repr(error)[:200]}", where=where) from None
    return result


def with_aliases(spec: Spec, where: str) -> Spec:
    """Spec with aliases for the tensors that edits share or the config ties."""
    spec = structure_edits.with_aliases(spec, where)
    record = architectures.record_for(spec)
    check_agreement(record, spec, where)
    aliases = {target: alias(spec.tensors[source], target) for target, source in record.ties(spec)}
    return replace(spec, tensors={**spec.tensors, **aliases})
