"""Key and value heads merged: nothing changes where they are alike already, and repair makes up for what does."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from compress import architectures
from compress.architectures import resize
from compress.checkpoint.layout import lay_out
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from tests import pico, processes
from tests.passes.prune_structured.test_block import IDS, error
from tests.passes.prune_structured.test_remove import FIXED_HEADS, RMS, SCRIPT
from tests.toolbox import apply, plan, write

NORMED = ("qwen3", "gemma3_text", "qwen3_moe")
WAYS = {
    "mean": {"importance": "magnitude", "compensation": "none"},
    "aligned": {"compensation": "none"},
    "least squares": {"compensation": "least_squares"},
}


#: Families in which heads are merged at every commit.
TIER = [family for family in RMS if family in pico.TIER]


def merged(original, folder, **settings):
    work = folder.with_name(f"{folder.name}-work")
    return write(apply(original, "prune_structured", data=Batches(IDS), work=work, **settings), folder)


def alike(folder, family: str, turned: bool):
    """Four heads of which each two are equal, or equal but for rotations that whatever reads them undoes."""
    base = open_checkpoint(pico.save(folder / "base", family, with_tokenizer=False, num_key_value_heads=4))
    record = architectures.of(base.spec.structure.config)
    found = resize.merges(base.spec, 2)
    width = record.head_dim(base.spec.structure.config)
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double())[0]
    angle = torch.linspace(0.5, 2.5, width // 2).double()
    pairs = torch.eye(width, dtype=torch.float64)
    half = width // 2
    pairs[:half, :half] = pairs[half:, half:] = angle.cos().diag()
    pairs[half:, :half], pairs[:half, half:] = angle.sin().diag(), -angle.sin().diag()

    def read(name: str) -> Value:
        data = base.tensor(name).data.double()
        module = name.rpartition(".")[0]
        for one in found.values():
            for member in (one.key, one.value):
                if member.module == module:
                    heads = data[member.span(4).start : member.span(4).stop].unflatten(0, (4, width))
                    heads[1::2] = heads[::2]
                    if turned and member is one.value:
                        heads[1::2] = torch.einsum("de,ge...->gd...", turn, heads[1::2])
                    if turned and member is one.key and family not in NORMED:
                        heads[1::2] = torch.einsum("de,ge...->gd...", pairs, heads[1::2])
            if turned and module == one.query.module and family not in NORMED:
                heads = data[one.query.span(4).start : one.query.span(4).stop].unflatten(0, (4, width))
                heads[1::2] = torch.einsum("de,ge...->gd...", pairs, heads[1::2])
            if turned and module == one.output.module:
                heads = data.T.unflatten(0, (4, width))
                heads[1::2] = torch.einsum("de,ge...->gd...", turn, heads[1::2])
        return Value(data.float())

    return write(Derived(base, base.spec, read), folder / f"alike{turned}")


@pytest.mark.parametrize(
    ("way", "family"),
    [
        *(pytest.param(way, "llama", id=f"{way}-llama") for way in WAYS),
        *(
            pytest.param(way, family, marks=pytest.mark.slow)
            for way, family in itertools.product(WAYS, RMS)
            if family != "llama"
        ),
    ],
)
def test_kv_heads_merge_of_equal_heads_is_exact(family, way, tmp_path):
    original = alike(tmp_path, family, turned=False)
    out = merged(original, tmp_path / "out", keep_kv_heads=2, **WAYS[way])
    assert out.spec.structure.config["num_key_value_heads"] == 2
    assert out.spec.structure.config["num_attention_heads"] == 4
    expected, found = pico.logits(load_model(original.folder)), pico.logits(load_model(out.folder))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    planned = plan(original, "prune_structured", keep_kv_heads=2, **WAYS[way])
    assert planned.tensors == out.spec.tensors
    assert planned.exact
    assert lay_out(planned, 1 << 62, original.metadata).bytes == (out.folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("family", pico.families(RMS, tier=("llama",)))
def test_kv_heads_merge_of_rotated_heads_is_exact(family, tmp_path):
    """The mean alone destroys them; turned by what the data show, nothing is lost."""
    original = alike(tmp_path, family, turned=True)
    expected = pico.logits(load_model(original.folder))
    plain = alike(tmp_path / "plain", family, turned=False)
    torch.testing.assert_close(expected, pico.logits(load_model(plain.folder)), rtol=1e-4, atol=1e-4)
    found = {
        way: pico.logits(load_model(merged(original, tmp_path / way, keep_kv_heads=2, **WAYS[way]).folder))
        for way in ("mean", "aligned")
    }
    torch.testing.assert_close(found["aligned"], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found["mean"], expected, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("family", pico.families(["llama", "qwen2", "phi3", "qwen3_moe"], tier=("llama",)))
def test_kv_heads_repairs_lower_the_error_in_turn(family, tmp_path):
    folder = pico.save(tmp_path / "in", family, with_tokenizer=False, num_key_value_heads=4)
    original = open_checkpoint(folder)
    errors, layers = {}, {}
    for way, settings in (WAYS | {"tune": {"compensation": "reconstruction", "reconstruction_epochs": 5}}).items():
        details: dict = {}
        work = tmp_path / f"{way}-work"
        made = apply(
            original,
            "prune_structured",
            data=Batches(IDS),
            work=work,
            details=details,
            keep_kv_heads=1,
            **settings,
        )
        out = write(made, tmp_path / way)
        errors[way] = error(out.folder, folder)
        if way != "mean":
            (row,) = details["blocks"][0]["tensors"].values()
            assert (row["kept"], row["of"]) == (1, 4)
            layers[way] = row["error"]
    assert layers["least squares"] < 0.95 * layers["aligned"]
    assert errors["tune"] < 0.95 * min(errors["mean"], errors["aligned"])


@pytest.mark.slow
def test_kv_heads_merge_beside_other_removals(tmp_path):
    folder = pico.save(tmp_path / "in", "qwen2", with_tokenizer=False, num_key_value_heads=4)
    settings = {"keep_kv_heads": 2, "mlp": "50%", "layers": [1], "hidden": 8, "reconstruction_epochs": 1}
    original = open_checkpoint(folder)
    out = merged(original, tmp_path / "out", **settings)
    assert plan(original, "prune_structured", **settings).tensors == out.spec.tensors
    pico.logits(load_model(out.folder))
    taylor = merged(original, tmp_path / "taylor", keep_kv_heads=2, mlp="50%", importance="taylor", compensation="none")
    pico.logits(load_model(taylor.folder))


@pytest.mark.parametrize("families", [TIER, pytest.param([f for f in RMS if f not in TIER], marks=pytest.mark.slow)])
def test_kv_heads_merged_load_in_stock(families, tmp_path):
    made = []
    for family in families:
        original = open_checkpoint(
            pico.save(tmp_path / f"in-{family}", family, with_tokenizer=False, num_key_value_heads=4)
        )
        out = merged(original, tmp_path / family, keep_kv_heads=2, **WAYS["mean"])
        pico.save_expected(load_model(out.folder), out.folder / "expected.pt")
        made.append((str(out.folder), out.spec.structure.class_name))
    run = processes.run(SCRIPT, json.dumps(made), foreign=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.split()) == len(families)


@pytest.mark.parametrize("family", [*FIXED_HEADS, "t5", "vit"])
def test_kv_heads_refuse_families_without_sharing(family, tmp_path):
    original = open_checkpoint(pico.save(tmp_path / "in", family, with_tokenizer=False))
    message = f"{family} cannot share keys and values among heads: its config has no field for it; remove `mlp`"
    with pytest.raises(PassError, match=message) as caught:
        plan(original, "prune_structured", keep_kv_heads=2, **WAYS["mean"])
    assert caught.value.key == "keep_kv_heads"


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, "4 key and value heads cannot be merged into 3; keep 1 or 2"),
        (4, "4 key and value heads cannot be merged into 4; keep 1 or 2"),
        (8, "4 key and value heads cannot be merged into 8; keep 1 or 2"),
    ],
)
def test_kv_heads_refuse_bad_counts(count, message, tmp_path):
    original = open_checkpoint(pico.save(tmp_path / "in", "llama", with_tokenizer=False, num_key_value_heads=4))
    with pytest.raises(PassError, match=message) as caught:
        plan(original, "prune_structured", keep_kv_heads=count)
    assert caught.value.key == "keep_kv_heads"


def test_kv_heads_refuse_pruned_weights(tmp_path):
    original = open_checkpoint(pico.save(tmp_path / "in", "llama", with_tokenizer=False))
    sparse = write(apply(original, "prune_unstructured", method="magnitude", sparsity=0.5), tmp_path / "sparse")
    with pytest.raises(
        PassError, match=r"q_proj.weight has weights removed, and merged heads would fill them in; merge"
    ):
        plan(sparse, "prune_structured", keep_kv_heads=1)


def test_kv_heads_refuse_heads_at_the_same_time():
    from compress.passes.prune_structured.settings import PruneStructuredSettings

    with pytest.raises(ValueError, match="`heads` and `keep_kv_heads` both change heads: give one, or use two"):
        PruneStructuredSettings(heads=1, keep_kv_heads=1)
