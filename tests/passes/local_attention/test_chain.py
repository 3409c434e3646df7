"""Passes after windows: the result is a stock model of another family, and its teacher is the original."""

from __future__ import annotations

import pytest

import compress
from compress.models.loading import load_model
from compress.report.details import render_details
from tests import pico


@pytest.mark.slow
def test_distill_and_cast_follow_a_conversion(texts, tmp_path):
    recipe = {
        "model": str(pico.folder()),
        "output": str(tmp_path / "out"),
        "document_separator": "<|doc|>",
        "data": {
            "calibration": {"files": [str(texts[0])], "samples": 8, "length": 32},
            "training": {"files": [str(texts[0])], "length": 32},
            "evaluation": {"files": [str(texts[1])], "window": 32, "max_documents": 2},
        },
        "passes": [
            {"local_attention": {"window": 8, "full": "50%", "choose": "every"}},
            {
                "distill": {
                    "steps": 6,
                    "batch_size": 4,
                    "validation_samples": 4,
                    "learning_rate": 3e-4,
                    "allow_noop": True,
                }
            },
            {"cast": {"weights": "int8", "method": "rtn"}},
        ],
        "evaluate": ["kl"],
    }
    result = compress.run(recipe)
    windows, training, _ = (p["details"] for stage in result.report["stages"] for p in stage["passes"])
    assert [row["window"] for row in windows["windows"]] == [None, 8, None, 8]
    assert sum(row["share"] for row in windows["windows"]) == pytest.approx(1)
    held = [row["loss"] for row in training["training"]["held_out"]]
    assert min(held) < held[0]
    text = "\n".join(render_details(result.report["stages"][0]["passes"][0], ""))
    assert "| block | window | loss | share |" in text
    assert "| 1 | 8 | 0." in text


@pytest.mark.slow
def test_biases_of_a_target_go_where_factors_have_theirs(data, tmp_path):
    """Of two factors the second one has the bias, which Qwen2 asks for and Llama lacks."""
    settings = {"rank": 4, "allocation": "uniform", "reconstruction_epochs": 0}
    thin = compress.apply("factorize", pico.folder(), tmp_path / "thin", data=data.ids, store="compact", **settings)
    asked = {"window": 12, "full": [0], "sinks": 0, "target": "qwen2"}
    out = compress.apply("local_attention", thin, tmp_path / "out", store="compact", **asked)
    assert pico.logits(load_model(out)).equal(pico.logits(load_model(thin)))
