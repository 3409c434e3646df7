"""A single weight file beside a shard index: what is read is what stock loaders read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.open import open_checkpoint, open_headers
from compress.errors import CheckpointError
from compress.inspection import inspect
from tests import pico

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards and their index; read only."""
    return pico.save(tmp_path_factory.mktemp("files") / "shards", max_shard_size="60KB", seed=1)


@pytest.fixture
def both(shards, tmp_path):
    """The shards, and one file with the same tensors."""
    folder = Path(shutil.copytree(shards, tmp_path / "both"))
    state = {k: v for path in sorted(folder.glob("model-*")) for k, v in load_file(path).items()}
    save_file(state, folder / SINGLE, {"format": "pt"})
    return folder


def change(folder: Path, name: str, values) -> None:
    state = load_file(folder / SINGLE)
    state[name] = values(state[name])
    save_file(state, folder / SINGLE, {"format": "pt"})


def stock_logits(folder: Path) -> torch.Tensor:
    return pico.logits(transformers.AutoModelForCausalLM.from_pretrained(folder))


def test_open_headers_reads_copied_weights_with_a_note(both, tmp_path):
    notes = (f"{SINGLE} is read, as stock loaders do, not the shards of {INDEX} beside it",)
    assert open_checkpoint(both).files == (SINGLE,)
    assert open_headers(both)[0].notes == notes
    assert inspect(both)["notes"] == [*notes]
    out = compress.apply("cast", both, tmp_path / "out", weights="bf16")
    assert not list(out.glob("model-*"))
    assert not (out / INDEX).exists()
    assert torch.equal(pico.logits(compress.load(both)), stock_logits(both))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lm_head.weight", lambda value: value + 1),
        ("lm_head.weight", lambda value: torch.cat([value[:-1], value[-1:] + 1])),
        ("model.norm.weight", lambda value: value.bfloat16()),
        ("model.norm.weight", lambda value: value[:-1].clone()),
    ],
)
def test_open_headers_refuses_two_models_in_one_folder(both, name, values):
    change(both, name, values)
    for use in (open_headers, open_checkpoint, compress.load, inspect):
        with pytest.raises(CheckpointError) as caught:
            use(both)
        assert str(caught.value) == (
            f"{both}: holds two models: {SINGLE}, and other weights in the shards of {INDEX} ({name} differs); "
            "remove the one that you do not mean"
        )


@pytest.mark.parametrize("left", ["nothing", "one shard", "a broken shard", "no JSON", "an index of the single file"])
def test_open_headers_ignores_a_stale_index(both, left, tmp_path):
    paths = sorted(both.glob("model-*"))
    if left == "nothing":
        for path in paths:
            path.unlink()
    elif left == "one shard":
        paths[0].unlink()
    elif left == "a broken shard":
        paths[0].write_bytes(b"{}")
    elif left == "no JSON":
        (both / INDEX).write_text("{")
    else:
        (both / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(both / SINGLE), SINGLE)}))
    change(both, "lm_head.weight", lambda value: value + 1)
    before = stock_logits(both)
    assert torch.equal(pico.logits(compress.load(both)), before)
    recipe = {"model": str(both), "output": str(tmp_path / "out"), "passes": [{"cast": {"weights": "fp16"}}]}
    result = compress.run(recipe)
    assert f"{INDEX} is not read: {SINGLE} beside it holds the weights" in result.report["notes"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors*")) == [SINGLE]
    assert result.report["original"]["size"]["bytes"] == (both / SINGLE).stat().st_size
    assert float((stock_logits(tmp_path / "out").float() - before).abs().max()) < 0.1 * float(before.abs().max())


def test_open_headers_refuses_config_that_names_another_file(both):
    config = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(
        CheckpointError, match=r"has `transformers_weights`: 'other.safetensors', which is not supported"
    ):
        open_headers(both)
