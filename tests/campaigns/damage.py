"""Ways to damage a file: its bytes, its JSON tree, the header of its tensors, its YAML front matter, and what the file is."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEEP = "<deep>"  # stands for nesting that no writer of JSON makes
#: Scalars and small trees that code seldom expects, by what they are: of no type, too large, no number, hostile text.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 3, 7, 64, 0.0, 0.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf,
    10**6, 10**9, 10**12, 10**18, -(10**18), 2**31, 2**63, 10**400,
    "", " ", "x", "0", "nan", "true", "None", "auto", "../../x", "/etc/passwd", "a\0b", "\ud800", "\udfff", "\x1b]0;owned\x07",
    "\x9b31m", "\u202egpj.exe", "\ufffe", "x" * 5000, "é", "|", "`", "<img src=x onerror=alert(1)>", '"); import os; ("', "{{ x }}", "%s%n",
    "re:(a+)+$", "re:(", "re:.*", "[", "*",
    [], [None], [[]], [1], ["x"], [[1, 2], [3]], list(range(40)), {}, {"": None}, {"x": {"y": []}}, {"0": "LABEL_0"}, DEEP,
)  # fmt: skip
#: The same without what makes honest work long.
TAME: tuple[Any, ...] = tuple(
    v for v in ODD if not (isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) > 64)
)


def odd(rng: random.Random, tame: bool = False) -> Any:
    """A value that is not expected."""
    return copy.deepcopy(rng.choice(TAME if tame else ODD))  # a tree may be damaged again


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a JSON tree are, the whole first."""
    found = [path]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += paths(value, (*path, key))
    return found


def get(tree: Any, path: Sequence[Any]) -> Any:
    """The value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Sequence[Any], value: Any) -> Any:
    """The tree with another value there, changed in place."""
    if not path:
        return value
    get(tree, path[:-1])[path[-1]] = value
    return tree


def damage_tree(rng: random.Random, tree: Any, hints: Sequence[tuple[str, Any]] = (), tame: bool = False) -> Any:
    """Change one thing in a JSON tree, in place where that can be; gives the tree.

    Args:
        hints: keys and values worth adding somewhere. tame: no large numbers.
    """
    every = paths(tree)
    path = rng.choice(every[1:] or every)
    kind = rng.choice(("odd", "odd", "odd", "delete", "near", "near", "type", "copy", "rename", "add", "hint", "hint"))
    if kind == "hint" and hints:
        objects = [p for p in every if isinstance(get(tree, p), dict)]
        if objects:
            key, value = rng.choice(hints)
            get(tree, rng.choice(objects[:3]))[key] = odd(rng, tame) if value is ... else value
            return tree
    if not path or kind == "odd" or kind == "hint":
        return put(tree, path, odd(rng, tame))
    parent, key = get(tree, path[:-1]), path[-1]
    value = parent[key]
    if kind == "delete":
        del parent[key]
    elif kind == "near":
        parent[key] = _near(rng, value, tame)
    elif kind == "type":
        parent[key] = rng.choice(([value], {"value": value}, str(value), {str(key): value}, [value, value]))
    elif kind == "copy":
        parent[key] = copy.deepcopy(get(tree, rng.choice(every)))
    elif kind == "rename" and isinstance(parent, dict):
        name = rng.choice((str(key) + "x", str(key).upper(), str(key)[:-1], str(odd(rng))))
        parent[name] = parent.pop(key)
    elif isinstance(parent, dict):
        parent[str(odd(rng))] = odd(rng, tame)
    else:
        parent.insert(rng.randrange(len(parent) + 1), odd(rng, tame))
    return tree


def _near(rng: random.Random, value: Any, tame: bool) -> Any:
    """A value of the same type that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)) and -1e300 < value < 1e300:
        changes: list[Callable[[Any], Any]] = [
            lambda v: v + 1, lambda v: v - 1, lambda v: -v, lambda v: v / 3, lambda v: float(v), lambda v: v * 2,
            *([] if tame else [lambda v: v * 10**6]),
        ]  # fmt: skip
        return rng.choice(changes)(value)
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice((value[:cut], value + value[:cut], value[:cut] + "\u200b" + value[cut:], value.swapcase()))
    if isinstance(value, list):
        return rng.choice((value[:-1], value + value, value[::-1], [*value, odd(rng, tame)]))
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if rng.random() < 0.7}
    return odd(rng, tame)


def dump(tree: Any) -> bytes:
    """JSON as a hostile writer would have it: NaN, half surrogates and deep nesting too."""
    text = json.dumps(tree)
    deep = "[" * 20000 + "]" * 20000
    return text.replace(json.dumps(DEEP), deep).encode()


