"""Recipes from files: every mistake at once, at its place, in plain words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GOOD

import compress
from compress import passes
from compress.api import read_recipe
from compress.errors import PassError, RecipeError
from compress.evaluation.tasks import CLASSIFICATION, EMBEDDING, LANGUAGE, MASKED
from compress.passes.cast.settings import CastSettings
from compress.passes.prune_structured.settings import PruneStructuredSettings
from compress.passes.prune_unstructured.settings import PruneUnstructuredSettings
from compress.recipe import Recipe, load_recipe, locate, recipe_from_mapping, resolved
from compress.settings import Increase, Pattern

TOO_LARGE = 10**400


@pytest.mark.parametrize("value", [TOO_LARGE, -TOO_LARGE, "9" * 400 + "%", "9" * 400])
def test_parse_refuses_bounds_beyond_floats(value):
    from pydantic_core import PydanticCustomError

    from compress.settings import parse_increase, parse_ratio, parse_size

    for parse in (parse_increase, parse_size, parse_ratio):
        with pytest.raises(PydanticCustomError, match="expected"):
            parse(value)


Heads = Callable[..., list[str]]

FULL = """\
model: models/tiny
output: out/small
store: compact
seed: 3
device: cuda:1
dtype: bfloat16
max_ram: 8GiB
threads: 2
evaluate_at: end
document_separator: "<|end|>"
max_shard_size: 500MB
trust_remote_code: true
offline: true
data:
  training: {files: [text/train.txt]}
  calibration: &text {files: [text/train.txt], samples: 16, length: 32}
  evaluation: {files: [text/valid.txt], window: 128, stride: 64, max_documents: 9}
passes:
  - prune_structured: {layers: [3, 1]}
  - prune_unstructured:
      pattern: 2:4
      skip: ["re:.*lm_head"]
  - cast: {weights: bf16, overrides: {"model.layers.*": fp16}}
evaluate: [latency, kl]
gates:
  size: {max: 1MB, max_ratio: 40%}
  parameters: {max: 1000}
  bits_per_byte: {max_increase: 5%}
  perplexity: {max: 20, max_increase: 0.5}
  agreement: {min: 95%, max_drop: 2}
  memory: {max_ratio: 0.9}
