"""Damaged checkpoints are refused in one line; links of a hub cache are followed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.open import open_checkpoint, open_headers
from compress.errors import CheckpointError
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import edit_config, entry, raw

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    return pico.save(tmp_path / "sharded", max_shard_size="60KB")


FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"is empty \(0 bytes\); copy or download it again"),
    "seven bytes": (b"1234567", "is not a safetensors file: it has only 7 bytes"),
    "oversized header": ((1 << 40).to_bytes(8, "little") + b"{}", "its header would have 1099511627776 bytes"),
    "header beyond the end": (
        (500).to_bytes(8, "little") + b"{}",
        "is truncated: the header has 500 bytes, the file 10",
    ),
    "not JSON": (raw(b"{nonsense"), "has a damaged header"),
    "a list": (raw([]), "has a header that is not a JSON object"),
    "deep nesting": (raw(b"[" * 100_000), "has a damaged header"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "has a damaged header"),
    "truncated data": (
        raw({"a": entry(0, 8, [2])}, b"1234"),
        "is truncated: tensor a ends 4 bytes after the end of the file",
    ),
    "overlap": (raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"1" * 12), "tensors a and b overlap"),
    "hole": (raw({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1" * 12), "has a gap of 4 bytes before tensor b"),
    "trailing bytes": (raw({"a": entry(0, 4, [1])}, b"1" * 9), "has 5 bytes after its last tensor"),
    "wrong length": (raw({"a": entry(0, 4, [2])}, b"1" * 4), r"tensor a of shape \[2\] and dtype F32 needs 8 bytes"),
    "unknown dtype": (raw({"a": entry(0, 4, [1], "Q7")}, b"1" * 4), "tensor a has the unknown dtype Q7"),
    "negative shape": (raw({"a": entry(0, 4, [-1])}, b"1" * 4), "tensor a has a damaged header entry"),
    "entry is a number": (raw({"a": 1}), "tensor a has a damaged header entry"),
    "duplicate key": (raw(b'{"a": 1, "a": 2}'), "the key `a` is there twice"),
    "metadata of numbers": (raw({"__metadata__": {"x": 1}}), "has metadata values that are not strings"),
    "no tensor": (raw({}), "has no tensors"),
}


@pytest.mark.parametrize("case", FILES)
def test_open_headers_refuses_damaged_weight_files(case, folder):
    data, message = FILES[case]
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_headers(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_open_headers_refuses_truncated_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: is truncated: tensor .* ends 10 bytes after"):
        open_headers(sharded)


def test_open_headers_refuses_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names the file {shard.name}, which is missing"):
        open_headers(sharded)


def index_with(sharded: Path, change: Callable[[dict], None]) -> None:
    data = json.loads((sharded / INDEX).read_text())
    change(data["weight_map"])
    (sharded / INDEX).write_text(json.dumps(data))


def test_open_headers_refuses_index_that_names_a_missing_tensor(sharded):
    index_with(sharded, lambda names: names.update(ghost=next(iter(names.values()))))
    with pytest.raises(CheckpointError, match=r"puts tensor ghost in model-.*, which does not hold it"):
        open_headers(sharded)


def test_open_headers_refuses_index_that_leaves_out_a_tensor(sharded):
    index_with(sharded, lambda names: names.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks tensor model.norm.weight"):
        open_headers(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "a\\b"])
def test_open_headers_refuses_index_that_leads_out_of_the_folder(name, sharded):
    index_with(sharded, lambda names: names.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match=r"is outside the folder"):
        open_headers(sharded)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"{"])
def test_open_headers_refuses_damaged_index(data, sharded):
    (sharded / INDEX).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not JSON|has no `weight_map`"):
        open_headers(sharded)


def test_open_headers_refuses_links_that_leave_the_folder(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"notes.txt: is a symbolic link to .*secret, outside the checkpoint"):
        open_checkpoint(folder)
    (folder / "notes.txt").unlink()
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"is a symbolic link to"):
        open_headers(folder)


def test_open_headers_refuses_broken_links(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"is a broken symbolic link"):
        open_headers(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)
    with pytest.raises(CheckpointError, match=r"is a broken symbolic link"):
        open_headers(folder)


def test_open_checkpoint_follows_links_of_a_hub_cache(folder, tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    blobs = tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert open_checkpoint(snapshot).spec == open_checkpoint(folder).spec


@pytest.mark.slow
def test_open_headers_refuses_pickles_and_names_the_conversion(folder, tmp_path, stock):
    model = load_model(folder)
    (folder / WEIGHTS).unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"in a pickle") as caught:
        open_headers(folder)
    import subprocess
    import sys

    command = str(caught.value).partition("convert it with: python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, capture_output=True)
    converted = load_model(f"{folder}-safetensors")
    assert torch.equal(pico.logits(converted), pico.logits(model))


def test_open_headers_refuses_bad_configs(folder):
    edit_config(folder, model_type=...)
    with pytest.raises(CheckpointError, match=r"has no `model_type`"):
        open_headers(folder)
    edit_config(folder, model_type="llama", auto_map={"AutoModel": "custom.Model"})
    with pytest.raises(
        CheckpointError, match=r"needs Python code that the checkpoint brings \(`auto_map`\); if you trust it"
    ):
        open_headers(folder)
    assert open_headers(folder, trust_remote_code=True)[0].parameters > 0
    for data, message in (
        (b"[]", "is not a JSON object"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
    ):
        (folder / "config.json").write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            open_headers(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_headers(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"merge it into its base model first"):
        open_headers(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 5}, "config and weights disagree: block 4: the weights hold none"),
        ({"num_hidden_layers": 3}, "config and weights disagree: block 3: the config says 3"),
        (
            {"vocab_size": 299},
            "config and weights disagree: model.embed_tokens.weight has 300 rows, the config says vocab_size 299",
        ),
        ({"hidden_size": "wide"}, "config.json has no usable `hidden_size`"),
        ({"num_attention_heads": 0}, "config.json has no usable `num_attention_heads`"),
    ],
)
def test_open_headers_refuses_weights_that_disagree_with_config(changes, message, folder):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_headers(folder)


def test_open_headers_refuses_folder_without_weights(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"there is no such folder"):
        open_headers(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is a file, not a checkpoint folder"):
        open_headers(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"has other.safetensors, but no model.safetensors"):
        open_headers(folder)
    (folder / "other.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights"):
        open_headers(folder)


def test_open_checkpoint_refuses_tampered_mask(folder, tmp_path):
    from tests.toolbox import apply, write

    out = write(
        apply(open_checkpoint(folder), "prune_unstructured", method="magnitude", sparsity=0.5), tmp_path / "out"
    )
    tensors = load_file(out.folder / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"].fill_(1)
    from safetensors import safe_open

    with safe_open(out.folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, out.folder / WEIGHTS, metadata)
    with pytest.raises(CheckpointError, match=r"keeps 2048 weights, but its metadata says 1024"):
        open_checkpoint(out.folder).tensor("model.layers.0.mlp.up_proj.weight")


def test_open_headers_refuses_newer_format(folder, tmp_path):
    from tests.toolbox import apply, write

    out = write(
        apply(open_checkpoint(folder), "prune_unstructured", method="magnitude", sparsity=0.6),
        tmp_path / "out",
        store="compact",
    )
    edit_config(out.folder, format=2)
    with pytest.raises(
        CheckpointError, match=r"has the compact format 2; this version reads format 1; update compress"
    ):
        open_headers(out.folder)
