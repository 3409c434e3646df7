"""Requirements of a checkpoint on runtimes: packages, and rounding of inputs, keys and values. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from compress.architectures.model_map import model_map
from compress.checkpoint.runtimes import runtimes_note
from compress.checkpoint.storage.compressed_tensors.loaders import stock_holds
from compress.checkpoint.storage.compressed_tensors.servers import servers_note
from compress.spec.formats import FIXED_GROUPS
from compress.spec.spec import Spec, Tensor

#: Command that installs the package by which transformers loads codes, in the version that it requires.
INSTALL = 'pip install "compressed-tensors>=0.15"'


def input_formats(spec: Spec) -> dict[str, str]:
    """Quantised module ▶ format of `ACTIVATIONS` that stock transformers rounds its inputs to.

    Empty for a compact checkpoint: its loader decodes codes to floats and rounds no inputs. Without experts, which transformers
    fuses and whose inputs it does not round.
    """
    is_expert = model_map(spec).is_expert
    return {t.module: format_ for t, format_ in _with_inputs(spec) if not is_expert(t.name)}


def _with_inputs(spec: Spec) -> list[tuple[Tensor, str]]:
    if spec.structure.compact:
        return []
    formats = ((t, t.quant_format and t.quant_format.activations) for t in spec.stored())
    return [(tensor, format_) for tensor, format_ in formats if format_]


def expert_note(spec: Spec) -> str | None:
    """A sentence where servers round the inputs of experts and transformers, as metrics, does not; None elsewhere."""
    is_expert = model_map(spec).is_expert
    if not any(is_expert(tensor.name) for tensor, _ in _with_inputs(spec)):
        return None
    return "servers round the inputs of experts; stock transformers and reported metrics do not"


def runtime_note(spec: Spec) -> str | None:
    """A sentence where stock transformers does not load the codes; None elsewhere."""
    if spec.structure.compact or spec.structure.runtime == "transformers":
        return None
    holds = stock_holds(replace(spec, structure=replace(spec.structure, runtime="transformers")))
    name = next((t.name for t in spec.stored() if not holds(t)), None)
    return name and (
        f"stock transformers does not load it, such as the codes of {name}; vLLM does, and `compress unpack` makes it dense"
    )


def codes(spec: Spec) -> set[str]:
    """Formats of the codes that a stock loader has to decode; none for a compact checkpoint, which decodes them itself."""
    if spec.structure.compact:
        return set()
    return {t.quant_format.format for t in spec.stored() if t.quant_format is not None}


def narrow_codes(spec: Spec) -> list[str]:
    """Formats with which transformers computes in bfloat16 alone, so that it is loaded with ``dtype="auto"``."""
    return sorted(codes(spec) & set(FIXED_GROUPS))


def loading_notes(spec: Spec) -> list[str]:
    """Notes on what stock transformers needs to load the checkpoint, beside torch."""
    opens = (runtimes_note(spec) or "").split("; ")
    if spec.structure.compact:
        return [*filter(None, opens), "its own modelling file decodes it: load it with trust_remote_code=True"]
    every = (runtime_note(spec), expert_note(spec), *(part or None for part in opens), servers_note(spec))
    notes = [note for note in every if note is not None]
    if spec.structure.runtime != "transformers":
        return notes
    notes += [f"transformers needs a package to load its codes: {INSTALL}"] if codes(spec) else []
    if narrow := narrow_codes(spec):
        notes.append(f'transformers computes with {" and ".join(narrow)} in bfloat16 alone: load it with dtype="auto"')
    return notes


def cache_format(spec: Spec) -> str | None:
    """Format of the KV cache; None for the dtype of the computation."""
    return spec.structure.cache_format


#: KV-cache format ▶ its name in reports.
_CACHES = {
    "fp8": "fp8 (scale 1)",
    "fp8-tensor": "fp8 (static scales, one per layer)",
    "fp8-head": "fp8 (static scales, one per head)",
}


def emulated(spec: Spec, *, kv_cache: bool) -> dict[str, Any] | None:
    """Rounding that an evaluation emulates, as JSON values: ``activations`` (format ▶ number of layers) and ``kv_cache``.

    None if nothing is rounded.

    Args:
        kv_cache: whether the evaluation rounds keys and values.
    """
    inputs = dict(sorted(Counter(input_formats(spec).values()).items()))
    cache = cache_format(spec) if kv_cache else None
    return {"activations": inputs, "kv_cache": cache and _CACHES[cache]} if inputs or cache else None
