"""The changed tensors of a run over the blocks, in a file per block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.blockwise.details import BlockDetails
from compress.blockwise.linears import TargetLinear
from compress.blockwise.streamed import StreamedModel
from compress.checkpoint.storage.bits import pack_bits, unpack_bits
from compress.checkpoint.values import Checkpoint, Codes, Value, canonical, torch_dtype
from compress.spec.spec import widest
from compress.workspace import Workspace

#: Fields of `Codes`.
_CODES = ("codes", "scale", "zero", "overall")
#: Name of a block's tensors in the workspace.
_BLOCK = "{:05}"


@dataclass(frozen=True)
class TensorExtras:
    """Parts of a tensor beside its values: a keep-mask, as the checkpoint shapes it; codes; factors [O, r] and [r, I]."""

    mask: torch.Tensor | None = None
    codes: Codes | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None


def extras_by_tensor(
    parts: Sequence[tuple[TargetLinear, torch.Tensor | None, Codes | None]],
) -> dict[str, TensorExtras]:
    """Keep-masks and codes by the checkpoint's tensors, of matrices with theirs [O, I]; experts are put together."""
    whole = {
        x.name: TensorExtras(None if keep is None else x.stored(keep), codes)
        for x, keep, codes in parts
        if x.part is None
    }
    together: dict[str, list[tuple[TargetLinear, torch.Tensor | None, Codes | None]]] = {}
    for linear, keep, codes in parts:
        if linear.part is not None:
            together.setdefault(linear.tensor, []).append((linear, keep, codes))
    for tensor, rows in together.items():
        first, keep, codes = rows[0]
        mask = None if keep is None else _stacked([(x, k) for x, k, _ in rows if k is not None])
        if codes is not None:
            fields: dict[str, Any] = {
                name: _stacked([(x, getattr(c, name)) for x, _, c in rows]).flatten(0, 1)
                for name in ("codes", "scale", "zero")
                if getattr(codes, name) is not None
            }
            codes = Codes(**fields)
        whole[tensor] = TensorExtras(None if mask is None else first.stored(mask), codes)
    return whole


def _stacked(parts: Sequence[tuple[TargetLinear, torch.Tensor]]) -> torch.Tensor:
    """Rows of experts' matrices [o, n] ▶ [E, O, n]."""
    places = [(linear.part, values) for linear, values in parts]
    experts = 1 + max(part.expert for part, _ in places if part is not None)
    outputs = sum(len(values) for part, values in places if part is not None and part.expert == 0)
    stacked = torch.empty((experts, outputs, parts[0][1].shape[1]), dtype=parts[0][1].dtype, device=parts[0][1].device)
    for part, values in places:
        assert part is not None
        stacked[part.expert, part.rows] = values
    return stacked


@dataclass(frozen=True)
class RunnerResult:
    """The changed tensors, in a file per block; ``details`` has a row per block."""

    folder: Path
    checkpoint: Checkpoint
    blocks: list[int]
    details: list[BlockDetails]

    def reader(self) -> Callable[[str], Value]:
        """A function from a tensor's name to its value: the changed one where there is one, else the checkpoint's."""
        from safetensors import safe_open

        where: dict[str, Path] = {}
        for index in self.blocks:
            path = block_file(self.folder, index)
            if path.exists():
                with safe_open(path, framework="pt") as file:
                    where |= dict.fromkeys(file.keys(), path)

        def read(name: str) -> Value:
            if name not in where:
                return self.checkpoint.tensor(name)
            with safe_open(where[name], framework="pt") as file:
                data = file.get_tensor(name)
                keep = f"{name}:keep"
                mask = unpack_bits(file.get_tensor(keep), tuple(data.shape)) if keep in where else None
                parts = {k: file.get_tensor(f"{name}:{k}") for k in _CODES if f"{name}:{k}" in where}
            return Value(data, mask, Codes(**parts) if parts else None)

        return read

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor's factors, [O, r] and [r, I]."""
        from safetensors import safe_open

        for index in self.blocks:
            if (path := block_file(self.folder, index)).exists():
                with safe_open(path, framework="pt") as file:
                    if f"{name}:up" in file.keys():  # noqa: SIM118
                        return file.get_tensor(f"{name}:up"), file.get_tensor(f"{name}:down")
        raise KeyError(name)


def block_file(folder: Path, index: int) -> Path:
    """The file of a block's changed tensors."""
    return Workspace(folder).tensors(_BLOCK.format(index))


def write_block(
    workspace: Workspace,
    checkpoint: Checkpoint,
    streamed: StreamedModel,
    index: int,
    module: Any,
    extras: Mapping[str, TensorExtras],
) -> None:
    """Round a block's weights to the checkpoint's dtypes, in the module too, and write the tensors that changed.

    Args:
        workspace: of the blocks' files. extras: by tensor.
    """
    result: dict[str, torch.Tensor] = {}
    for key, parameter in module.named_parameters():
        names = streamed.stored_names(index, {key: parameter.data})
        stored = {n: value for n, value in names.items() if _is_stored(checkpoint, n) and _fits(checkpoint, n, value)}
        if not stored:
            continue
        for name, value in stored.items():
            result |= _changed_parts(name, value, checkpoint.tensor(name), extras.get(name, TensorExtras()))
        dtype = torch_dtype(widest([checkpoint.spec.tensors[name].dtype for name in stored]))
        parameter.data.copy_(parameter.data.to(dtype))
    workspace.save_tensors(_BLOCK.format(index), result)


def parts_of_tensors(checkpoint: Checkpoint, streamed: StreamedModel, index: int, module: Any) -> set[int]:
    """Ids of a block's parameters that the files hold as parts of a tensor, or otherwise, so that they cannot be written."""
    parts = set()
    for key, parameter in module.named_parameters():
        stored = streamed.stored_names(index, {key: parameter.data})
        if not all(_is_stored(checkpoint, n) and _fits(checkpoint, n, value) for n, value in stored.items()):
            parts.add(id(parameter))
    return parts


def _fits(checkpoint: Checkpoint, name: str, value: torch.Tensor) -> bool:
    return tuple(value.shape) == checkpoint.spec.tensors[name].shape


def _changed_parts(name: str, value: torch.Tensor, before: Value, extras: TensorExtras) -> dict[str, torch.Tensor]:
    """A changed tensor's parts in a block's file, by key; none where it is unchanged."""
    parts: dict[str, torch.Tensor] = {}
    mask = before.mask if extras.mask is None else extras.mask
    if extras.codes is not None:
        fields = {k: getattr(extras.codes, k) for k in _CODES}
        parts |= {f"{name}:{k}": v.cpu().contiguous() for k, v in fields.items() if v is not None}
    if extras.factors is not None:
        up, down = (factor.to("cpu", before.data.dtype).contiguous() for factor in extras.factors)
        return parts | {f"{name}:up": up, f"{name}:down": down}
    data = value.to("cpu", before.data.dtype)
    if mask is not None:
        mask = mask.to("cpu")
        data = canonical(data, mask) if extras.codes is None else data
        parts[f"{name}:keep"] = pack_bits(mask)
    if mask is not None or not torch.equal(data, before.data):
        parts[name] = data.contiguous().clone()
    return parts


def _is_stored(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the checkpoint stores a tensor of that name, and not as an alias."""
    tensor = checkpoint.spec.tensors.get(name)
    return tensor is not None and tensor.alias_of is None
