from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def recipe(tmp_path: Path, pico_llama: Path, texts: tuple[Path, Path]) -> Callable[..., dict[str, Any]]:
    """A recipe as a mapping, with a few keys changed."""
    train, valid = texts

    def make(**changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {
            "model": str(pico_llama),
            "output": str(tmp_path / "out"),
            "store": "compact",
            "document_separator": "<|doc|>",
            "data": {
                "calibration": {"files": [str(train)], "samples": 4, "length": 32},
                "evaluation": {"files": [str(valid)], "window": 32, "max_documents": 8},
            },
            "passes": [
                {"prune_structured": {"layers": 1, "compensation": "none"}},
                {"prune_unstructured": {"method": "magnitude", "sparsity": "60%"}},
                {"cast": {"weights": "bf16"}},
            ],
            "evaluate": ["bits_per_byte", "kl"],
            "gates": {"size": {"max_ratio": 0.6}},
        }
        return {k: v for k, v in {**base, **changes}.items() if v is not None}

    return make


@pytest.fixture
def small(recipe: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A recipe of one pass without measurements."""

    def make(**changes: Any) -> dict[str, Any]:
        plain = {"passes": [{"cast": {"weights": "bf16"}}], "evaluate": [], "gates": None, "data": None, "store": None}
        return recipe(**{**plain, **changes})

    return make
