from __future__ import annotations

from pathlib import Path

import pytest

from compress import report as reports
from compress.recipe import load_recipe, recipe_from_mapping, resolved, to_yaml
from compress.report import Base, Loading, figures
from compress.report.card import _demoted, _split

ROOT = Path(__file__).resolve().parents[2]
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


def card(report, original=None, **changes):
    given = {
        "base": Base("org/tiny", True, "main"),
        "loading": Loading("LlamaForCausalLM"),
        "recipe_yaml": "model: org/tiny\n",
    }
    return reports.model_card(report, original, **{**given, **changes})


def test_card_keeps_licence_and_names_base_recipe_and_results(finished):
    text = card(finished.report, CARD, loading=Loading("LlamaForCausalLM", compact=True), picture="compression.svg")
    front, body = _split(text)
    index = front.pop("model-index")
    assert front == {
        "license": "mit", "language": ["en", "de"], "tags": ["text", "compressed"], "base_model": "org/tiny",
        "base_model_relation": "finetune", "library_name": "transformers",
    }  # fmt: skip
    assert 'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)' in body
    assert "[org/tiny](https://huggingface.co/org/tiny) at revision `main`, made smaller by" in body
    assert "```yaml\nmodel: org/tiny\n```" in body
    assert "| bits per byte |" in body
    assert "prefill" not in body
    assert "](compression.svg)" in body
    assert "vllm" not in body
    assert body.rstrip().endswith("### Tiny\n\n```\n# no heading\n```\n#### Use")
    assert finished.report["run_folder"] not in text
    assert index[0]["name"] == "out"


def test_model_index_is_read_by_the_hub_and_has_the_measured_figures(finished):
    from huggingface_hub.repocard_data import model_index_to_eval_results

    foreign = "---\nlicense: mit\nmodel-index: [{name: theirs, results: []}]\n---\n"
    index = _split(card(finished.report, foreign))[0]["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "out"
    measured = {row.metric_type: row.metric_value for row in results}
    evaluation = finished.report["result"]["evaluation"]
    assert measured.keys() == {"bits_per_byte", "perplexity", "kl", "agreement"}
    assert measured["bits_per_byte"] == round(evaluation["bits_per_byte"], 4)
    assert {row.task_type for row in results} == {"text-generation"}
    unmeasured = {**finished.report, "result": {**finished.report["result"], "evaluation": None}}
    assert "model-index" not in _split(card(unmeasured, foreign))[0]


@pytest.mark.parametrize(
    ("base", "front", "expected"),
    [
        (Base("org/tiny", True), "base_model: a/b", ("org/tiny", "quantized")),
        (Base("tiny", False), "license: mit", (None, None)),
        (Base("tiny", False, ancestor="c/d"), "license: mit", ("c/d", None)),
        (Base("tiny", False, ancestor="c/d"), "base_model: a/b\nbase_model_relation: merge", ("a/b", "merge")),
    ],
)
def test_card_names_the_base_model_where_its_id_is_known(finished, base, front, expected):
    loading = Loading("LlamaForCausalLM", quantized=True)
    found, _ = _split(card(finished.report, f"---\n{front}\n---\n", base=base, loading=loading))
    assert (found.get("base_model"), found.get("base_model_relation")) == expected


def test_card_says_what_to_install_and_serve(finished):
    loading = Loading("LlamaForCausalLM", packages=("compressed-tensors>=0.15",), dtype_auto=True)
    text = card(finished.report, loading=loading)
    assert '```sh\npip install transformers "compressed-tensors>=0.15"\n```' in text
    assert 'AutoModelForCausalLM.from_pretrained("out", dtype="auto")' in text
    assert "```sh\nvllm serve out\n```" in text


@pytest.mark.parametrize(("front", "folder"), [("library_name: sentence-transformers", False), ("license: mit", True)])
def test_card_of_a_sentence_encoder_loads_it_as_one(finished, front, folder):
    loading = Loading("BertModel", compact=True, sentences=folder)
    text = card(finished.report, f"---\n{front}\n---\n", loading=loading)
    assert _split(text)[0]["library_name"] == "sentence-transformers"
    assert "pip install sentence-transformers\n" in text
    assert "from sentence_transformers import SentenceTransformer\n" in text
    assert 'model = SentenceTransformer("out", trust_remote_code=True)' in text


def test_card_is_made_when_model_has_none(finished):
    text = card(finished.report, base=Base("tiny", False), loading=Loading("BertForMaskedLM"))
    assert "The base model's card" not in text
    assert "trust_remote_code" not in text
    assert "AutoModelForMaskedLM" in text
    assert "vllm" not in text


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_brief_recipe_is_the_same_recipe(path):
    full = resolved(load_recipe(path, check_files=False))
    short = reports.brief(full)
    assert resolved(recipe_from_mapping(short, check_files=False)) == full
    assert len(to_yaml(short).splitlines()) < 50


def test_settings_are_written_as_in_a_recipe():
    settings = {"sparsity": 0.5, "method": "magnitude"}
    assert figures.changed_settings("prune_unstructured", settings) == "sparsity: 50%, method: magnitude"
    third = figures.changed_settings("prune_structured", {"layers": [1, 2], "mlp": 1 / 3, "heads": 2})
    assert third == "layers: [1, 2], mlp: 0.3333333333333333, heads: 2"
    assert figures.changed_settings("cast", {"overrides": {"lm_head": "int8"}}) == "overrides: {lm_head: int8}"


@pytest.mark.parametrize("text", ["---\n: [\n---\nbody", "---\n- a\n---\nbody", "no front\n---\n", "---\nnever closed"])
def test_card_takes_damaged_front_matter_as_text(text):
    assert _split(text) == ({}, text)


def test_card_takes_empty_front_matter():
    assert _split("---\n---\nbody") == ({}, "body")


def test_card_moves_headings_down_two_levels():
    assert _demoted("# a\n###### b\n#c\n~~~\n# d\n~~~") == "### a\n###### b\n#c\n~~~\n# d\n~~~"
