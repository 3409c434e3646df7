"""Modules that patterns of ``only`` and ``skip`` select."""

from __future__ import annotations

import fnmatch
import random
import re
import time

import pytest

from compress.errors import PassError
from compress.passes.base import PassSettings
from compress.passes.selection import matching, select
from tests.checkpoint.test_patterns import ATOMS, REPEATS

MODULES = [f"model.layers.{i}.{m}" for i in range(12) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
HOSTILE = f"{'a' * 60}!"


def test_matching_agrees_with_fullmatch():
    draw, compared = random.Random(1), 0
    for _ in range(1500):
        atoms = [draw.choice(ATOMS) for _ in range(draw.randint(1, 5))]
        pattern = "".join(a + (draw.choice(REPEATS) if ATOMS.index(a) < 19 else "") for a in atoms)
        names = {"".join(draw.choice("ab1.x\n-") for _ in range(draw.randint(0, 7))) for _ in range(4)}
        try:
            expected = {name for name in names if re.fullmatch(pattern, name)}
        except re.error:  # two groups of one name
            continue
        if expected:
            assert matching(f"re:{pattern}", names, "only") == expected, pattern
            compared += 1
        else:
            with pytest.raises(PassError, match="matches no module"):
                matching(f"re:{pattern}", names, "only")
    assert compared > 300


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.mlp.*",
        "*.[01].mlp.up_proj",
        r"re:.*\.(up|down)_proj",
        r"re:model\.layers\.(?:[0-9]|1[0-2])\.(\w+\.)+\w+",
    ],
)
def test_select_takes_only_without_skip(pattern):
    expected = {
        m
        for m in MODULES
        if (re.fullmatch(pattern[3:], m) if pattern[:3] == "re:" else fnmatch.fnmatchcase(m, pattern))
    }
    assert select([], PassSettings(only=[pattern]), MODULES) == expected
    assert select(MODULES, PassSettings(skip=[pattern]), MODULES) == set(MODULES) - expected
    assert select(MODULES, PassSettings(only=["*q_proj"], skip=[pattern]), MODULES) == {
        m for m in MODULES if m.endswith("q_proj") and m not in expected
    }


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("re:(a+)+$", "matches no module"),
        ("re:(a|a)*(a*)*b", "matches no module"),
        ("re:" + "a?" * 60 + "a" * 60 + "b", "matches no module"),
        ("re:" + "(a|a)" * 40 + "b", "matches no module"),
        ("*a*a*a*a*a*a*a*a*a*b", "matches no module"),
        (r"re:(a+)+\1", r"could take very long to match: the escape \\1 is not supported; write a simpler pattern"),
        ("re:((a{200}){200}){200}", "could take very long to match: it is too long"),
        ("re:(a", "is not a regular expression: missing"),
    ],
)
def test_hostile_patterns_are_answered_at_once(pattern, message):
    start = time.perf_counter()
    with pytest.raises(PassError, match=message) as caught:
        select(MODULES, PassSettings(skip=[pattern]), [*MODULES, HOSTILE])
    assert caught.value.key == "skip"
    assert time.perf_counter() - start < 2
