"""Damaged recipes: shipped ones and ones drawn from the schema, broken as text and as trees, or by ``--set``."""

from __future__ import annotations

import copy
import functools
import io
import json
import operator
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaigns import damage
from tests.campaigns.trial import Trial
from tests.conftest import ROOT

_LETTERS = "abcdefghij", "klmnopqrst"


def prepare(folder: Path) -> None:
    """Pico models, texts, and the shipped recipes with these in place of theirs."""
    import transformers

    from compress.recipe import recipe_schema
    from tests import pico

    transformers.utils.logging.disable_progress_bar()
    small = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    pico.save(folder / "lm", "llama", num_key_value_heads=2, head_dim=32, **small)
    pico.save(folder / "classifier", "bert", class_name="BertForSequenceClassification", num_labels=2, **small)
    for name, letters in zip(("train", "valid"), _LETTERS, strict=True):
        words = random.Random(name)
        texts = [" ".join("".join(words.choices(letters, k=5)) for _ in range(40)) for _ in range(12)]
        (folder / f"{name}.txt").write_text("\n<|doc|>\n".join(texts))
        rows = [f"{text}\tLABEL_{number % 2}" for number, text in enumerate(texts)]
        (folder / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        text = path.read_text()
        text = re.sub(r"examples/tiny-(classifier|encoder\S*)", str(folder / "classifier"), text)
        text = re.sub(r"examples/tiny-\w+", str(folder / "lm"), text)
        text = re.sub(
            r"examples/text/[\w.]*(train|valid|test)[\w.]*?\.(\w+)\b",
            lambda m: f"{folder}/{'train' if m[1] == 'train' else 'valid'}.{m[2]}",
            text,
        )
        text = re.sub(r"length: \d+", "length: 16", re.sub(r"samples: \d+", "samples: 4", text))
        (folder / path.name).write_text(text)
    (folder / "schema.json").write_text(json.dumps(recipe_schema()))


def case(trial: Trial) -> None:
    """Make a recipe, damage it, and run a command on it: mostly `check` and `plan`."""
    rng = trial.rng
    tame = rng.random() < 0.02
    shipped = sorted(trial.sound.glob("*.yaml"))
    kind = rng.choice(("text", "tree", "tree", "schema", "schema", "sets", "mixed", "mixed", "mixed"))
    path = trial.work / "recipe.yaml"
    sets: list[str] = []
    base = rng.choice(shipped)
    trial.notes.append(f"{kind} of {base.name}")
    text = base.read_text().replace("output: out/", f"output: {trial.work}/out/")
    tree = _tree(text)
    if tame and kind == "text":
        kind = "tree"
    if kind == "schema":
        schema = json.loads((trial.sound / "schema.json").read_text())
        tree = _drawn(rng, schema, trial, tame)
        if rng.random() < 0.5:
            tree = damage.damage_tree(rng, tree, tame=tame)
    elif kind == "mixed":
        schema = json.loads((trial.sound / "schema.json").read_text())
        tree = _mixed(rng, schema, [_tree(other.read_text()) for other in shipped], tame)
        tree["output"] = str(trial.work / "out")
    elif kind == "tree":
        for _ in range(rng.choice((1, 1, 1, 2))):
            tree = damage.damage_tree(rng, tree, tame=tame)
    elif kind == "sets":
        sets = [option for _ in range(rng.randrange(1, 3)) for option in ("--set", _override(rng, tree, tame))]
    if kind == "text":
        path.write_bytes(_damaged_text(rng, text.encode()))
    else:
        path.write_bytes(damage.dump(tree))
    _command(trial, path, sets, tame)


def _command(trial: Trial, path: Path, sets: list[str], tame: bool) -> None:
    rng, model = trial.rng, str(trial.sound / "lm")
    command = "run" if tame else rng.choice(("check", "check", "check", "plan", "plan", "gate"))
    options = {
        "run": [*sets, "-q"],
        "check": [*sets, *rng.choice(((), (), ("--json",), ("--resolved",)))],
        "plan": [*sets, *rng.choice(((), (), ("--json",), ("--offline",)))],
        "gate": [model, "--baseline", model, "--gate", _gate(rng), "-q", "--recipe"],
    }[command]
    arguments = [*options, str(path)] if command == "gate" else [str(path), *options]
    judged = (1, 3) if command in ("run", "gate") else ()
    done = trial.run(command, *arguments, allowed=(0, 2, 4, *judged), keep=[trial.sound / "lm"], cpu=60 if tame else 20)
    if done.status == 4 and "max_ram allows" not in done.err:  # a recipe may say that there is too little memory
        trial.failures.append(f"{command} ended with 4: {done.err[:200]}")


def _gate(rng: random.Random) -> str:
    return rng.choice(
        (
            "size.max_ratio=2",
            "size.max_ratio=nan",
            "size.max=1e400",
            "parameters.max_ratio=0.1",
            "size=",
            "=",
            "size.max_ratio.x=1",
            "kl.max=\ud800",
            "size.max_ratio=[1]",
            "bits_per_byte.max_increase=" + "9" * 400 + "%",
        )
    )


def _tree(text: str) -> Any:
    """A shipped recipe as JSON has it."""
    from ruamel.yaml import YAML

    return json.loads(json.dumps(YAML(typ="safe", pure=True).load(io.StringIO(text))))


def _override(rng: random.Random, tree: Any, tame: bool) -> str:
    """A ``--set`` value for some key, now and then one that does not exist."""
    path = [str(part) for part in rng.choice(damage.paths(tree)[1:])]
    if rng.random() < 0.3:
        path[rng.randrange(len(path))] = rng.choice(("x", "", "0", "-1", "99999999999", "[", "passes", "\ud800"))
    value = damage.odd(rng, tame)
    text = value if isinstance(value, str) and rng.random() < 0.7 else json.dumps(value)
    return rng.choice((f"{'.'.join(path)}={text}", f"{'.'.join(path)}={text}", ".".join(path), f"={text}")).replace(
        "\0", ""
    )


# --- recipes drawn from the schema


@dataclass(frozen=True)
class _Draw:
    """How values are drawn: ``odd`` is the share that fits nothing, ``share`` that of the settings that are given at all."""

    rng: random.Random
    schema: dict[str, Any]
    tame: bool
    odd: float = 0.02
    share: float = 0.25

    def value(self, schema: Any) -> Any:
        """A value that fits a part of the schema, or now and then one that does not."""
        rng = self.rng
        if not isinstance(schema, dict) or rng.random() < self.odd:
            return damage.odd(rng, self.tame)
        if "$ref" in schema:
            return self.value(functools.reduce(operator.getitem, schema["$ref"].split("/")[1:], self.schema))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.value(rng.choice(schema[key]))
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if "examples" in schema and rng.random() < 0.7:
            return rng.choice(schema["examples"])
        kind = schema.get("type")
        return self._plain(rng.choice(kind) if isinstance(kind, list) else kind, schema)

    def _plain(self, kind: str | None, schema: dict[str, Any]) -> Any:
        rng = self.rng
        if kind == "object":
            wanted = schema.get("required", [])
            given = {k: v for k, v in schema.get("properties", {}).items() if k in wanted or rng.random() < self.share}
            return {k: self.value(v) for k, v in given.items()}
        if kind == "array":
            items = schema.get("items", {"type": "integer"})
            return [self.value(items) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
        if kind in ("integer", "number"):
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
            whole = rng.choice((low, low + 1, low + 2, 8, 16, schema.get("maximum", 4) if not self.tame else 4))
            return whole if kind == "integer" else rng.choice((whole, low + 0.25, low + 0.5))
        if kind == "boolean":
            return rng.random() < 0.5
        return rng.choice(_TEXTS) if kind == "string" else None


_TEXTS = ("50%", "10%", "text", "x", "0", "1e-3", "2:4", "re:.*mlp.*", "*.mlp.*", "1MB", "original")


def _drawn(rng: random.Random, schema: dict[str, Any], trial: Trial, tame: bool) -> Any:
    """A recipe with the keys and, mostly, the types that the schema names."""
    draw = _Draw(rng, schema, tame)
    tree = {k: draw.value(v) for k, v in schema["properties"].items() if k != "extends" and rng.random() < 0.2}
    text = rng.random() < 0.9
    if text and rng.random() < 0.7:
        sections = {"training": {"length": 16}, "calibration": {"length": 16}, "evaluation": {"window": 32}}
        tree |= {"data": sections, "document_separator": "<|doc|>"}
    tree |= {"model": str(trial.sound / rng.choice(("lm", "lm", "classifier"))), "output": str(trial.work / "out")}
    tree["passes"] = [draw.value(schema["properties"]["passes"]["items"]) for _ in range(rng.choice((1, 1, 2, 3)))]
    for name, section in (tree["data"] if isinstance(tree.get("data"), dict) else {}).items():
        if isinstance(section, dict) and text:
            kind = rng.choice(("txt", "txt", "txt", "tsv", "jsonl"))
            section["files"] = [f"{trial.sound}/{'valid' if name == 'evaluation' else 'train'}.{kind}"]
            section.pop("images", None)
    return tree


def _mixed(rng: random.Random, schema: dict[str, Any], trees: list[Any], tame: bool) -> Any:
    """A shipped recipe whose passes are those of others, in any order, some with a setting or two drawn from the schema."""
    draw = _Draw(rng, schema, tame, odd=0.0, share=0.08)
    tree = copy.deepcopy(rng.choice(trees))
    known = [step for other in trees for step in other["passes"]]
    passes = []
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        step = copy.deepcopy(rng.choice(known))
        if isinstance(step, dict) and rng.random() < 0.6:
            name = next(iter(step))
            drawn = draw.value(schema["properties"]["passes"]["items"])
            if isinstance(drawn, dict) and isinstance(drawn.get(name), dict):
                step[name] = {**(step[name] or {}), **drawn[name]}
        passes.append(step)
    for name in ("training", "calibration"):
        if not any(section.get("text") or section.get("label") for section in tree["data"].values()):
            found = next(
                (other["data"][name] for other in trees if "text" not in other["data"].get(name, {"text": 1})), None
            )
            tree["data"].setdefault(name, found)
    return {**tree, "passes": passes, "store": rng.choice(("stock", "compact"))}


# --- as text

_LINES = (
    "passes: []", "passes:", "  - cast", "  - cast: {weights: bf16}", "- x", "model: *a", "x: &a [*a]", "<<: {model: x}", "? [a, b]\n: c", "!!python/object/apply:os.system ['id']: 1", "%YAML 1.1", "---", "...", "\tseed: 1",
    "seed: 0x10", "seed: 1_000", "seed: 0o17", "seed: .nan", "seed: -.inf", "seed: 1e400", "seed: 12:30", "seed: 2020-01-01", "seed: !!float 3", "seed: !!binary aGk=", "store: [compact", "store: {a: b", "gates: {size: {max_ratio: .nan}}", "gates: {bits_per_byte: {max_increase: 1e400%}}",
    "extends: recipe.yaml", "extends: .", "extends: /dev/null", "extends: ~nosuchuser/x", "extends: " + "x/" * 3000, "model: ~nosuchuser/x", "model: " + "y" * 300, "model: \"a\\0b\"", "output: \"a\\0b\"", "output: /proc/x/y", "model: http://x/y", "model: a/b@c@d", "{" * 200, "[" * 5000, "a: " * 2000, "x: |\n  " + "y" * 2000, "\x1b[31mred: 1", "é: ü", "\u202e: 1",
    "only: ['re:(']", "seed: \"\\ud800\"", "'\\x1b]0;x\\x07': 1", "max_ram: 99999999999999999999TB", "max_ram: 0.0000001", "workers: 10000000000", "device: cuda:99999999999999999999", "data: {evaluation: {files: [/dev/zero]}}", "data: {evaluation: {files: ['']}}", "data: {calibration: {files: [x.npy], samples: 999999999999999999999}}",
)  # fmt: skip


def _damaged_text(rng: random.Random, data: bytes) -> bytes:
    """The recipe's text with lines changed, moved, doubled or added, or its bytes damaged."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.25:
            data = damage.damage_bytes(rng, data)
            continue
        lines = data.decode("utf-8", "replace").split("\n")
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.choice(("add", "add", "add", "double", "drop", "swap", "indent", "join", "crlf", "word"))
        if kind == "add":
            lines.insert(at, rng.choice(_LINES))
        elif kind == "double":
            lines.insert(other, lines[at])
        elif kind == "drop":
            del lines[at]
        elif kind == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "indent":
            lines[at] = rng.choice((" ", "  ", "\t", "- ")) + lines[at]
        elif kind == "join" and at + 1 < len(lines):
            lines[at : at + 2] = [lines[at] + lines[at + 1]]
        elif kind == "crlf":
            lines = [line + "\r" for line in lines]
        elif words := lines[at].split(" "):
            words[rng.randrange(len(words))] = str(damage.odd(rng))
            lines[at] = " ".join(words)
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return data
