"""The order of passes follows from their declarations: tried with passes made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from compress import passes
from compress.passes.base import Pass, PassSettings, Storage
from compress.recipe import load_recipe

Heads = Callable[..., list[str]]


class Bits(PassSettings):
    """Settings of `quantise`."""

    keep: bool = False


class Quantise(Pass[Bits]):
    """Leaves integers, unless told to keep floats."""

    name: ClassVar[str] = "quantise"
    summary: ClassVar[str] = "Integers."
    settings = Bits
    mode = "stream"
    yields: ClassVar[frozenset[Storage]] = frozenset({"integer"})

    def output_storage(self, settings: Bits) -> frozenset[Storage]:
        """Floats with ``keep``."""
        return frozenset({"float"}) if settings.keep else self.yields


class Plain(Pass[PassSettings]):
    """A data-free pass on floats."""

    name: ClassVar[str] = "shrink"
    summary: ClassVar[str] = "Floats."
    settings = PassSettings
    mode = "stream"


class Distil(Plain):
    """A pass that trains."""

    name: ClassVar[str] = "distil"
    mode = "train"
    needs = frozenset({"training"})


class Both(Plain):
    """Reads integers and leaves them."""

    name: ClassVar[str] = "rename"
    accepts: ClassVar[frozenset[Storage]] = frozenset({"float", "integer"})
    yields: ClassVar[frozenset[Storage]] = frozenset({"float", "integer"})


class Unpack(Plain):
    """Reads integers and leaves floats."""

    name: ClassVar[str] = "unpack"
    accepts: ClassVar[frozenset[Storage]] = frozenset({"float", "integer"})


class OnlyIntegers(Plain):
    """Reads integers alone."""

    name: ClassVar[str] = "recode"
    accepts: ClassVar[frozenset[Storage]] = frozenset({"integer"})
    yields: ClassVar[frozenset[Storage]] = frozenset({"integer"})


class Broken:
    """Stands for a plug-in that cannot be imported."""


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    passes.get.cache_clear()
    for cls in (Quantise, Plain, Distil, Both, Unpack, OnlyIntegers):
        monkeypatch.setitem(passes.TABLE, cls.name, f"{__name__}:{cls.__name__}")
    monkeypatch.setitem(passes.TABLE, "broken", "no.such.module:Broken")
    yield
    passes.get.cache_clear()


def recipe(*names: str) -> str:
    entries = "".join(f"  - {name}\n" for name in names)
    return f"model: m\noutput: o\ndata: {{training: {{files: [text/train.txt]}}}}\npasses:\n{entries}"


@pytest.mark.parametrize(
    "names",
    [
        ["shrink", "quantise"],
        ["distil", "quantise", "rename"],
        ["quantise: {keep: true}", "distil"],
        ["quantise", "unpack", "distil"],
        ["quantise", "recode", "unpack", "shrink"],
    ],
)
def test_order_allows_legal_lists(work: Path, names: list[str]) -> None:
    Path("r.yaml").write_text(recipe(*names))
    assert len(load_recipe(Path("r.yaml")).passes) == len(names)


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (
            ["quantise", "distil"],
            ["r.yaml:6:5: distil trains and accepts float weights, but quantise (passes.0) leaves integers"],
        ),
        (
            ["quantise", "rename", "shrink"],
            ["r.yaml:7:5: shrink accepts float weights, but quantise (passes.0) leaves integers"],
        ),
        (["shrink", "recode"], ["r.yaml:6:5: recode accepts integer weights, but shrink (passes.0) leaves floats"]),
        (
            ["quantise", "shrink", "distil"],
            ["r.yaml:6:5: shrink accepts float weights, but quantise (passes.0) leaves integers"],
        ),
        (
            ["quantise", "shrink", "quantise", "distil"],
            [
                "r.yaml:6:5: shrink accepts float weights, but quantise (passes.0) leaves integers",
                "r.yaml:8:5: distil trains and accepts float weights, but quantise (passes.2) leaves integers",
            ],
        ),
    ],
)
def test_order_refuses_illegal_lists(heads: Heads, names: list[str], wrong: list[str]) -> None:
    assert heads(recipe(*names)) == wrong


def test_order_tells_the_way_out(problems: Heads) -> None:
    assert problems(recipe("quantise", "distil"))[0].splitlines()[-1] == "   put distil before quantise"


def test_order_names_missing_data_of_a_pass(problems: Heads) -> None:
    assert problems("model: m\noutput: o\npasses: [distil]\n") == [
        "r.yaml:3:10: distil needs training text, and there is no `data.training`\n    3 | passes: [distil]\n"
        "      |          ^^^^^^\n   add to data: `training: {files: [FILE]}`, or `training: default`"
    ]


def test_order_is_checked_beside_other_mistakes(heads: Heads) -> None:
    assert heads(recipe("quantise", "shrink: {x: 1}", "distil")) == [
        "r.yaml:6:14: unknown key `x` in shrink",
        "r.yaml:7:5: distil trains and accepts float weights, but quantise (passes.0) leaves integers",
    ]


def test_order_names_a_plug_in_that_does_not_import(heads: Heads) -> None:
    assert heads(recipe("broken")) == ["r.yaml:5:5: the pass `broken` cannot be loaded: No module named 'no'"]