confidence: 0.9
bootstrap: 500
"""


def test_load_recipe_reads_a_full_recipe(work: Path) -> None:
    Path("r.yaml").write_text(FULL)
    recipe = load_recipe(Path("r.yaml"))
    assert (recipe.store, recipe.seed, recipe.device, recipe.dtype) == ("compact", 3, "cuda:1", "bfloat16")
    assert (recipe.max_ram, recipe.max_shard_size) == (8 * 2**30, 500_000_000)
    assert (recipe.threads, recipe.evaluate_at, recipe.document_separator) == (2, "end", "<|end|>")
    assert (recipe.trust_remote_code, recipe.offline, recipe.confidence, recipe.bootstrap) == (True, True, 0.9, 500)
    assert recipe.data.calibration is not None
    assert (recipe.data.calibration.samples, recipe.data.calibration.files) == (16, ("text/train.txt",))
    assert recipe.data.evaluation is not None
    assert (recipe.data.evaluation.window, recipe.data.evaluation.stride) == (128, 64)
    assert [(entry.name, entry.settings) for entry in recipe.passes] == [
        ("prune_structured", PruneStructuredSettings(layers=(1, 3))),
        ("prune_unstructured", PruneUnstructuredSettings(pattern=Pattern(2, 4), skip=["re:.*lm_head"])),
        ("cast", CastSettings(weights="bf16", overrides={"model.layers.*": "fp16"}).stored_in("compact")),
    ]
    assert recipe.gates.size is not None
    assert (recipe.gates.size.max, recipe.gates.size.max_ratio) == (1_000_000, 0.4)
    (bits,), (perplexity,) = recipe.gates.bits_per_byte, recipe.gates.perplexity
    assert bits.max_increase == Increase(value=0.05, relative=True)
    assert perplexity.max_increase == Increase(value=0.5, relative=False)
    (agreement,) = recipe.gates.agreement
    assert (agreement.min, agreement.max_drop) == (0.95, 2)
    assert recipe.metrics == ("bits_per_byte", "perplexity", "kl", "agreement", "latency", "memory")


def test_load_recipe_fills_in_every_default(work: Path) -> None:
    Path("r.yaml").write_text(GOOD)
    recipe = load_recipe(Path("r.yaml"))
    assert (recipe.store, recipe.device, recipe.dtype, recipe.evaluate_at) == ("stock", "auto", "float32", "stage")
    assert (recipe.max_shard_size, recipe.confidence, recipe.bootstrap) == (5_000_000_000, 0.95, 10_000)
    assert recipe.metrics == (), "there is no text to measure on"
    Path("r.yaml").write_text(GOOD + "data: {evaluation: {files: [text/valid.txt]}}\n")
    recipe = load_recipe(Path("r.yaml"))
    assert recipe.evaluate is None, "the model's task decides"
    assert recipe.fitted(LANGUAGE).metrics == ("bits_per_byte", "kl")
    assert recipe.fitted(MASKED).metrics == ("perplexity", "kl")
    assert recipe.fitted(EMBEDDING).metrics == ("similarity",)
    assert load_recipe(Path("r.yaml"), ["evaluate=[kl]"]).fitted(LANGUAGE).metrics == ("kl",)


LABELLED = "data: {{evaluation: {{files: [dev.tsv], {}}}}}\n"


def test_load_recipe_reads_labelled_texts(work: Path) -> None:
    Path("dev.tsv").write_text("a\tb\tlabel\nx\ty\t0\n")
    for given, columns in (("text: a, ", ("a",)), ("text: [a, b], ", ("a", "b")), ("", ("text",))):
        Path("r.yaml").write_text(GOOD + LABELLED.format(f"{given}label: label") + "gates: {f1: {max_drop: 1}}\n")
        recipe = load_recipe(Path("r.yaml"))
        assert recipe.data.evaluation is not None
        assert recipe.data.evaluation.columns == columns
        assert recipe.fitted(CLASSIFICATION).metrics == ("accuracy", "f1", "agreement")
        assert recipe.fitted(EMBEDDING).metrics == ("f1", "similarity", "spearman")
        again = recipe_from_mapping(resolved(recipe))
        assert again.data == recipe.data


@pytest.mark.parametrize(
    ("text", "head"),
    [
        (LABELLED.format("text: [a, b]"), "r.yaml:5:8: `text` goes with `label`; the column of plain text is `field`"),
        (LABELLED.format("text: a, label: a"), "r.yaml:5:8: `text` and `label` both name the column `a`"),
        (LABELLED.format("text: [a, a], label: b"), "r.yaml:5:45: `a` is named twice"),
        (LABELLED.format("text: [a, b, c], label: d"), "r.yaml:5:45: text: expected at most 2 entries, got a list"),
        (LABELLED.format("label: b, window: 64"), "r.yaml:5:8: `window` is not for labelled texts: each text is read whole"),
        (LABELLED.format("field: a, label: b"), "r.yaml:5:8: `field` is not for labelled texts: name the column with `text`"),
        ("data: {evaluation: {files: [text/valid.txt], label: b}}", "r.yaml:5:8: `label` names a column, and text/valid.txt has none"),
        (LABELLED.format("label: b") + "evaluate: [kl, perplexity]", "r.yaml:6:16: perplexity is measured on text without labels"),
        (LABELLED.format("label: b") + "gates: {bits_per_byte: {max: 1}}", "r.yaml:6:9: the gate bits_per_byte is measured on text without labels"),
        (LABELLED.format("field: a") + "gates: {accuracy: {min: 90%}}", "r.yaml:6:9: the gate accuracy is measured on text with labels"),
        (LABELLED.format("label: b") + "gates: {accuracy: {max: 1}}", "r.yaml:6:20: unknown key `max` in gates.accuracy"),
        (LABELLED.format("label: b") + "gates: {f1: {max_drop: 101}}", "r.yaml:6:24: max_drop: expected 100.0 or less, got 101"),
    ],
)  # fmt: skip
def test_load_recipe_refuses_bad_labelled_texts(heads: Heads, text: str, head: str) -> None:
    Path("dev.tsv").write_text("a\tb\nx\t0\n")
    assert heads(GOOD + text) == [head]


def test_load_recipe_fills_in_defaults_of_data_sets(work: Path) -> None:
    for name in ("chats.jsonl.zst", "ids.npy", "ids.safetensors"):
        (work / name).touch()
    text = f"{GOOD}data: {{training: {{files: [chats.jsonl.zst], field: messages}}, calibration: {{files: [%s]}}}}\n"
    expected = {"text/train.txt": (128, 256), "ids.npy": (None, None), "ids.safetensors": (None, None)}
    for file, sizes in expected.items():
        Path("r.yaml").write_text(text % file)
        recipe = load_recipe(Path("r.yaml"))
        assert recipe.data.training is not None
        assert recipe.data.training.field == "messages"
        section = recipe.data.calibration
        assert section is not None
        assert (section.field, section.mode, section.samples, section.length) == ("text", "packed", *sizes)
        assert recipe_from_mapping(resolved(recipe)) == recipe
    sets = ["data.calibration.field=ids", "data.calibration.samples=3"]
    Path("r.yaml").write_text(text % "ids.safetensors")
    section = load_recipe(Path("r.yaml"), sets).data.calibration
    assert section is not None
    assert (section.field, section.samples, section.length) == ("ids", 3, None)


def test_load_recipe_measures_latency_when_a_gate_needs_it(work: Path) -> None:
    Path("r.yaml").write_text(GOOD + "gates: {decode: {max_ratio: 0.9}, size: {max_ratio: 0.5}}\n")
    assert load_recipe(Path("r.yaml")).metrics == ("latency",)


def test_load_recipe_takes_empty_sections_as_absent(work: Path) -> None:
    Path("r.yaml").write_text(GOOD + "data:\ngates:\n")
    recipe = load_recipe(Path("r.yaml"))
    assert recipe.gates.given() == []
    assert recipe.data.training is None


def test_load_recipe_tells_every_mistake_at_once(problems: Heads) -> None:
    """The exact text of a recipe with many mistakes."""
    text = """\
