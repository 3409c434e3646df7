"""Configs, tables and sidecars of wrong types, and sizes that the files do not have: one line, status 2, and no memory taken."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from safetensors.torch import load_file, save_file

from compress import api
from compress.checkpoint.layout import METADATA_KEY, natural
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.errors import CheckpointError
from tests import pico
from tests.toolbox import edit_config, entry, raw


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


FIELDS = {
    "architectures a number": ({"architectures": 3}, "`architectures` is 3, not a list of class names"),
    "architectures an object": ({"architectures": {"0": "x"}}, "`architectures` is {'0': 'x'}, not a list"),
    "architectures of numbers": ({"architectures": [3]}, r"`architectures` is \[3\], not a list of class names"),
    "quantization_config a list": ({"quantization_config": [1]}, r"`quantization_config` is \[1\], not an object"),
    "quantization_config a text": ({"quantization_config": "x"}, "`quantization_config` is 'x', not an object"),
    "a cache's scheme": (
        {"quantization_config": {"kv_cache_scheme": "x"}},
        r"`quantization_config.kv_cache_scheme` is 'x', not an object",
    ),
    "groups a list": (
        {"quantization_config": {"config_groups": [1]}},
        r"`quantization_config.config_groups` is \[1\], not an object",
    ),
    "a group's bits": (
        {"quantization_config": {"config_groups": {"g": {"weights": {"num_bits": "x"}}}}},
        r"`quantization_config.config_groups.g.num_bits` is 'x', not a number of bits",
    ),
    "a group's targets": (
        {"quantization_config": {"config_groups": {"g": {"targets": [3]}}}},
        r"`quantization_config.config_groups.g.targets` is \[3\], not a list of names",
    ),
    "tie_word_embeddings a text": ({"tie_word_embeddings": "no"}, "`tie_word_embeddings` is 'no', not true or false"),
    "vocab_size a list": ({"vocab_size": [1]}, r"`vocab_size` is \[1\], not a number of tokens"),
    "rope_scaling a number": ({"rope_scaling": 3}, "`rope_scaling` is 3, not an object"),
    "head_dim an object": ({"head_dim": {"a": 1}}, "config.json has no usable `head_dim`"),
    "key heads a text": ({"num_key_value_heads": "{{ x }}"}, "config.json has no usable `num_key_value_heads`"),
    "heads true": ({"num_attention_heads": True}, "config.json has no usable `num_attention_heads`"),
    "deep": ({"x": nested(500)}, r"`x\.0\.0` is nested more than 64 levels deep"),
    "half a surrogate": ({"x": ["\ud800"]}, r"`x\.0` holds half a surrogate pair"),
    "half a surrogate in a key": ({"\udfff": 1}, r"`\\udfff` holds half a surrogate pair"),
    "a huge number": ({"x": 10**400}, "`x` is a number with 401 digits"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_open_headers_refuses_fields_of_wrong_types(case, folder):
    changes, message = FIELDS[case]
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_headers(folder)
    assert "\n" not in str(caught.value)


CLAIMS = {
    "layers": (
        "llama",
        {"num_hidden_layers": 10**9},
        "`num_hidden_layers` is 1000000000, but the files have 39 tensors",
    ),
    "a few more layers": ("llama", {"num_hidden_layers": 30}, "block 4: the weights hold none"),
    "labels": ("bert", {"num_labels": 10**9}, "`num_labels` is 1000000000, but no tensor has as many rows"),
    "groups of layers": (
        "albert",
        {"num_hidden_layers": 10**9},
        "`num_hidden_layers` is 1000000000, but the files have",
    ),
    "experts": ("mixtral", {"num_local_experts": 10**9}, "`num_local_experts` is 1000000000, but the files have"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_open_headers_checks_sizes_of_config_against_headers(case, tmp_path):
    """Before: 9 GB for the layers, no end for the labels."""
    family, changes, message = CLAIMS[case]
    shutil.copytree(pico.folder(family), tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        open_headers(tmp_path / "model")
    assert time.process_time() - start < 2


@pytest.fixture(scope="module")
def masked(tmp_path_factory, pico_llama):
    out = tmp_path_factory.mktemp("masked") / "out"
    return api.apply("prune_unstructured", pico_llama, out, method="magnitude", sparsity=0.6, store="compact")


@pytest.fixture(scope="module")
def coded(tmp_path_factory, pico_llama):
    return api.apply(
        "cast", pico_llama, tmp_path_factory.mktemp("coded") / "out", weights="int4", group_size=16, method="rtn"
    )


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("masked", {"kept": "x"}), ("masked", {"kept": 1.0}), ("masked", {"kept": -1}), ("masked", {"kept": 10**12}), ("masked", {"kept": True}),
        ("masked", {"shape": [2048.0]}), ("masked", {"shape": "ab"}), ("masked", {"storage": "mask"}), ("coded", {"shape": [512]}), ("coded", {"shape": [512, 1, 1]}),
        ("coded", {"grid": {"bits": True}}), ("coded", {"grid": {"group": "x"}}), ("coded", {"grid": {"group": -16}}), ("coded", {"grid": {"group": 7}}), ("coded", {"grid": {"symmetric": 1}}),
        ("coded", {"grid": {"activations": "x"}}), ("coded", {"grid": {"format": ["int4"]}}), ("coded", {"grid": []}), ("coded", {"grid": {"format": "mxfp4", "group": 32, "symmetric": False}}), ("coded", {"dtype": "I64"}), ("coded", {"storage": ["float-quantized"]}),
    ],
    ids=str,
)  # fmt: skip
def test_open_headers_refuses_damaged_tensor_table(kind, change, request, tmp_path):
    source = request.getfixturevalue(kind)
    shutil.copytree(source, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    metadata = dict(open_checkpoint(source).metadata)
    length = int.from_bytes(weights.read_bytes()[:8], "little")
    table = json.loads(json.loads(weights.read_bytes()[8 : 8 + length])["__metadata__"][METADATA_KEY])
    row = table[next(name for name, row in table.items() if row["storage"] != ["dense"])]
    row |= {k: {**row["grid"], **v} if isinstance(v, dict) else v for k, v in change.items()}
    save_file(load_file(weights), weights, {**metadata, METADATA_KEY: json.dumps(table)})
    with pytest.raises(CheckpointError, match=r"has a damaged table|does not match the metadata|cannot read"):
        open_headers(tmp_path / "model")


def test_open_checkpoint_reads_quantization_from_base_config_only(pico_llama, tmp_path):
    """What else stands beside the base is nobody's."""
    api.apply("prune_unstructured", pico_llama, tmp_path / "out", method="magnitude", sparsity=0.6, store="compact")
    sound = open_checkpoint(tmp_path / "out").spec
    edit_config(tmp_path / "out", quantization_config={"quant_method": "gptq"}, num_labels="x")
    assert open_checkpoint(tmp_path / "out").spec == sound


def test_open_headers_refuses_names_that_are_no_text(folder):
    (folder / "model.safetensors").write_bytes(
        raw(b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234")
    )
    with pytest.raises(CheckpointError, match=r"has half a surrogate pair, which is not text, in \\ud800"):
        open_headers(folder)


def test_open_headers_takes_names_with_huge_numbers(folder):
    names = ["model.layers." + "9" * 5000 + ".x", "model.layers.00.x", "²", "٣"]
    table = {name: entry(4 * i, 4 * i + 4, [1]) for i, name in enumerate(names)}
    (folder / "model.safetensors").write_bytes(raw(table, b"1234" * len(names)))
    with pytest.raises(CheckpointError, match="block 0: the weights hold none"):
        open_headers(folder)
    assert sorted(names, key=natural) != names
    assert sorted(["b10", "b9", "b09", "b1.2", "b1.10"], key=natural) == ["b1.2", "b1.10", "b09", "b9", "b10"]
