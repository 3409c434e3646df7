from __future__ import annotations

import pytest

import compress


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pico_llama, texts):
    """A run of three passes, fused into one stage."""
    train, valid = texts
    folder = tmp_path_factory.mktemp("report")
    return compress.run(
        {
            "model": str(pico_llama),
            "output": str(folder / "out"),
            "store": "compact",
            "evaluate_at": "end",
            "document_separator": "<|doc|>",
            "data": {
                "calibration": {"files": [str(train)], "samples": 4, "length": 32},
                "evaluation": {"files": [str(valid)], "window": 32, "max_documents": 8},
            },
            "passes": [
                {"prune_structured": {"layers": 1, "compensation": "none"}},
                {"prune_unstructured": {"method": "magnitude", "pattern": "2:4"}},
                {"cast": {"weights": "bf16"}},
            ],
            "evaluate": ["bits_per_byte", "perplexity", "kl", "agreement"],
            "gates": {"size": {"max_ratio": 0.6}, "bits_per_byte": {"max_increase": "0.001%"}},
        }
    )
