"""Experts that few tokens reach are named in reports and on the terminal."""

from __future__ import annotations

import pytest

import compress
from compress import report as reports
from compress.checkpoint.open import open_checkpoint
from compress.report.experts import cold_experts, expert_rows
from tests import pico

COLD = {"qwen3_moe": "mlp.experts.{}.gate_proj.weight", "mixtral": "block_sparse_moe.experts.{}.w1.weight"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cold")
    return {family: pico.save_cold(root / family, family) for family in COLD}


def run(model, texts, output, settings):
    train, valid = texts
    return compress.run(
        {
            "model": str(model),
            "output": str(output),
            "store": "compact",
            "document_separator": "<|doc|>",
            "data": {
                "calibration": {"files": [str(train)], "samples": 4, "length": 32},
                "evaluation": {"files": [str(valid)], "window": 32, "max_documents": 2},
            },
            "passes": [settings],
            "evaluate": ["kl"],
            "gates": {"size": {"max_ratio": 1.5}},
        }
    )


@pytest.mark.parametrize(
    ("family", "name", "settings", "cold"),
    [
        pytest.param("qwen3_moe", "cast", {"weights": "int4", "group_size": 32}, 16, marks=pytest.mark.slow),
        pytest.param(
            "mixtral",
            "cast",
            {"weights": "int8", "error_correction": [], "reconstruction_epochs": 1, "only": ["*layers.1.*experts*"]},
            4,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "mixtral", "share", {"codebook_bits": 4, "only": ["*layers.0.*experts*"]}, 4, marks=pytest.mark.slow
        ),
        pytest.param(
            "qwen3_moe",
            "prune_unstructured",
            {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
            16,
            marks=pytest.mark.slow,
        ),
        pytest.param("qwen3_moe", "prune_structured", {"mlp": "25%"}, 16, marks=pytest.mark.slow),
        ("qwen3_moe", "prune_structured", {"experts": 2, "compensation": "none"}, 16),
    ],
)
def test_cold_experts_are_named_in_the_report(family, name, settings, cold, folders, texts, tmp_path):
    result = run(folders[family], texts, tmp_path / "out", {name: settings})
    assert (result.verdict, result.exit_status, result.published) == ("passed", 0, True)
    details = result.report["stages"][0]["passes"][0]["details"]
    rows = expert_rows(details)
    assert [(row[1], row[2], row[4], row[5]) for row in rows] == [("4 of 8", "4, 5, 6, 7", "128", "768")] * (cold // 4)
    (line,) = cold_experts(result.report)
    assert line.startswith(f"{name}: no calibration token reached {cold} of {2 * cold} experts, so only their weights")
    assert line.endswith("128 tokens were read, and 768 would likely reach them")
    report = (tmp_path / "out.run/report.md").read_text()
    assert "| 1 | 4 of 8 | 4, 5, 6, 7 |" in report or "only" in settings
    assert "Experts that no calibration token reached" in report
    assert (tmp_path / "out.run/junit.xml").exists()
    assert reports.validate(result.report)
    for block in details.get("blocks", ()):  # every token went to two of the other four
        if "experts" in block:
            assert sum(block["experts"]["reached"].values()) == 2 * 128
            assert all(
                row.get("error") is None for row in block["tensors"].values() if "no token" in row.get("note", "")
            )
    assert open_checkpoint(result.checkpoint).spec.tensors


@pytest.mark.slow
def test_cold_experts_are_told_on_the_terminal(folders, texts, tmp_path, capsys):
    from compress.cli.tables import print_report

    settings = {
        "cast": {"weights": "int8", "method": "gptq", "only": ["*layers.2.*experts*"], "reconstruction_epochs": 0}
    }
    print_report(run(folders["qwen3_moe"], texts, tmp_path / "out", settings).report)
    said = " ".join(capsys.readouterr().out.split())
    assert "cast: no calibration token reached 4 of 8 experts, so only their weights were used; 128 tokens were" in said