def damage_json(rng: random.Random, data: bytes, hints: Sequence[tuple[str, Any]] = (), tame: bool = False) -> bytes:
    """Damage a JSON file's tree once or a few times; sometimes give it a key twice."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return damage_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = damage_tree(rng, tree, hints, tame)
    new = dump(tree)
    if isinstance(tree, dict) and tree and rng.random() < 0.05:
        new = b"{" + dump({rng.choice(list(tree)): odd(rng, tame)})[1:-1] + b", " + new[1:]
    return new


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut, flip, splice, repeat or replace bytes."""
    kind = rng.choice(("cut", "flip", "flips", "splice", "insert", "empty", "zeros", "text", "bom", "wide", "deep"))
    at = rng.randrange(len(data) + 1)
    if kind == "cut":
        return data[:at]
    if kind in ("flip", "flips") and data:
        new = bytearray(data)
        for _ in range(1 if kind == "flip" else rng.randrange(1, 40)):
            new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
        return bytes(new)
    if kind == "splice":
        other = rng.randrange(len(data) + 1)
        return data[:at] + data[other : other + rng.randrange(200)] + data[at + rng.randrange(200) :]
    if kind == "insert":
        return data[:at] + rng.choice((b"\xff\xfe", b"\0", b"{", b"]", b'"', b"\x1b[31m", b"NaN", b",")) + data[at:]
    if kind == "zeros":
        return bytes(len(data))
    if kind == "text":
        return rng.choice(
            (
                b"null",
                b"[]",
                b"{}",
                b"0",
                b'""',
                b"version https://git-lfs.github.com/spec/v1\n",
                b"<html></html>",
                b"NaN",
            )
        )
    if kind == "bom":
        return b"\xef\xbb\xbf" + data
    if kind == "wide":
        return data.decode("latin-1").encode("utf-16")
    return b"[" * 100_000 if kind == "deep" else b""


def damage_place(rng: random.Random, path: Path) -> None:
    """Make something else of a file: nothing, a folder, a link to nothing, to itself, to a file outside, a pipe, another file."""
    kind = rng.choice(("gone", "gone", "folder", "dangling", "loop", "outside", "pipe", "other"))
    path.unlink() if not path.is_dir() or path.is_symlink() else shutil.rmtree(path)
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "outside":
        path.symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "other":
        others = sorted(p for p in path.parent.iterdir() if p.is_file() and not p.is_symlink())
        if others:
            shutil.copy(rng.choice(others), path)


# --- safetensors


def split_tensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a sound file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_tensors(header: Any, data: bytes) -> bytes:
    """The reverse, for any tree."""
    text = dump(header)
    return len(text).to_bytes(8, "little") + text + data


_SAME_BITS = (
    ("F16", "BF16", "I16", "U16"),
    ("F32", "I32", "U32"),
    ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "BOOL"),
    ("F64", "I64", "U64"),
)
_NAMES = (
    "", ".", "..weight", "a..b", "weight", "\ud800.weight", "\x1b]0;owned\x07.weight", "x" * 3000, "model.layers.99.mlp.up_proj.weight",
    "model.layers.00.mlp.up_proj.weight", "<script>.weight", "a|b.weight", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!.weight_scale", "\u202ex.weight", "lm_head.weight_scale", "x.weight_packed",
)  # fmt: skip


