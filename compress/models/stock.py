"""The check that stock transformers loads a written checkpoint of codes correctly.

Stock loaders match the names in a ``quantization_config`` against modules in memory. Where one does not fit, they fill in
random weights, with a warning at most. So a written checkpoint is checked twice: by the names in this package's records, and
by the stock loader itself where compressed-tensors is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from typing import Any

from compress.architectures.model_map import model_map
from compress.checkpoint.files import read_json
from compress.checkpoint.open import Stored
from compress.checkpoint.storage import parts
from compress.checkpoint.storage.compressed_tensors import write as compressed_tensors
from compress.checkpoint.storage.compressed_tensors.parse import SchemeGroups
from compress.checkpoint.store import needs_code
from compress.checkpoint.values import Checkpoint, torch_dtype
from compress.errors import CheckpointError
from compress.models.classes import quiet_transformers, stock_class

#: The package that stock transformers reads codes with.
PACKAGE = "compressed_tensors"


def check_codes(checkpoint: Stored) -> None:
    """Check that the config names exactly the modules that are codes, and that stock transformers finds every key.

    Everything is on the meta device. One of several processes, and one with codes for vLLM, checks only the names. Raises
    `CheckpointError`.
    """
    import torch.distributed as dist

    if checkpoint.folder is None or needs_code(checkpoint.spec):
        return
    if not any(tensor.quant_format is not None for tensor in checkpoint.spec.stored()):
        return
    check_names(checkpoint, read_json(checkpoint.folder, "config.json")[compressed_tensors.KEY])
    # among several processes compressed-tensors would wait for all to load, and only the first one does
    alone = not (dist.is_available() and dist.is_initialized())
    if alone and checkpoint.spec.structure.runtime == "transformers" and importlib.util.find_spec(PACKAGE) is not None:
        check_load(checkpoint)


def check_names(checkpoint: Checkpoint, config_of_codes: Any) -> None:
    """Check that a quantization config covers exactly the layers that are codes, by their names in memory.

    Raises:
        CheckpointError: naming a layer that differs.
    """
    import torch

    spec, where = checkpoint.spec, str(checkpoint.folder)
    stock, config = stock_class(checkpoint)
    with quiet_transformers(), torch.device("meta"):
        model = stock(config) if hasattr(stock, "get_init_context") else stock.from_config(config)
    kinds = {"Linear": torch.nn.Linear, "Embedding": torch.nn.Embedding}
    layers = {
        name: kind for name, module in model.named_modules() for kind, base in kinds.items() if isinstance(module, base)
    }
    groups = SchemeGroups(config_of_codes, where)
    meant = {name for name, kind in layers.items() if groups.scheme(name, kind) is not None}
    mapped = model_map(spec)
    coded = {mapped.in_memory(t.module) for t in spec.stored() if t.quant_format and not mapped.is_expert(t.name)}
    for names, wrong in (
        (coded - layers.keys(), "no linear layer or table has that name in memory"),
        (coded - meant, "no group of the config names it"),
        (meant - coded, "the config says that it is codes, and it is not"),
    ):
        if names:
            raise CheckpointError(f"stock transformers could not load {min(names)}: {wrong}", where=where, fix=_FIX)


def check_load(checkpoint: Stored) -> None:
    """Check that stock transformers finds every array of the folder, by name and shape, and misses none.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape.
    """
    import torch

    stock, config = stock_class(checkpoint)
    arrays = [part for tensor in checkpoint.spec.stored() for part in parts(tensor)]
    state = {a.key: torch.empty(a.shape, dtype=torch_dtype(a.dtype), device="meta") for a in arrays}
    noise = io.StringIO()  # compressed-tensors shows progress bars
    try:
        with quiet_transformers(), contextlib.redirect_stderr(noise):
            _, info = stock.from_pretrained(
                None,
                config=type(config).from_pretrained(checkpoint.folder, local_files_only=True),
                state_dict=state,
                dtype="auto",
                device_map={"": "meta"},
                output_loading_info=True,
            )
    except Exception as error:  # whatever fails here would fail for users of the checkpoint
        raise CheckpointError(
            f"stock transformers cannot load it: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}",
            where=str(checkpoint.folder),
            fix=_FIX,
        ) from error
    # servers read the scales of a cache; transformers 5.24 does not, and reports their keys as unexpected
    weights = {tensor.name for tensor in checkpoint.spec.weights()}
    scales = {tensor.name for tensor in checkpoint.spec.stored()} - weights
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted({str(key[0] if isinstance(key, tuple) else key) for key in info[kind]} - scales)
        if keys:
            raise CheckpointError(
                f"stock transformers finds {len(keys)} keys {kind.removesuffix('_keys')}, such as {keys[0]}",
                where=str(checkpoint.folder),
                fix=_FIX,
            )


_FIX = "use `store: compact`, and report this: the record of the family lacks a name"