# a recipe with many mistakes
model: ./models/tiyn
seed: "7"
stroe: compact
data:
  calibration: {files: [text/tran.txt], samples: 0}
  evaluation:
    files: text/valid.txt
    window: 64
    window: 128
passes:
  - prune_unstructured: {sparcity: 50%}
  - cast: {weights: bf61}
  - prun_structured: {layers: 2}
  - prune_structured:
  - cast:
    weights: fp16
  - prune_unstructured: {sparsity: 150%, pattern: 2:4}
evaluate: [bpb, kl]
gates:
  size: {max_ratio: -1}
  kl:
"""
    assert (
        "\n".join(problems(text))
        == """\
r.yaml: `output` is missing
   output: Folder to write. The run keeps its stages beside it, in `<output>.run`.
r.yaml:2:8: ./models/tiyn: there is no such folder
    2 | model: ./models/tiyn
      |        ^^^^^^^^^^^^^
   did you mean `models/tiny`?
r.yaml:3:7: seed: expected an integer, got '7'
    3 | seed: "7"
      |       ^^^
   write it without quotes, `_` or `,`
r.yaml:4:1: unknown key `stroe`
    4 | stroe: compact
      | ^^^^^
   did you mean `store`?
r.yaml:6:25: text/tran.txt: there is no such file
    6 |   calibration: {files: [text/tran.txt], samples: 0}
      |                         ^^^^^^^^^^^^^
   did you mean `text/train.txt`?
r.yaml:6:50: samples: expected 1 or more, got 0
    6 |   calibration: {files: [text/tran.txt], samples: 0}
      |                                                  ^
r.yaml:8:12: files: expected a list, got 'text/valid.txt'
    8 |     files: text/valid.txt
      |            ^^^^^^^^^^^^^^
   write [text/valid.txt]
r.yaml:10:5: duplicate key `window`
   10 |     window: 128
      |     ^^^^^^
   it stands in line 9 already: keep one
r.yaml:12:26: unknown key `sparcity` in prune_unstructured
   12 |   - prune_unstructured: {sparcity: 50%}
      |                          ^^^^^^^^
   expected one of: effort, method, sparsity, pattern, scope, allocation, reconstruction_epochs, reconstruction_lr, only, skip, allow_noop; did you mean `sparsity`?
r.yaml:13:21: weights: expected bf16, fp16, fp32, int8, int6, int5, int4, int3, int2, fp8, mxfp8, mxfp4, nvfp4, trellis4, trellis3 or trellis2, got 'bf61'
   13 |   - cast: {weights: bf61}
      |                     ^^^^
   did you mean `bf16`?