def damage_tensors(rng: random.Random, data: bytes) -> bytes:
    """Damage a safetensors file: its length, its table, our metadata, or the arrays in ways that hold together."""
    header, rest = split_tensors(data)
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(
        (
            "bytes",
            "length",
            "tree",
            "tree",
            "metadata",
            "metadata",
            "table",
            "table",
            "table",
            "reshape",
            "dtype",
            "rename",
            "drop",
            "add",
            "values",
            "values",
        )
    )
    name = rng.choice(names)
    entry = header[name]
    table = (header.get("__metadata__") or {}).get("compress.tensors")
    if kind == "bytes":
        return damage_bytes(rng, data)
    if kind == "length":
        return (
            rng.choice((0, 1, 2**40, len(data), len(data) - 8, 2**64 - 1, rng.randrange(len(data)))).to_bytes(
                8, "little"
            )
            + data[8:]
        )
    if kind == "tree":
        return join_tensors(damage_tree(rng, header), rest)
    if kind == "table" and table:
        tree = json.loads(table)
        for _ in range(rng.choice((1, 1, 2))):
            tree = damage_tree(rng, tree, _TABLE_HINTS)
        header["__metadata__"]["compress.tensors"] = dump(tree).decode()
    elif kind in ("metadata", "table"):
        header["__metadata__"] = damage_tree(
            rng, header.get("__metadata__", {}), [("compress.tensors", "{}"), ("compress.tensors", ...)]
        )
    elif kind == "reshape":
        count = math.prod(entry["shape"])
        entry["shape"] = rng.choice(
            (
                entry["shape"][::-1],
                [count],
                [1, count],
                [*entry["shape"], 1],
                [count, 1, 1],
                [2, count // 2] if count % 2 == 0 else [count],
            )
        )
    elif kind == "dtype":
        same = next((group for group in _SAME_BITS if entry["dtype"] in group), (entry["dtype"],))
        entry["dtype"] = rng.choice(same)
    elif kind == "rename":
        header = {
            rng.choice((*_NAMES, name + "_scale", name + "_packed", name.replace(".0.", ".7."))) if k == name else k: v
            for k, v in header.items()
        }
    elif kind in ("drop", "add"):
        return _repacked(rng, header, rest, kind, name)
    elif kind == "values" and rest:
        return join_tensors(header, _other_values(rng, rest, entry))
    return join_tensors(header, rest)


def _repacked(rng: random.Random, header: dict[str, Any], rest: bytes, kind: str, name: str) -> bytes:
    """The file without an array, or with one more."""
    arrays = {k: (v, rest[slice(*v["data_offsets"])]) for k, v in header.items() if k != "__metadata__"}
    if kind == "drop":
        del arrays[name]
    else:
        new = rng.choice(
            (*_NAMES, "lm_head.weight", "model.rotary_emb.inv_freq", f"{name}_scale", f"{name}.keep", f"{name}.values")
        )
        arrays[new] = rng.choice(
            (arrays[name], ({"dtype": "F32", "shape": [0]}, b""), ({"dtype": "F32", "shape": []}, bytes(4)))
        )
    result: dict[str, Any] = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    body = b""
    for key, (entry, data) in arrays.items():
        result[key] = {
            "dtype": entry["dtype"],
            "shape": entry["shape"],
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    return join_tensors(result, body)


def _other_values(rng: random.Random, rest: bytes, entry: dict[str, Any]) -> bytes:
    """The data with other bits in one array."""
    start, end = entry["data_offsets"]
    size = end - start
    if not size:
        return rest
    part = rng.choice(
        (
            bytes(size),
            b"\xff" * size,
            rng.randbytes(size),
            b"\x00\x00\xc0\x7f" * (size // 4) + bytes(size % 4),
            b"\x80" * size,
        )
    )
    if rng.random() < 0.4:
        flipped = bytearray(rest[start:end])
        flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
        part = bytes(flipped)
    return rest[:start] + part + rest[end:]


_TABLE_HINTS: tuple[tuple[str, Any], ...] = (
    ("kept", ...), ("shape", ...), ("storage", ["mask", "dense"]), ("storage", ["codebook"]), ("storage", ["pack-quantized"]), ("storage", ...),
    ("grid", ...), ("grid", {"format": "int4", "bits": 4, "group": 0, "symmetric": True, "transposed": False, "activations": None}),
    ("bits", 0), ("bits", ...), ("group", 0), ("group", -1), ("group", ...), ("dtype", "F32"), ("dtype", ...), ("format", "codebook4"), ("symmetric", False), ("transposed", True),
)  # fmt: skip


# --- YAML front matter

_FRONT_VALUES = (
    "[{a: b}]", "[" * 5000, "[" * 60 + "]" * 60, "{a: {b: c}}", "!!python/object/apply:os.system [ls]", "&a [*a]", "*nowhere", "2020-01-01", "0x1F",
    "~", "yes", "NaN", ".inf", "-.inf", "1e400", '"\\uD800"', '"\\x00"', "'\x1b[31m'", "|\n  text", "? x", "<<: 3", "[1, [2, [3]]]", "!!binary aGk=", "!!set {a, b}",
    "99999999999999999999999999", "[a, a, a]", "[[a], {b: c}, 3, null, 2020-01-01]", "- x\n- y", "\ttab", "é", "\"a\\u202eb\"", "!!omap [a: 1]", "!<tag:x> 1", "12:30:45",
)  # fmt: skip


def damage_front(rng: random.Random, data: bytes) -> bytes:
    """Damage a README with front matter."""
    if rng.random() < 0.15:
        return damage_bytes(rng, data)
    text = data.decode("utf-8", "replace")
    front = re.match(r"---\n(.*?)---\n", text, re.DOTALL)
    lines = front[1].splitlines() if front else ["license: mit"]
    for _ in range(rng.choice((1, 1, 2))):
        value = rng.choice(_FRONT_VALUES)
        key = rng.choice(
            (
                "tags",
                "tags",
                "license",
                "language",
                "datasets",
                "base_model",
                "library_name",
                "x",
                "1",
                "[1]",
                "? {a: b}\n",
                "null",
                "2020-01-01",
                "<<",
            )
        )
        line = f"{key}: {value}"
        at = rng.randrange(len(lines) + 1)
        lines = rng.choice(([*lines[:at], line, *lines[at:]], [line, *lines], [line], [value]))
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    if rng.random() < 0.05:
        lines = bomb.splitlines()
    new = (
        "---\n"
        + "\n".join(lines)
        + rng.choice(("\n---\n", "\n---\n", "\n", "\n---"))
        + (text[front.end() :] if front else text)
    )
    return new.encode("utf-8", "replace")
