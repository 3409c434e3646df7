from __future__ import annotations

import pytest

import compress
from compress import report as reports
from compress.report.card import _demoted, _split


@pytest.fixture(scope="module")
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
                "evaluation": {"files": [str(valid)], "window": 32, "max_documents": 30},
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


CARD = """---
license: mit
language: [en, de]
tags: [text]
base_model: someone/earlier
---
# Tiny

```
# no heading
```
## Use
"""


def test_card_keeps_licence_and_names_base_recipe_and_results(finished):
    card = reports.model_card(
        finished.report,
        CARD,
        compact=True,
        base_model="org/tiny",
        recipe_yaml="model: org/tiny\n",
        class_name="LlamaForCausalLM",
    )
    front, body = _split(card)
    assert front == {
        "license": "mit", "language": ["en", "de"], "tags": ["text", "compressed"], "base_model": "org/tiny", "library_name": "transformers",
    }  # fmt: skip
    assert 'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)' in body
    assert "```yaml\nmodel: org/tiny\n```" in body
    assert "| bits per byte |" in body
    assert "prefill" not in body
    assert body.rstrip().endswith("### Tiny\n\n```\n# no heading\n```\n#### Use")
    assert finished.report["run_folder"] not in card


def test_card_is_made_when_model_has_none(finished):
    card = reports.model_card(
        finished.report, None, compact=False, base_model="tiny", recipe_yaml="", class_name="BertForMaskedLM"
    )
    assert "The base model's card" not in card
    assert "trust_remote_code" not in card
    assert "AutoModelForMaskedLM" in card


@pytest.mark.parametrize("text", ["---\n: [\n---\nbody", "---\n- a\n---\nbody", "no front\n---\n", "---\nnever closed"])
def test_card_takes_damaged_front_matter_as_text(text):
    assert _split(text) == ({}, text)


def test_card_takes_empty_front_matter():
    assert _split("---\n---\nbody") == ({}, "body")


def test_card_moves_headings_down_two_levels():
    assert _demoted("# a\n###### b\n#c\n~~~\n# d\n~~~") == "### a\n###### b\n#c\n~~~\n# d\n~~~"