r.yaml:14:5: unknown pass `prun_structured`
   14 |   - prun_structured: {layers: 2}
      |     ^^^^^^^^^^^^^^^
   expected one of: PASSES; did you mean `prune_structured`?
r.yaml:15:5: give what to remove: `layers`, `active_experts`, `experts`, `hidden`, `heads`, `kv_heads`, `keep_kv_heads`, `mlp`, `keep_parameters`, `max_bytes`, `max_latency_ratio`
   15 |   - prune_structured:
      |     ^^^^^^^^^^^^^^^^
r.yaml:16:5: expected one pass, got `cast`, `weights`
   16 |   - cast:
      |     ^^^^^
   an entry is `- name: {settings}`; settings stand below the name, indented further than it
r.yaml:18:36: sparsity: expected a share between 0 and 1, such as 50% or 0.5, got '150%'
   18 |   - prune_unstructured: {sparsity: 150%, pattern: 2:4}
      |                                    ^^^^
r.yaml:19:12: expected bits_per_byte, perplexity, accuracy, repetition, f1, similarity, spearman, kl, agreement, latency, memory, throughput or lm_eval, got 'bpb'
   19 | evaluate: [bpb, kl]
      |            ^^^
   did you mean `bits_per_byte`?
r.yaml:21:21: max_ratio: expected a ratio above 0 and up to 2, such as 0.4 or 40%, got -1
   21 |   size: {max_ratio: -1}
      |                     ^^
