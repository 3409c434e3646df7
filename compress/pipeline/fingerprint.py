"""Fingerprints of stages and inputs: equal fingerprints mean equal results."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from compress.checkpoint.open import Stored
from compress.checkpoint.sidecars import safe_file
from compress.files import read_record, sha256, stamp, write_record

_INPUTS = "compress.inputs/2"


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    from importlib import metadata

    from compress import __version__

    known = {"compress": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors"):
        known[package] = metadata.version(package)
    return known


def fingerprint(data: Any) -> str:
    """SHA-256 of JSON values, hexadecimal."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def hash_input(checkpoint: Stored, cache_file: Path) -> str:
    """SHA-256 over the contents of config, weights and sidecars.

    Hashes of unchanged files (inode, size, both times of change) are taken from ``cache_file``.
    """
    from concurrent.futures import ThreadPoolExecutor

    folder = checkpoint.folder
    assert folder is not None
    known = read_record(cache_file, _INPUTS) or {}
    names = sorted({"config.json", *checkpoint.files, *checkpoint.sidecars})

    def one(name: str) -> tuple[str, str, list[int]]:
        path = safe_file(folder, name)
        now = stamp(path.stat())
        row = known.get(str(path.resolve()))
        return name, row["sha256"] if row and row["stamp"] == now else sha256(path), now

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(one, names))
    table = {str(safe_file(folder, name).resolve()): {"stamp": now, "sha256": sha} for name, sha, now in rows}
    if table != known:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_record(cache_file, _INPUTS, table)
    return fingerprint([(name, sha) for name, sha, _ in rows])


def stage_fingerprint(
    before: str,
    passes: Sequence[tuple[str, Mapping[str, Any]]],
    data: Mapping[str, str],
    environment: Mapping[str, Any],
) -> str:
    """Fingerprint of a stage: its input, its passes with every setting, the data they read, and seed, store, versions."""
    return fingerprint([before, [[name, dict(settings)] for name, settings in passes], dict(data), dict(environment)])
