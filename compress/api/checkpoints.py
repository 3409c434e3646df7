"""Functions that open a checkpoint: load, unpack, inspect, diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress.api.documents import Differences, Inspection
from compress.api.guarded import guarded
from compress.api.sizes import bytes_of
from compress.files import expanded, place
from compress.progress import Progress
from compress.progress.display import chosen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@guarded
def load(
    model: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    quantized_activations: bool = True,
    quantized_kv_cache: bool = False,
    attention: Literal["auto", "compress_local", "sdpa", "eager"] | None = "auto",
) -> PreTrainedModel:
    """Load a checkpoint of this project, or any stock one, as a transformers model in evaluation mode.

    This package reads compact checkpoints itself; it never runs the file bundled in the folder.

    Args:
        trust_remote_code: allow code in the checkpoint. ignore_auto_map: use transformers' own class instead.
        allow_links: follow links that lead out of the folder.
        quantized_activations: round the inputs of linear layers if the config has it so, as stock transformers does.
        quantized_kv_cache: round keys and values if the config has it so, as vLLM does and stock transformers does not;
            evaluation rounds them.
        attention: ``compress_local`` computes windows and logits of sinks without masks of all pairs. ``auto`` takes it for
            models with windows, None leaves the choice to transformers.
    """
    from compress.checkpoint.sidecars import with_links
    from compress.models.loading import load_model

    return load_model(
        with_links(model, allow_links),
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        ignore_auto_map=ignore_auto_map,
        quantized_activations=quantized_activations,
        quantized_kv_cache=quantized_kv_cache,
        attention=attention,
    )


def register_attention() -> None:
    """Make ``compress_local`` known to transformers, so that ``from_pretrained`` takes it as ``attn_implementation``."""
    from compress.checkpoint.attention.interface import register

    register()


@guarded
def unpack(
    model: str | Path,
    output: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    progress: Progress | bool | None = None,
) -> Path:
    """Write the dense stock twin of a compact or quantised checkpoint to ``output``, which must not exist."""
    from compress.checkpoint.edits.twin import dense
    from compress.checkpoint.open import open_checkpoint
    from compress.checkpoint.sidecars import safe_file, with_links
    from compress.checkpoint.write import write_checkpoint
    from compress.pipeline.publish import check_absent

    output = place(output)
    model = with_links(model, allow_links)
    local = expanded(model)
    check_absent(output, local if local.exists() else None)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code, ignore_auto_map=ignore_auto_map)
    assert checkpoint.folder is not None
    readme = safe_file(checkpoint.folder, "README.md")
    files = {"README.md": readme.read_bytes()} if readme.is_file() else {}

    with chosen(progress) as shown:
        write_checkpoint(
            dense(checkpoint),
            output,
            store="stock",
            max_shard=bytes_of(max_shard_size),
            extra_files=files,
            progress=shown,
        )
    return output


@guarded
def inspect(
    model: str | Path,
    *,
    zeros: bool = False,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
    offline: bool = False,
) -> Inspection:
    """Facts about a checkpoint, from its headers.

    Args:
        model: a folder, or a hub id. zeros: also read the weights and count zeros.

    Returns:
        A dictionary, schema ``compress.inspect/1``: ``size`` (bytes, parameters, bits_per_weight, …), ``modules`` and
        ``tensors`` (a dictionary each: name, shape, dtype, storage, bytes, sparsity, tied_to).

    Raises:
        CheckpointError: it cannot be opened.
    """
    from compress.checkpoint.sidecars import with_links
    from compress.inspection import inspect as inspect_checkpoint

    code = {"trust_remote_code": trust_remote_code, "ignore_auto_map": ignore_auto_map}
    return Inspection(inspect_checkpoint(with_links(model, allow_links), zeros=zeros, **code, offline=offline))


@guarded
def diff(
    a: str | Path,
    b: str | Path,
    *,
    values: bool = True,
    trust_remote_code: bool = False,
    ignore_auto_map: bool = False,
    allow_links: bool = False,
) -> Differences:
    """Differences from checkpoint ``a`` to ``b``, also where blocks were removed or added and the others renumbered.

    Args:
        a, b: folders, or hub ids. values: compare weights too; False compares headers.

    Returns:
        A dictionary, schema ``compress.diff/1``: ``same`` (bool), ``config`` (key ▶ [before, after]), ``blocks`` and
        ``tensors`` (a dictionary each: name, change, shape, dtype, bytes, max_difference, relative_difference, …).

    Raises:
        CheckpointError: one cannot be opened.
    """
    from compress.checkpoint.sidecars import with_links
    from compress.inspection import diff as diff_checkpoints

    code = {"trust_remote_code": trust_remote_code, "ignore_auto_map": ignore_auto_map}
    return Differences(diff_checkpoints(with_links(a, allow_links), with_links(b, allow_links), values=values, **code))
