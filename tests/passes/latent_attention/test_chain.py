"""Latent attention in a run: report, passes after it, and a second stock class."""

from __future__ import annotations

import pytest

import compress
from compress.checkpoint.open import open_checkpoint
from compress.formatting import ratio
from compress.report.details import render_details
from tests import pico


@pytest.mark.slow
def test_distill_and_cast_follow_latent_attention(texts, tmp_path):
    """Training leaves the constant channel alone, and the teacher is the original."""
    training = {"steps": 6, "batch_size": 4, "validation_samples": 4, "learning_rate": 1e-3, "allow_noop": True}
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
            {"latent_attention": {"max_cache": "60%", "target": "deepseek_v3", "tune_epochs": 1}},
            {"distill": training},
            {"cast": {"weights": "int8", "method": "rtn"}},
        ],
        "evaluate": ["kl"],
    }
    result = compress.run(recipe)
    latent, training_row, _ = (p for stage in result.report["stages"] for p in stage["passes"])
    held = [row["loss"] for row in training_row["details"]["training"]["held_out"]]
    assert min(held) < held[0]
    text = "\n".join(render_details(latent, ""))
    choice = latent["details"]["latent"]
    assert f"a block caches {choice['cached']} numbers per token, 32 before" in text
    assert choice["decode"]["ratio"] > 0
    assert f"a block takes {ratio(choice['decode']['ratio'])} of the original's time" in text
    assert f"| {choice['keys']} | {choice['values']} | " in text
    stored = open_checkpoint(tmp_path / "out")
    assert stored.spec.structure.class_name == "DeepseekV3ForCausalLM"
    norm = stored.tensor("model.layers.2.self_attn.kv_a_layernorm.weight").data
    assert norm[-1] == 0
    assert (norm[:-1] > 0).all()
