"""Windows as edits: by KV head, with first tokens that stay, by pattern."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.architectures.cache import cache_values
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError, PassError
from compress.passes import get
from compress.planning import plan_pass
from tests import pico
from tests.toolbox import plan

HEADS = {"by": "heads", "window": 8, "sinks": 2}
EVERY = {**HEADS, "choose": "every"}


def windows(spec):
    """By edited block: its window and its full heads."""
    return {
        edit.module.split(".")[2]: (edit.values["window"], list(edit.values["full"])) for edit in spec.structure.edits
    }


def planned(family="llama", changes=None, **settings):
    return plan(open_checkpoint(pico.folder(family, **(changes or {}))), "local_attention", **settings)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A model in which the first KV head of block 2 does by far the most: its query heads are 0 and 1."""
    folder = pico.save(tmp_path_factory.mktemp("uneven") / "in", "llama")
    tensors = load_file(folder / "model.safetensors")
    for i in range(4):
        weight = tensors[f"model.layers.{i}.self_attn.o_proj.weight"]
        weight[:, :16] *= 20.0 if i == 2 else 0.001
        weight[:, 16:] *= 0.001
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({**EVERY, "full": "25%"}, {"0": (8, [1]), "1": (8, []), "2": (8, [1]), "3": (8, [])}),
        ({**EVERY, "full": 8 - 1}, {"3": (8, [0])}),
        ({**EVERY, "full": 0}, dict.fromkeys("0123", (8, []))),
        ({"window": 8, "sinks": 4, "full": [0, 2]}, dict.fromkeys("13", (8, []))),
        ({"window": 8, "pattern": "chunks", "choose": "every", "full": "50%"}, dict.fromkeys("13", (8, []))),
    ],
)
def test_windows_become_edits(settings, expected):
    spec = planned(**settings)
    if settings.get("full") == "25%":
        expected = {block: (8, [0] if block in "02" else []) for block in "0123"}
    if settings.get("full") == 7:
        expected = {"3": (8, [0])}
    assert windows(spec) == expected
    assert all(edit.values["positions"] == 64 for edit in spec.structure.edits)


def test_default_of_sinks_follows_what_a_stock_class_can():
    assert planned(by="heads", window=8).structure.edits[0].values["sinks"] == 4
    assert planned(window=8, pattern="fixed", keep=2).structure.edits[0].values | {"full": ()} == {
        "window": 8, "sinks": 4, "heads": 2, "full": (), "pattern": "fixed", "positions": 64, "keep": 2,
    }  # fmt: skip
    assert planned(window=8, pattern="strided", positions=32).structure.edits[0].values["stride"] == 8
    assert not planned(window=8).structure.edits


def test_cache_is_as_large_as_planned():
    spec = planned(**EVERY, max_cache="40%", at=64)
    full = open_checkpoint(pico.folder()).spec
    assert 0.3 < cache_values(spec, 64) / cache_values(full, 64) <= 0.4
    with pytest.raises(PassError, match=r"the cache is 15.6% of the original's at 64 tokens; .*max_cache: 16%"):
        planned(**EVERY, max_cache="10%", at=64)


@pytest.mark.parametrize("pattern", ["window", pytest.param("strided", marks=pytest.mark.slow)])
def test_the_head_that_would_lose_most_stays_full(pattern, uneven, tmp_path, data):
    details = {}
    compress.apply(
        "local_attention", uneven, tmp_path / "out", data=data.ids, store="compact", full=1, pattern=pattern, details=details, **HEADS
    )  # fmt: skip
    written = open_checkpoint(tmp_path / "out").spec
    assert windows(written) == {"0": (8, []), "1": (8, []), "2": (8, [0]), "3": (8, [])}
    rows = details["windows"]
    assert [(row["block"], row["head"]) for row in rows if row["window"] is None] == [(2, 0)]
    assert rows[4]["share"] > 0.9
    before = open_checkpoint(uneven)
    assert all(
        torch.equal(before.tensor(t).data, open_checkpoint(tmp_path / "out").tensor(t).data) for t in written.tensors
    )


def test_blocks_get_one_of_several_windows(uneven, tmp_path, data):
    settings = {"window": [4, 16], "sinks": 2, "max_cache": "20%", "at": 64}
    compress.apply("local_attention", uneven, tmp_path / "out", data=data.ids, store="compact", **settings)
    found = windows(open_checkpoint(tmp_path / "out").spec)
    assert found["2"][0] == 16
    assert sorted(window for window, _ in found.values()) == [4, 4, 16, 16]


def test_blocks_with_windows_of_heads_are_tuned(uneven, tmp_path, data):
    details = {}
    settings = {**EVERY, "full": 1, "tune_epochs": 1}
    compress.apply(
        "local_attention", pico.folder(), tmp_path / "out", data=data.ids, store="compact", details=details, **settings
    )
    assert len(open_checkpoint(tmp_path / "out").spec.structure.edits) == 4
    assert details["training"]["helped"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "heads", "sinks": "learned"}, "set `sinks: 4`, or 0"),
        ({"by": "heads", "window": [8, 16]}, "KV heads of a block share one window"),
        ({"window": [8, 16], "choose": "every"}, "chosen by divergence: give one window"),
        ({"stride": 4}, "`stride` is for `pattern: strided`"),
        ({"pattern": "chunks", "keep": 2}, "`keep` is for `pattern: fixed`"),
        ({"positions": 32}, "set `sinks` to a number"),
        ({"by": "heads", "full": [0]}, "give `full` as a share or a count"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        get("local_attention").settings(**{"window": 8, **settings})


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("bloom", EVERY, "does not call its attention through transformers' table"),
        ("t5", EVERY, "does not decode token by token"),
        ("mistral", {**EVERY, "window": 4}, "all blocks have a window of 4096 already"),
        (
            "gemma2",
            {**EVERY, "window": 4, "full": 9},
            "every block|only 4 KV heads see everything, and 9 are to stay so",
        ),
        ("llama", {**EVERY, "full": 8}, "every one of the KV heads would stay full"),
        ("llama", {**EVERY, "target": "qwen2"}, "no stock class can express these windows"),
        ("llama", {**EVERY, "positions": 9}, "no shorter than the 9 positions"),
        ("llama", {"window": 8, "sinks": 4, "full": [7]}, "there is no block 7"),
        ("llama", {**EVERY, "sinks": 60}, "a window of 8 with 60 first tokens is no shorter than the 64 positions"),
        ("llama", {**EVERY, "at": 12, "sinks": 4}, "still see all of 12 tokens, so nothing would change; set fewer"),
        ("llama", {**EVERY, "pattern": "fixed", "keep": 9}, "still see all of 64 tokens.*; set a smaller `keep`"),
        ("llama", {**EVERY, "pattern": "strided", "stride": 1}, "still see all of 64 tokens.*; set a larger `stride`"),
        ("granite_swa", {**EVERY, "window": 5}, "heads have logits of sinks.*; use `by: layers`"),
        ("minicpm3", EVERY, "minicpm3 caches no keys and values by head"),
    ],
)
def test_models_that_windows_of_heads_do_not_fit_are_refused(family, settings, message):
    with pytest.raises(PassError, match=message) as error:
        planned(family, **settings)
    assert "\n" not in str(error.value)


def test_stock_store_is_refused_and_names_what_it_can_hold():
    spec, instance = open_checkpoint(pico.folder()).spec, get("local_attention")
    with pytest.raises(CompressError, match=r"use `store: compact`, or give windows to whole blocks: .*by: layers"):
        plan_pass(spec, instance, instance.settings(**EVERY), "stock")