r.yaml:22:3: a gate needs a bound: `max`
   22 |   kl:
      |   ^^""".replace("PASSES", ", ".join(passes.names()))
    )


@pytest.mark.parametrize(
    ("line", "head"),
    [
        ("seed: true", "r.yaml:5:7: seed: expected an integer, got true"),
        ("seed: 1.5", "r.yaml:5:7: seed: expected an integer, got 1.5"),
        ("seed: -1", "r.yaml:5:7: seed: expected 0 or more, got -1"),
        ("seed:", "r.yaml:5:1: seed: expected an integer, got nothing"),
        ("offline: yes", "r.yaml:5:10: offline: expected true or false, got 'yes'"),
        ("offline: 1", "r.yaml:5:10: offline: expected true or false, got 1"),
        ("document_separator: 3", "r.yaml:5:21: document_separator: expected text, got 3"),
        ("device: gpu", "r.yaml:5:9: device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("store: stok", "r.yaml:5:8: store: expected stock or compact, got 'stok'"),
        ("max_ram: 8 gigs", "r.yaml:5:10: max_ram: expected a size such as 500MB or 4GiB, got '8 gigs'"),
        ("confidence: 0.5", "r.yaml:5:13: confidence: expected a number above 0.5, got 0.5"),
        ("confidence: 1", "r.yaml:5:13: confidence: expected a number below 1.0, got 1"),
        ("bootstrap: 99", "r.yaml:5:12: bootstrap: expected 100 or more, got 99"),
        ("threads: 0", "r.yaml:5:10: threads: expected 1 or more, got 0"),
        ("evaluate: latency", "r.yaml:5:11: evaluate: expected a list, got 'latency'"),
        ("evaluate: [latency, latency]", "r.yaml:5:11: `latency` is named twice"),
        ("evaluate: [kl]", "r.yaml:5:12: kl needs evaluation text, and there is no `data.evaluation`"),
        (
            "gates: {kl: {max: 1}}",
            "r.yaml:5:9: the gate kl needs evaluation text, and there is no `data.evaluation`",
        ),
        ("gates: {size: {}}", "r.yaml:5:9: a gate needs a bound: `max` or `max_ratio`"),
        ("gates: {speed: {max: 1}}", "r.yaml:5:9: unknown key `speed` in gates"),
        ("gates: {size: {min: 1}}", "r.yaml:5:16: unknown key `min` in gates.size"),
        ("gates: [size]", "r.yaml:5:8: gates: expected a mapping, got a list"),
        ("data: {training: {files: []}}", "r.yaml:5:26: files: expected at least 1 entry, got an empty list"),
        ("data: {training: {}}", "r.yaml:5:8: give either `files` or `images`"),
        ("data: {training: {files: [text]}}", "r.yaml:5:27: text: is a folder, not a text file"),
        ("data: {training: {files: ['']}}", "r.yaml:5:27: expected text that is not empty, got ''"),
        ("data: [a]", "r.yaml:5:7: data: expected a mapping, got a list"),
        (
            "data: {training: {files: [models/x.bin]}}",
            "r.yaml:5:27: models/x.bin: is no .txt, .jsonl, .json, .csv, .tsv or .parquet file (`.bin`)",
        ),
        (
            "data: {evaluation: {files: [models/ids.npy]}}",
            "r.yaml:5:29: models/ids.npy: holds token ids, which only calibration takes",
        ),
        ("data: {training: {files: [text/train.txt], field: 3}}", "r.yaml:5:51: field: expected text, got 3"),
        (
            "data: {training: {files: [text/train.txt], field: body}}",
            "r.yaml:5:8: `field` names one of several, and text/train.txt has none",
        ),
        (
            "data: {calibration: {files: [models/ids.npy], field: body}}",
            "r.yaml:5:8: `field` names one of several, and models/ids.npy has none",
        ),
        (
            "data: {calibration: {files: [text/train.txt], mode: pad}}",
            "r.yaml:5:53: mode: expected packed or padded, got 'pad'",
        ),
        (
            "data: {calibration: {files: [text/train.txt], samples: null}}",
            "r.yaml:5:8: `samples` is a number where the data is text",
        ),
        (
            "data: {calibration: {files: [models/ids.npy, text/train.txt]}}",
            "r.yaml:5:8: token ids come from one file: name no other beside it",
        ),
        (
            "data: {calibration: {files: [models/ids.npy], mode: padded}}",
            "r.yaml:5:8: token ids are used unchanged: leave out `mode`",
        ),
        ("data: {calibration: {files: [models/ids.npy], length: 0}}", "r.yaml:5:55: length: expected 1 or more, got 0"),
        (
            "data: {evaluation: {files: [text/valid.txt], mode: padded}}",
            "r.yaml:5:46: unknown key `mode` in data.evaluation",
        ),
        (
            "data: {evaluation: {files: [text/valid.txt], window: 8, stride: 9}}",
            "r.yaml:5:8: a stride of 9 would skip text, as the window is 8 tokens",
        ),
        ("modle: x", "r.yaml:5:1: unknown key `modle`"),
        ("seed: 1\nseed: 2", "r.yaml:6:1: duplicate key `seed`"),
    ],
)
def test_load_recipe_tells_single_mistakes(heads: Heads, work: Path, line: str, head: str) -> None:
    for name in ("x.bin", "ids.npy"):
        (work / "models" / name).touch()
    assert heads(f"{GOOD}{line}\n") == [head]


@pytest.mark.parametrize(
    ("entry", "head"),
    [
        ("cast: {weights: 16}", "r.yaml:4:21: weights: expected bf16, fp16, fp32, int8, int6, int5, int4, int3, int2, fp8, mxfp8, mxfp4, nvfp4, trellis4, trellis3 or trellis2, got 16"),
        ("cast", "r.yaml:4:5: give one of `scheme`, `weights`, `bits` and `max_bytes`"),
        ("cast:", "r.yaml:4:5: give one of `scheme`, `weights`, `bits` and `max_bytes`"),
        ("cast: fp16", "r.yaml:4:5: cast: expected a mapping of settings, got 'fp16'"),
        ("[cast]", "r.yaml:4:5: expected a pass, as `name: {settings}`"),
        ("3", "r.yaml:4:5: expected a pass, as `name: {settings}`"),
        ("{}", "r.yaml:4:5: expected one pass, got none"),
        ("quantize", "r.yaml:4:5: unknown pass `quantize`"),
        ("cast: {weights: fp16, only: x}", "r.yaml:4:33: only: expected a list, got 'x'"),
        ("cast: {weights: fp16, overrides: {a: x}}", "r.yaml:4:42: a: expected bf16, fp16, fp32, int8, int6, int5, int4, int3, int2, fp8, mxfp8, mxfp4, nvfp4, trellis4, trellis3 or trellis2, got 'x'"),
        ("cast: {weights: fp16, allow_noop: 1}", "r.yaml:4:39: allow_noop: expected true or false, got 1"),
        ("prune_structured: {layers: 0}", "r.yaml:4:32: layers: expected a count such as 2, a share such as 25%, or a list of block numbers, got 0"),
        ("prune_structured: {layers: [1, a]}", "r.yaml:4:32: expected a list of block numbers from 0 up"),
        ("prune_structured: {layers: [1, 1]}", "r.yaml:4:32: a block is named twice"),
        ("prune_structured: {layers: 2}", "r.yaml:4:5: prune_structured needs calibration text, and there is no `data.calibration`"),
        ("prune_unstructured", "r.yaml:4:5: give either `sparsity` or `pattern`"),
        ("prune_unstructured: {sparsity: 0.5, pattern: 2:4}", "r.yaml:4:5: give either `sparsity` or `pattern`"),
        ("prune_unstructured: {pattern: 4:2}", "r.yaml:4:35: pattern: expected an N:M pattern that keeps N of M weights with 0 < N < M, got '4:2'"),
    ],
)  # fmt: skip
def test_load_recipe_tells_mistakes_in_passes(heads: Heads, entry: str, head: str) -> None:
    assert heads(f"model: m\noutput: o\npasses:\n  - {entry}\n") == [head]


def test_load_recipe_needs_a_list_of_passes(heads: Heads) -> None:
    top = "model: m\noutput: o\n"
    assert heads(f"{top}passes: []\n") == ["r.yaml:3:9: passes: expected at least 1 entry, got an empty list"]
    assert heads(f"{top}passes: {{cast: {{weights: fp16}}}}\n") == [
        "r.yaml:3:9: passes: expected a list, got a mapping"
    ]
    assert heads(top) == ["r.yaml: `passes` is missing"]


def test_load_recipe_needs_no_data_when_blocks_are_named(work: Path) -> None:
    Path("r.yaml").write_text("model: m\noutput: o\npasses:\n  - prune_structured: {layers: [2], compensation: none}\n")
    assert load_recipe(Path("r.yaml")).passes[0].name == "prune_structured"


@pytest.mark.parametrize(
    ("model", "wrong"),
    [
        ("gpt2", None),
        ("org/name", None),
        ("org/name@v1.0", None),
        ("models/tiny", None),
        ("./models/tiny", None),
        ("./gone", "./gone: there is no such folder"),
        ("../gone", "../gone: there is no such folder"),
        ("/gone/away", "/gone/away: there is no such folder"),
        ("~/gone-away-model", "~/gone-away-model: there is no such folder"),
        ("a/b/c", "a/b/c: there is no such folder"),
        ("models/gone", "models/gone: there is no such folder"),
        ("text/train.txt", "text/train.txt: is a file, not a checkpoint's folder"),
    ],
)
def test_load_recipe_takes_folders_and_hub_ids_as_models(
    heads: Heads, work: Path, model: str, wrong: str | None
) -> None:
    text = GOOD.replace("tiny-lm", model)
    if wrong is None:
        Path("r.yaml").write_text(text)
        assert load_recipe(Path("r.yaml")).model == model
    else:
        assert heads(text) == [f"r.yaml:1:8: {wrong}"]


def test_load_recipe_skips_files_when_check_files_is_off(work: Path) -> None:
    Path("r.yaml").write_text(GOOD.replace("tiny-lm", "./gone") + "data: {training: {files: [gone.txt]}}\n")
    assert load_recipe(Path("r.yaml"), check_files=False).model == "./gone"


def test_load_recipe_tells_a_mistake_behind_an_anchor_once(heads: Heads) -> None:
    text = f"{GOOD}data:\n  training: &t\n    files: [gone.txt]\n  evaluation: *t\n"
    assert heads(text) == ["r.yaml:7:13: gone.txt: there is no such file"]


# --- extends


def test_extends_merges_mappings_and_replaces_lists(work: Path) -> None:
    Path("base").mkdir()
    Path("base/root.yaml").write_text(f"{GOOD}seed: 1\ndtype: float16\ngates: {{size: {{max: 1MB}}}}\n")
    Path("base/mid.yaml").write_text("extends: root.yaml\nseed: 2\ngates: {size: {max_ratio: 0.5}}\n")
    Path("r.yaml").write_text("extends: base/mid.yaml\npasses:\n  - cast: {weights: fp16}\n")
    recipe = load_recipe(Path("r.yaml"))
    assert (recipe.seed, recipe.dtype) == (2, "float16")
    assert recipe.gates.size is not None
    assert (recipe.gates.size.max, recipe.gates.size.max_ratio) == (1_000_000, 0.5)
    assert [entry.settings for entry in recipe.passes] == [CastSettings(weights="fp16")]


def test_extends_null_removes_a_section_of_the_base(work: Path) -> None:
    Path("base.yaml").write_text(f"{GOOD}gates: {{size: {{max: 1MB}}}}\n")
    Path("r.yaml").write_text("extends: base.yaml\ngates:\n")
    assert load_recipe(Path("r.yaml")).gates.given() == []


def test_extends_mistakes_name_their_file(problems: Heads) -> None:
    Path("base.yaml").write_text(f"{GOOD}sede: 1\ngates: {{size: {{max: tiny}}}}\n")
    assert problems("extends: base.yaml\nstroe: stock\n") == [
        "r.yaml:2:1: unknown key `stroe`\n    2 | stroe: stock\n      | ^^^^^\n   did you mean `store`?",
        "base.yaml:5:1: unknown key `sede`\n    5 | sede: 1\n      | ^^^^\n   did you mean `seed`?",
        "base.yaml:6:21: max: expected a size such as 500MB or 4GiB, got 'tiny'\n    6 | gates: {size: {max: tiny}}\n"
        "      |                     ^^^^",
    ]


def test_extends_shows_no_line_of_other_files(heads: Heads) -> None:
    Path("id_rsa").write_text("SECRET\n")
    found = heads("extends: ./id_rsa\n")
    assert found == ["r.yaml:1:10: `extends` expects a recipe, whose name ends in .yaml, .yml, .json; id_rsa does not"]


def test_extends_refuses_unreadable_files(heads: Heads) -> None:
    assert heads("extends: gone.yaml\nsede: 1\n") == [
        "r.yaml:1:10: gone.yaml: there is no such file",
        "r.yaml:2:1: unknown key `sede`",
    ]
    assert heads("extends: [a, b]\n") == ["r.yaml:1:10: `extends` expects the path of one recipe"]
    assert heads("extends:\n") == ["r.yaml:1:1: `extends` expects the path of one recipe"]
    assert heads("extends: r.yaml\n") == ["r.yaml:1:10: `extends` leads back to itself: r.yaml ▶ r.yaml"]
    Path("b.yaml").write_text("extends: c.yaml\n")
    Path("c.yaml").write_text("extends: ./b.yaml\n")
    assert heads("extends: b.yaml\n") == ["c.yaml:1:10: `extends` leads back to itself: b.yaml ▶ c.yaml ▶ b.yaml"]
    Path("b.yaml").write_text("a: [")
    assert heads("extends: b.yaml\n")[0].startswith("b.yaml:1:5: not valid YAML")


# --- locate, mappings, imports


def test_locate_places_errors_of_a_plan(work: Path) -> None:
    Path("r.yaml").write_text(GOOD)
    error = PassError("every weight is bf16 already", key="weights", fix="leave the pass out")
    source = load_recipe(Path("r.yaml")).source
    assert locate(source, ("passes", 0, "cast", "weights"), error).render() == (
        "r.yaml:4:21: every weight is bf16 already\n    4 |   - cast: {weights: bf16}\n"
        "      |                     ^^^^\n   leave the pass out"
    )
    assert locate(source, ("passes", 0, "cast", "only"), error).render().startswith("r.yaml:4:5: every")
    assert locate(None, ("passes", 0, "cast", "weights"), error).render() == (
        "passes.0.cast.weights: every weight is bf16 already\n   leave the pass out"
    )
    changed = load_recipe(Path("r.yaml"), ["passes.0.cast.weights=fp16"]).source
    assert (
        locate(changed, ("passes", 0, "cast", "weights"), error)
        .render()
        .startswith("--set passes.0.cast.weights=fp16: every")
    )


def test_recipe_from_mapping_takes_mappings(work: Path) -> None:
    recipe = recipe_from_mapping(
        {
            "model": Path("models/tiny"),
            "output": "out",
            "data": {"calibration": {"files": ("text/train.txt",)}},
            "passes": [
                {"prune_structured": {"layers": 0.25}},
                {"prune_unstructured": PruneUnstructuredSettings(pattern=Pattern(2, 4))},
                {"cast": {"weights": "fp16"}},
            ],
            "gates": {"size": {"max_ratio": 0.5}},
        },
        ["seed=5"],
    )
    assert isinstance(recipe, Recipe)
    assert recipe.model == "models/tiny"
    assert recipe.seed == 5
    assert [entry.settings for entry in recipe.passes] == [
        PruneStructuredSettings(layers=0.25),
        PruneUnstructuredSettings(pattern=Pattern(2, 4)),
        CastSettings(weights="fp16"),
    ]


def test_hints_list_gates_as_the_reference_does(problems: Heads) -> None:
    (problem,) = problems(GOOD + "gates: {zzz: {max: 1GB}}\n")
    assert "expected one of: size, parameters, bits_per_byte, perplexity, " in problem


def test_api_reads_sets_over_a_mapping(work: Path) -> None:
    mapping = {"model": "models/tiny", "output": "out", "passes": [{"cast": {"weights": "fp16"}}]}
    recipe = read_recipe(mapping, ["passes.0.cast.weights=bf16"])
    assert [entry.settings for entry in recipe.passes] == [CastSettings(weights="bf16")]
    assert mapping["passes"] == [{"cast": {"weights": "fp16"}}]
    with pytest.raises(RecipeError, match=r"^--set sede=1: unknown key `sede`\n.*did you mean `seed`"):
        read_recipe(mapping, ["sede=1"])


def test_recipe_from_mapping_locates_mistakes_by_keys(work: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(
            {
                "model": "m",
                "seed": float("nan"),
                "threads": "2",
                "passes": [{"cast": {"wieghts": "fp16"}}, {"cast": {"weights": 16}}, {"cast": {"weights": {1, 2}}}],
                "gates": {"kl": {"max": 1}},
            }
        )
    assert sorted(problem.splitlines()[0] for problem in caught.value.problems) == [
        "gates.kl: the gate kl needs evaluation text, and there is no `data.evaluation`",
        "output: `output` is missing",
        "passes.0.cast.wieghts: unknown key `wieghts` in cast",
        "passes.1.cast.weights: weights: expected bf16, fp16, fp32, int8, int6, int5, int4, int3, int2, fp8, mxfp8, mxfp4, nvfp4, trellis4, trellis3 or trellis2, got 16",
        "passes.2.cast.weights: expected a plain value (text, number, list, mapping), got set",
        "passes.2: give one of `scheme`, `weights`, `bits` and `max_bytes`",
        "seed: nan is not a finite number",
        "seed: seed: expected an integer, got nan",
        "threads: threads: expected an integer, got '2'",
    ]


@pytest.mark.slow
def test_load_recipe_imports_nothing_heavy(work: Path) -> None:
    Path("r.yaml").write_text(FULL)
    code = (
        "import sys; from pathlib import Path; import compress.recipe as r;"
        "assert 'pydantic' not in sys.modules;"
        "one = r.load_recipe(Path('r.yaml')); r.to_yaml(r.resolved(one)); r.recipe_schema();"
        "print([m for m in ('torch', 'transformers', 'numpy', 'huggingface_hub', 'safetensors') if m in sys.modules])"
    )
    root = Path(compress.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(root)}, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_load_recipe_imports_only_named_passes(work: Path) -> None:
    Path("r.yaml").write_text(GOOD)
    code = (
        "import sys; from pathlib import Path; from compress.recipe import load_recipe; load_recipe(Path('r.yaml'));"
        "from compress import passes; print(sorted({m.split('.')[2] for m in sys.modules if m.count('.') > 1}"
        " & set(passes.TABLE)))"
    )
    root = Path(compress.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(root)}, check=False
    )
    assert (done.stdout, done.stderr) == ("['cast']\n", "")


def test_load_recipe_counts_mistakes_beyond_the_first(tmp_path):
    (tmp_path / "r.yaml").write_text("".join(f"key_{i}: 1\n" for i in range(80)))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    said = str(caught.value)
    assert len(caught.value.problems) == 50
    assert f"… and {caught.value.count - 50} more\n{caught.value.count} mistakes in the recipe" in said
    assert caught.value.count >= 80
    assert len(said.splitlines()) < 250
