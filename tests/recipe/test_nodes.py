"""YAML as a tree: values, places, and every way a file can be wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import GOOD
from hypothesis import given
from hypothesis import strategies as st

from compress.recipe import load_recipe, to_yaml
from compress.recipe.nodes import MAX_ALIASED, parse
from compress.recipe.problems import Origin, Problem, find_place, plain

Heads = Callable[..., list[str]]


def read(text: str) -> tuple[Any, list[str]]:
    found: list[Problem] = []
    node = parse(text, Origin("x", tuple(text.split("\n"))), found)
    return (None if node is None else plain(node)), [problem.render().splitlines()[0] for problem in found]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("12:30:45", "12:30:45"),
        ("off", "off"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("1e-4", 1e-4),
        (".5e3", 500.0),
        ("+.5", 0.5),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-3", -3),
        ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"),
        ("~", None),
        ("", None),
        ("50%", "50%"),
        ("'1'", "1"),
        ('"a\\n"', "a\n"),
        ("!!str 3", "3"),
        ("!!float 3", 3.0),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_parse_reads_yaml_1_2_values(text: str, value: object) -> None:
    got, wrong = read(f"k: {text}")
    assert wrong == []
    assert got == {"k": value}
    assert type(got["k"]) is type(value)


def test_parse_refuses_keys_that_are_no_text() -> None:
    assert read("on: 1\n1: 2\nnull: 3\n") == ({"on": 1, "1": 2, "null": 3}, [])


def test_parse_follows_anchors_aliases_and_merge_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: *a, y: 9}\nd: {<<: [*b, *a]}\ne: *a\n"
    got, wrong = read(text)
    assert wrong == []
    assert got["c"] == {"x": 1, "y": 9}
    assert got["d"] == {"y": 3, "z": 4, "x": 1}
    assert got["e"] == {"x": 1, "y": 2}


def test_parse_allows_reused_anchors() -> None:
    assert read("a: &x 1\nb: *x\nc: &x 2\nd: *x\n") == ({"a": 1, "b": 1, "c": 2, "d": 2}, [])


def test_parse_ignores_yaml_1_1_directive() -> None:
    assert read("%YAML 1.1\n---\na: off\nb: 2:40\n") == ({"a": "off", "b": "2:40"}, [])


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("a: {b: 1, b: 2}", "x:1:11: duplicate key `b`"),
        ("a: 1\nb:\n\t- c", "x:3:1: not valid YAML: a tab cannot indent YAML"),
        (
            "a: [1, 2",
            "x:1:9: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got the end of the file",
        ),
        ("a: b: c", "x:1:5: not valid YAML: a `:` cannot stand here"),
        ("a: 'x", "x:1:6: not valid YAML: while scanning a quoted scalar, found unexpected end of stream"),
        ("a: @x", "x:1:4: not valid YAML: '@' cannot start a value"),
        ("a: *x", "x:1:4: undefined alias 'x'"),
        ("a: 1\n---\nb: 2", "x:2:1: not valid YAML: a recipe is one document, and a second one starts here"),
        ("a: \x07", "x:1:4: not valid YAML: the character U+0007 cannot stand in it"),
        ("a: !e!x 3", "x:1:4: not valid YAML: while parsing a node, found undefined tag handle '!e!'"),
        ("a: !foo 3", "x:1:4: the tag `!foo` cannot be used here"),
        ("a: !!python/object:os.system x", "x:1:4: the tag `!!python/object:os.system` cannot be used here"),
        ("a: !!binary aGk=", "x:1:4: the tag `!!binary` cannot be used here"),
        ("a: !!set {b}", "x:1:4: the tag `!!set` cannot be used here"),
        ("a: !!str [b]", "x:1:4: the tag `!!str` cannot be used here"),
        ("a: !!int b", "x:1:4: `b` is not a value of `!!int`"),
        ("a: .nan", "x:1:4: `.nan` is not a finite number"),
        ("a: -.inf", "x:1:4: `-.inf` is not a finite number"),
        ("a: 1e999", "x:1:4: `1e999` is not a finite number"),
        ('a: "\\0"', "x:1:4: the character U+0000 cannot be used"),
        ('a: "\\ud800"', "x:1:4: half a surrogate pair cannot be used"),
        ("a: " + "9" * 5000, f"x:1:4: `{'9' * 39}…` is too large a number"),
        ("? [a]\n: b", "x:1:3: a key must be a single value"),
        ("a: &a [*a]", "x:1:4: an alias stands inside its own anchor"),
        ("a: &a {b: {<<: *a}}", "x:1:4: an alias stands inside its own anchor"),
        ("a: {<<: 3}", "x:1:9: `<<` merges mappings only"),
        ("a: " + "[" * 70, "x:1:67: nested more than 64 deep"),
    ],
)
def test_parse_errors_have_places(text: str, head: str) -> None:
    _, wrong = read(text)
    assert wrong[0] == head


def test_parse_finds_every_duplicate_key() -> None:
    _, wrong = read("a: 1\na: 2\nb:\n  - {c: 1, c: 2, c: 3}\n  - d: {e: 1, e: 1}\na: 4\n")
    assert sorted(wrong) == [
        "x:2:1: duplicate key `a`",
        "x:4:12: duplicate key `c`",
        "x:4:18: duplicate key `c`",
        "x:5:15: duplicate key `e`",
        "x:6:1: duplicate key `a`",
    ]


def test_parse_refuses_alias_bombs() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    start = time.process_time()
    _, wrong = read("\n".join(lines))
    assert [line.partition(": ")[2] for line in wrong] == [f"aliases expand to more than {MAX_ALIASED} values"]
    assert time.process_time() - start < 5


def test_find_place_of_paths() -> None:
    text = "a:\n  - b: {c: 12}\n  - x\nd:\ne: |\n  text\n"
    found: list[Problem] = []
    root = parse(text, Origin("x", tuple(text.split("\n"))), found)
    assert root is not None
    assert str(find_place(root, ("a", 0, "b", "c"))) == "x:2:12"
    assert str(find_place(root, ("a", 0, "b", "c"), key=True)) == "x:2:9"
    assert str(find_place(root, ("a", 0, "b", "nowhere"))) == "x:2:5"
    assert str(find_place(root, ("a", 1))) == "x:3:5"
    assert str(find_place(root, ("d",))) == "x:4:1", "nothing is written: its key"
    assert str(find_place(root, ("e",))) == "x:5:1", "several lines: its key"


def test_excerpt_cuts_long_lines_around_the_mistake(heads: Heads, problems: Heads) -> None:
    junk = ", ".join(f"k{i}: {i}" for i in range(49))
    shown = problems(f"{{model: m, output: o, passes: [cast: {{weights: bf16}}], {junk}}}")[30].splitlines()
    assert shown[0].endswith("unknown key `k30`")
    start = shown[2].index("^")
    assert shown[1][start : start + 3] == "k30"
    assert len(shown[1]) < 180


def test_load_recipe_takes_crlf_and_byte_order_mark(work: Path) -> None:
    Path("r.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(Path("r.yaml")).model == "tiny-lm"


def test_places_do_not_count_byte_order_mark(problems: Heads) -> None:
    assert problems(b"\xef\xbb\xbfmodle: a\r\n" + GOOD.encode())[0].splitlines()[:3] == [
        "r.yaml:1:1: unknown key `modle`",
        "    1 | modle: a",
        "      | ^^^^^",
    ]


@pytest.mark.parametrize(
    ("data", "head"),
    [
        (b"", "r.yaml: is empty"),
        (b"# nothing but a comment\n", "r.yaml: is empty"),
        (b"---\n", "r.yaml: is empty"),
        (b"- model: a\n", "r.yaml:1:1: expected a mapping at the top, got a list"),
        (b"hello\n", "r.yaml:1:1: expected a mapping at the top, got a single value"),
        (b"model: a\noutput: \xff\n", "r.yaml:2:9: is not UTF-8 text (byte 0xff)"),
        ("model: a".encode("utf-16"), "r.yaml:1:1: is not UTF-8 text (UTF-16)"),
        (b"#" * 1_000_001, "r.yaml: is larger than 1 MB, so it is not a recipe"),
    ],
)
def test_parse_refuses_files_that_are_no_recipe(heads: Heads, data: bytes, head: str) -> None:
    assert heads(data) == [head]


def test_load_recipe_refuses_unreadable_files(work: Path) -> None:
    from compress.errors import RecipeError

    Path("quickstart.yaml").write_text(GOOD)
    for path, text in (
        ("quickstrat.yaml", "quickstrat.yaml: there is no such file\n   did you mean `quickstart.yaml`?"),
        ("text", "text: is a folder, not a recipe\n   `compress init text` writes one for a model"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(Path(path))
        assert caught.value.problems == [text]


texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(texts, values, max_size=5))
def test_to_yaml_reads_back(data: dict[str, Any]) -> None:
    got, wrong = read(to_yaml({"k": data}))
    assert wrong == []
    assert got == {"k": data}


@given(st.text(st.sampled_from("ab:-[]{}#&*!|>'\"%@` \n\t,?<~1.")))
def test_parse_never_crashes(text: str) -> None:
    read(text)
