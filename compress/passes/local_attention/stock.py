"""Windows in a stock class: the spec, and the checkpoint that is read by it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.architectures.conversions.windows import SOURCES, current_windows, target_of, windowed
from compress.architectures.model_map import model_map
from compress.checkpoint.files import read_json
from compress.checkpoint.sidecars import safe_file
from compress.errors import PassError
from compress.passes.local_attention.choose import Windows
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.spec.spec import Spec

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Checkpoint


#: Fewest tokens of a prompt that stock transformers reads at a time.
CHUNK = 512


def planned(spec: Spec, settings: LocalAttentionSettings, chosen: Windows) -> tuple[Spec, dict[str, float]]:
    """The spec with those windows, and the tensors that it has more ▶ the value that fills them.

    Raises:
        PassError: no stock class can express it, or nothing would change.
    """
    target = target_of(spec, sinks=settings.sinks == "learned", named=settings.target)
    if all(window is None for window in chosen.windows):
        raise PassError("every block would stay full", key="full", fix="set a smaller `full`")
    if chosen.windows == current_windows(spec) and target is None and not settings.allow_noop:
        raise PassError("the model has these windows already", key="window", fix="leave the pass out")
    return windowed(spec, chosen.windows, target, values=settings.sinks == "learned")


def with_windows(checkpoint: Checkpoint, settings: LocalAttentionSettings, chosen: Windows) -> Checkpoint:
    """The checkpoint in a stock class with those windows and sinks, lazily. Other weights stay as they are.

    A sink of value c is Σ p (v - c) + c, summed over the tokens that are seen: biases of the value and output projections.
    """
    import torch

    from compress.checkpoint.values import Derived, Value, torch_dtype
    from compress.passes.tokenizers import with_tokenizer_class

    before = checkpoint.spec.structure.model_type
    spec, added = planned(checkpoint.spec, settings, chosen)
    paths = model_map(spec).paths
    logits = {f"{paths[i]}self_attn.sinks": values for i, values in chosen.sinks.items()}

    shifts: dict[str, Callable[[], torch.Tensor]] = {}
    for i, values in chosen.values.items():
        path, heads = f"{paths[i]}self_attn.", len(chosen.sinks[i]) // len(values)
        shifts[_bias(spec, f"{path}v_proj")] = (-values.flatten()).clone
        shifts[_bias(spec, f"{path}o_proj")] = partial(
            _projected, checkpoint, f"{path}o_proj", values.repeat_interleave(heads, 0).flatten()
        )

    def read(name: str) -> Value:
        dtype = torch_dtype(spec.tensors[name].dtype)
        if name in shifts:
            before = checkpoint.tensor(name).data.float() if name in checkpoint.spec.tensors else 0.0
            return Value((before + shifts[name]()).to(dtype))
        if name in logits:
            return Value(logits[name].to(dtype))
        if name in added:
            return Value(torch.full(spec.tensors[name].shape, added[name], dtype=dtype))
        return checkpoint.tensor(name)

    result = Derived(checkpoint, spec, read)
    if spec.structure.model_type != before:
        result.rewritten = {**result.rewritten, **with_tokenizer_class(checkpoint, SOURCES[before].tokenizer_class)}
    result.rewritten = {**result.rewritten, **_generation(result)}
    return result


def _bias(spec: Spec, path: str) -> str:
    """Name of a projection's bias; of two factors the second one has it."""
    return f"{path}.up.bias" if f"{path}.up.weight" in spec.tensors else f"{path}.bias"


def _projected(checkpoint: Checkpoint, path: str, vector: torch.Tensor) -> torch.Tensor:
    """A vector times a projection's weight, or its two factors in turn, float32."""
    names = [f"{path}.down.weight", f"{path}.up.weight"] if f"{path}.up.weight" in checkpoint.spec.tensors else []
    for name in names or [f"{path}.weight"]:
        vector = checkpoint.tensor(name).data.float() @ vector
    return vector


def chunk_size(config: Mapping[str, Any]) -> int | None:
    """Tokens of a prompt that stock transformers should read at a time; None where a prompt is no longer than that.

    Each chunk attends to itself and to the window's cache before it, which is Transformer-XL's recurrence over segments (arXiv
    1901.02860) with a first-in-first-out memory. The mask of a chunk is small; that of a prompt has its length squared.
    """
    size, positions = max(CHUNK, int(config["sliding_window"])), config.get("max_position_embeddings")
    return None if isinstance(positions, int) and positions <= size else size


def _generation(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The generation config with ``prefill_chunk_size``; nothing where prompts are short, or where it names one already."""
    config, name = checkpoint.spec.structure.config, "generation_config.json"
    size, folder = chunk_size(config), checkpoint.folder
    if size is None or not (checkpoint.spec.structure.class_name or "").endswith("ForCausalLM"):
        return {}
    if folder is not None and safe_file(folder, name).exists():
        given = read_json(folder, name)
    else:  # the fields that stock transformers would take from the model's config
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        given = {"_from_model_config": True, **{key: config[key] for key in keys if config.get(key) is not None}}
    if given.get("prefill_chunk_size") is not None:
        return {}
    return {name: (json.dumps({**given, "prefill_chunk_size": size}, indent=2, sort_keys=True) + "\n").encode()}
