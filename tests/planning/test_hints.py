"""Hints of a plan: each says what doing it leaves, to the byte, and is not given where it would not pay."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.checkpoint.open import open_headers
from compress.formatting import format_bytes
from compress.planning import make_plan
from compress.planning.hints import hints
from compress.recipe import recipe_from_mapping
from tests import pico


def planned(model, *entries, **more):
    recipe = recipe_from_mapping({"model": str(model), "output": "out", "passes": [*entries], **more})
    plan = make_plan(recipe, *open_headers(model))
    return plan, hints(recipe, plan)


@pytest.fixture(scope="module")
def large_table():
    return pico.folder("bert", class_name="BertModel", vocab_size=2000)


def test_hint_on_a_table_says_what_codes_leave(large_table):
    cast = {"weights": "int8", "method": "rtn"}
    plan, (hint, unmeasured) = planned(large_table, {"cast": cast})
    table = 2000 * 32 * 4
    assert hint.startswith(
        f"{format_bytes(table)} of {format_bytes(plan.stages[-1].size.bytes)} is embeddings.word_emb"
    )
    for format_, store in (("int8", "compact"), ("bf16", "stock")):
        other, _ = planned(
            large_table, {"cast": {**cast, "overrides": {"embeddings.word_embeddings": format_}}}, store=store
        )
        said = f"`overrides: {{embeddings.word_embeddings: {format_}}}` with `store: {store}` leaves "
        assert said + format_bytes(other.stages[-1].size.bytes) in hint
    assert unmeasured == "nothing is measured: add `data: {evaluation: default}`, or text of your own"


def test_hint_on_a_table_is_left_out_where_it_is_small_or_has_codes(large_table):
    llama = pico.folder("llama", num_hidden_layers=4, intermediate_size=512)
    for model, entry, more in (
        (llama, {"weights": "int8", "method": "rtn"}, {}),
        (
            large_table,
            {"weights": "int8", "method": "rtn", "overrides": {"*word_embeddings": "int8"}},
            {"store": "compact"},
        ),
        (large_table, {"weights": "bf16"}, {}),
    ):
        assert not [hint for hint in planned(model, {"cast": entry}, **more)[1] if "overrides" in hint]


def test_hint_on_floats_names_the_cast_that_halves_them():
    _, found = planned(pico.folder("llama"), {"prune_structured": {"layers": [1], "compensation": "none"}})
    (hint,) = [hint for hint in found if "32-bit" in hint]
    assert re.match(r"[\d.]+ kB of [\d.]+ kB is 32-bit floats: `- cast: \{weights: bf16\}` halves them", hint)
    assert not [h for h in planned(pico.folder("llama"), {"cast": {"weights": "bf16"}})[1] if "32-bit" in h]


def test_hint_on_the_store_where_it_pays():
    half = {"prune_unstructured": {"method": "magnitude", "sparsity": 0.7}}
    plan, found = planned(pico.folder("llama"), half)
    compact = plan.stages[-1].passes[-1].other_store.bytes
    assert f"`store: compact` leaves {format_bytes(compact)}; its result brings its own modelling file" in found
    assert not [hint for hint in planned(pico.folder("llama"), half, store="compact")[1] if "store: stock" in hint]


def test_hint_on_gates_and_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some words\n")
    model, data = pico.folder("llama"), {"data": {"evaluation": {"files": ["text.txt"], "window": 16}}}
    _, found = planned(model, {"cast": {"weights": "bf16"}}, **data)
    assert found == ["no gates: the result is published whatever it loses"]
    assert planned(model, {"cast": {"weights": "bf16"}}, **data, gates={"kl": {"max": 1}})[1] == []


def test_hint_on_groups_names_the_multiple_that_keeps_them():
    model = pico.folder("llama", hidden_size=64, intermediate_size=320)
    prune, cast = (
        {"mlp": "25%", "compensation": "none", "importance": "magnitude"},
        {"weights": "int4", "method": "rtn"},
    )
    _, found = planned(model, {"prune_structured": prune}, {"cast": cast})
    assert [hint for hint in found if "multiple_of" in hint] == [
        "`multiple_of: 64` in passes.0.prune_structured keeps groups of 64, which do not divide the 240 inputs that it leaves"
    ]
    _, found = planned(model, {"prune_structured": {**prune, "multiple_of": 64}}, {"cast": cast})
    assert not [hint for hint in found if "multiple_of" in hint]
