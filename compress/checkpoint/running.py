"""What a checkpoint asks of runtimes: packages, and what is rounded on the way: inputs, keys and values. No torch here."""

from __future__ import annotations

from collections import Counter
from typing import Any

from compress.spec.formats import FIXED_GROUPS
from compress.spec.spec import Spec

#: Installs what transformers loads codes by, of the version that it asks for.
INSTALL = 'pip install "compressed-tensors>=0.15"'


def input_formats(spec: Spec) -> dict[str, str]:
    """Module with codes ▶ the format that its inputs are cast to, of `quant_formats.ACTIVATIONS`.

    None of a compact checkpoint: its modelling file makes floats of the codes and rounds nothing.
    """
    if spec.structure.compact:
        return {}
    formats = {t.module: t.quant_format.activations for t in spec.stored() if t.quant_format is not None}
    return {module: format_ for module, format_ in formats.items() if format_ is not None}


def loading_notes(spec: Spec) -> list[str]:
    """What loading the checkpoint by stock transformers asks for beside torch and transformers."""
    if spec.structure.compact:  # the bundled file decodes all
        return []
    formats = {t.quant_format.format for t in spec.stored() if t.quant_format is not None}
    notes = []
    if formats:
        notes.append(f"transformers loads its codes by a package of their own: {INSTALL}")
    if narrow := sorted(formats & set(FIXED_GROUPS)):
        notes.append(f'transformers computes with {" and ".join(narrow)} in bfloat16 alone: load it with dtype="auto"')
    return notes


def cache_format(spec: Spec) -> str | None:
    """The format of cached keys and values; None for that of the computation."""
    return None if spec.structure.compact else spec.structure.kv_cache


#: Formats of caches ▶ what figures say of them.
_CACHES = {
    "fp8": "fp8 (scale 1)",
    "fp8-tensor": "fp8 (static scales, one per layer)",
    "fp8-head": "fp8 (static scales, one per head)",
}


def emulated(spec: Spec, *, kv_cache: bool) -> dict[str, Any] | None:
    """What an evaluation rounds as runtimes do, JSON values: ``activations`` (format ▶ number of layers), ``kv_cache``.

    None where there is nothing. ``kv_cache``: whether the evaluation rounds keys and values.
    """
    inputs = dict(sorted(Counter(input_formats(spec).values()).items()))
    cache = cache_format(spec) if kv_cache else None
    return {"activations": inputs, "kv_cache": cache and _CACHES[cache]} if inputs or cache else None
