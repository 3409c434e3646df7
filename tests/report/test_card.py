from __future__ import annotations

import pytest

from compress import report as reports
from compress.report.card import _demoted, _split

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
