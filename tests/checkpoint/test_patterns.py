"""Patterns of a checkpoint: what Python's `re` says, without its freedom to hang."""

from __future__ import annotations

import itertools
import json
import random
import re
import time

import pytest

from compress.checkpoint import patterns
from compress.checkpoint.open import open_headers
from compress.checkpoint.patterns import Matcher
from compress.errors import CheckpointError
from tests import pico

ATOMS = [
    "a", "b", "\\.", "1", ".", "[ab]", "[^a]", "[a-c1]", "\\d", "\\w", "\\D", "[\\d.]", "(a|b1)", "(?:a|\\.b)", "(a*)",
    "((?:a|b)*1)", "(?P<n>a)", "\\-", "\n", ".*", "(?!ab)", "(?=a)", "^", "$", "\\b", "a|b",
]  # fmt: skip
REPEATS = ["", "", "*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"]


def test_patterns_match_the_same_names_as_re():
    draw, compared = random.Random(0), 0
    for _ in range(3000):
        atoms = [draw.choice(ATOMS) for _ in range(draw.randint(1, 5))]
        pattern = "".join(a + (draw.choice(REPEATS) if ATOMS.index(a) < 19 else "") for a in atoms)
        name = "".join(draw.choice("ab1.x\n-") for _ in range(draw.randint(0, 7)))
        try:
            expected = re.match(pattern, name) is not None
        except re.error:  # two groups of one name
            continue
        assert Matcher("x").matches(f"re:{pattern}", name) == expected, (pattern, name)
        compared += 1
    assert compared > 2500


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("lm_head", ["lm_head"], ["lm_head.x", "x.lm_head"]),
        ("re:.*self_attn.q_proj$", ["model.layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj.x"]),
        (r"re:model\.layers\.(?:[0-9]|1[0-2])\..*", ["model.layers.12.mlp"], ["model.layers.13.mlp"]),
        (r"re:^(?!.*(vision|lm_head)).*proj$", ["layers.0.up_proj"], ["vision.0.up_proj", "lm_head"]),
        (r"re:.*mlp\.experts\.\d+\.(gate|up)_proj$", ["l.0.mlp.experts.17.up_proj"], ["l.0.mlp.experts.x.up_proj"]),
    ],
)
def test_patterns_of_other_tools_are_read(pattern, names, others):
    assert all(Matcher("x").matches(pattern, name) for name in names)
    assert not any(Matcher("x").matches(pattern, name) for name in others)


@pytest.mark.parametrize("place", ["targets", "ignore"])
@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("re:(a+)+$", "has scales for a{40}!, which no group"),
        ("re:(a*)*(a|aa)*b(a*)*$", "has scales for a{40}!, which no group"),
        ("re:(?=(a|aa)*c)(.*a.*a.*)*$", "has scales for a{40}!, which no group"),
        ("re:(a", r"a pattern that cannot be used, 're:\(a': a bracket is not closed"),
        ("re:a**", "a repeat is repeated"),
        (r"re:(a)\1", r"the escape \\1 is not supported"),
        ("re:(?<=a)b", "of groups with"),
        ("re:((a{200}){200}){200}", "it is too long"),
        ("re:" + "(" * 100 + ")" * 100, "its brackets are nested too deeply"),
    ],
)
def test_patterns_cannot_hang_the_reader(place, pattern, said, tmp_path):
    """FAULTS B13: `(a+)+$` took more than a day."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = pico.save(tmp_path / "in", with_tokenizer=False)
    state = load_file(folder / "model.safetensors") | {f"{'a' * 40}!.weight_scale": torch.ones(4, 1)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": [pattern] if place == "targets" else [], "weights": {"num_bits": 8, "strategy": "channel"}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": [pattern] if place == "ignore" else [],
    }
    (folder / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=said):
        open_headers(folder)
    assert time.perf_counter() - start < 5


def test_patterns_of_a_checkpoint_share_a_limit(monkeypatch):
    monkeypatch.setattr(patterns, "_STEPS", patterns._STEPS // 20)
    start, matcher = time.perf_counter(), Matcher("here")
    many = (f"re:(x|{number})*(.*a.*b.*)*$" for number in range(10**9))
    with pytest.raises(CheckpointError, match="here: has patterns that take too long to match"):
        sum(matcher.matches(pattern, "ab" * 500) for pattern in many)
    with pytest.raises(CheckpointError, match="take too long to match"):
        Matcher("here").any(itertools.repeat("plain"), "name")
    assert time.perf_counter() - start < 5
