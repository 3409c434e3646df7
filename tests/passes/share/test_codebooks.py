"""Clustering matrices into codebooks: plans are exact, masks stay, calibration pays, bad input is refused in one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import compress
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.checkpoint.write import stored_form, write_checkpoint
from compress.data.batches import Batches
from compress.errors import CheckpointError, PassError
from compress.models.loading import load_model
from compress.passes.base import Context
from compress.passes.share.codebooks import cluster, clustered
from compress.planning import plan_pass
from compress.progress import SilentProgress
from compress.spec.spec import FLOAT_DTYPES
from compress.workspace import Workspace
from tests import pico
from tests.toolbox import apply, write


def matrices(checkpoint):
    return [t.name for t in checkpoint.spec.stored() if t.dtype in FLOAT_DTYPES and len(t.shape) >= 2]


def context(checkpoint, work, data=None, details=None):
    return Context(
        checkpoint, "cpu", "float32", 0, None, lambda key: data, SilentProgress(), Workspace(work),
        details={} if details is None else details,
    )  # fmt: skip


def shared(checkpoint, work, bits, data=None, names=None, details=None):
    """The checkpoint as `cluster` gives it, calibrated where there are data."""
    names = matrices(checkpoint) if names is None else names
    spec = clustered(checkpoint.spec, names, bits)
    return cluster(checkpoint, spec, names, context(checkpoint, work, data, details), data is not None)


@pytest.mark.parametrize(
    ("family", "calibrated"),
    [
        ("llama", False),
        *(pytest.param(f, True, marks=pytest.mark.slow) for f in ("llama", "gpt2", "qwen3_moe")),
    ],
)
def test_cluster_writes_what_is_planned_and_loads(family, calibrated, folders, data, tmp_path):
    checkpoint = open_checkpoint(folders[family])
    names = matrices(checkpoint)
    planned = clustered(checkpoint.spec, names, 4)
    assert planned.exact
    planned, layout = stored_form(planned, "compact", 10**9, checkpoint.metadata)
    details: dict = {}
    changed = shared(checkpoint, tmp_path / "work", 4, data if calibrated else None, details=details)
    done = write_checkpoint(changed, tmp_path / "out", store="compact")
    assert done.bytes == layout.bytes == sum(f.stat().st_size for f in done.folder.glob("*.safetensors"))
    opened = open_checkpoint(done.folder)
    assert {n: t for n, t in opened.spec.tensors.items() if not t.alias_of} == {
        n: t for n, t in planned.tensors.items() if not t.alias_of
    }
    for name in names:
        assert len(opened.tensor(name).data.unique()) <= 16
    dense = compress.unpack(done.folder, tmp_path / "dense")
    slack = 1e-5 if "moe" in family else 0.0  # experts get few tokens, and kernels then round by alignment
    torch.testing.assert_close(
        pico.logits(load_model(done.folder)), pico.logits(load_model(dense)), rtol=slack, atol=slack
    )
    if calibrated:
        assert len(details["blocks"]) == 4
        assert all(row["format"] == "codebook4" for block in details["blocks"] for row in block["tensors"].values())


@pytest.mark.parametrize(
    ("family", "store", "calibrated"),
    [
        pytest.param("llama", "compact", True, marks=pytest.mark.slow),
        ("gpt2", "compact", False),
        pytest.param("gpt2", "stock", True, marks=pytest.mark.slow),
    ],
)
def test_cluster_keeps_masks(family, store, calibrated, folders, data, tmp_path):
    """Kept weights that are zero stay kept, removed ones are +0, however the input is stored."""
    base = open_checkpoint(folders[family])
    pruned = apply(base, "prune_unstructured", method="magnitude", sparsity=0.6)

    def read(name):
        value = pruned.tensor(name)
        if value.mask is None:
            return value
        return Value(value.data.masked_fill(value.data.abs() < value.data.abs().max() / 3, 0), value.mask)

    masked = write(Derived(pruned, pruned.spec, read), tmp_path / "in", store=store)
    changed = shared(masked, tmp_path / "work", 4, data if calibrated else None)
    _, layout = stored_form(changed.spec, "compact", 10**9, changed.metadata)
    done = write_checkpoint(changed, tmp_path / "out", store="compact")
    assert done.bytes == layout.bytes
    opened = open_checkpoint(done.folder)
    for name in matrices(masked):
        before, after = masked.tensor(name), opened.tensor(name)
        masks = before.mask is not None
        assert opened.spec.tensors[name].storage == (("mask", "codebook") if masks else ("codebook",))
        if not masks:
            assert after.mask is None
            continue
        assert (before.data[before.mask] == 0).any()
        assert torch.equal(after.mask, before.mask)
        gone = after.data[~after.mask]
        assert not gone.any()
        assert not torch.signbit(gone).any()


@pytest.mark.slow
def test_cluster_error_falls_with_calibration_and_bits(folders, tmp_path):
    checkpoint = open_checkpoint(folders["llama"])
    data = Batches(torch.randint(2, 250, (32, 24), generator=torch.Generator().manual_seed(1)))
    names = [name for name in matrices(checkpoint) if ".layers." in name]

    def error(i, bits, given):
        changed = shared(checkpoint, tmp_path / f"w{i}", bits, given, names)
        folder = write(changed, tmp_path / f"o{i}", store="compact").folder
        with torch.no_grad():
            a, b = (load_model(f)(input_ids=data.ids).logits for f in (folders["llama"], folder))
        return float((a - b).square().mean())

    by_weights, solved, finer = error(0, 3, None), error(1, 3, data), error(2, 6, None)
    assert by_weights > 1.2 * solved > 10 * finer


@pytest.mark.slow
def test_cluster_takes_experts_without_tokens_by_weights(folders, tmp_path):
    checkpoint, details = open_checkpoint(folders["qwen3_moe"]), {}
    changed = shared(checkpoint, tmp_path / "w", 4, Batches(torch.full((2, 6), 7)), details=details)
    rows = [(name, row) for block in details["blocks"] for name, row in block["tensors"].items()]
    cold = [name for name, row in rows if "no token reached it" in row.get("note", "")]
    assert 0 < len(cold) < len(rows)
    alone = shared(checkpoint, tmp_path / "w", 4)
    assert all(torch.equal(changed.tensor(name).data, alone.tensor(name).data) for name in cold)


def test_cluster_again_changes_nothing(folders, tmp_path):
    """Tensors of few values keep them."""
    once = write(shared(open_checkpoint(folders["gpt2"]), tmp_path / "w", 4), tmp_path / "once", store="compact")
    dense = open_checkpoint(compress.unpack(once.folder, tmp_path / "dense"))
    twice = write(shared(dense, tmp_path / "w", 5), tmp_path / "twice", store="compact")
    for name in matrices(dense):
        assert torch.equal(once.tensor(name).data, twice.tensor(name).data)


@pytest.mark.slow
def test_cluster_of_bfloat16(tmp_path, data):
    folder = pico.save(tmp_path / "in", "llama", dtype=torch.bfloat16, with_tokenizer=False)
    changed = shared(open_checkpoint(folder), tmp_path / "w", 4, data)
    out = write(changed, tmp_path / "out", store="compact")
    value = out.tensor("model.layers.0.mlp.up_proj.weight")
    assert value.codes.scale.dtype == value.data.dtype == torch.bfloat16
    assert torch.equal(
        pico.logits(load_model(out.folder)), pico.logits(load_model(compress.unpack(out.folder, tmp_path / "d")))
    )


def test_cluster_refuses_bad_input(folders, tmp_path):
    checkpoint = open_checkpoint(folders["gpt2"])
    with pytest.raises(PassError, match=r"^lm_head.weight is shared with transformer.wte.weight, and gets no codebook"):
        clustered(checkpoint.spec, ["lm_head.weight"], 4)
    with pytest.raises(
        PassError, match=r"^transformer.ln_f.weight is not a matrix of floats, and gets no codebook"
    ) as caught:
        clustered(checkpoint.spec, ["transformer.ln_f.weight"], 4)
    assert caught.value.fix == "skip it: skip: [transformer.ln_f]"
    spec = clustered(checkpoint.spec, matrices(checkpoint), 4)
    with pytest.raises(PassError, match=r"is not a matrix of floats"):
        clustered(spec, matrices(checkpoint), 4)
    share = SimpleNamespace(name="share", accepts=frozenset({"float"}), plan=lambda spec_, settings: spec)
    with pytest.raises(PassError, match=r"stock loaders do not read codebook4 codes of transformer") as caught:
        plan_pass(checkpoint.spec, share, None, "stock")
    assert caught.value.fix == "use `store: compact`"
    assert plan_pass(checkpoint.spec, share, None, "compact") == spec
    with pytest.raises(
        PassError, match=r"share accepts float weights, and transformer.h.0.attn.c_attn.weight is quantised"
    ):
        plan_pass(spec, share, None, "compact")
    damaged = Derived(checkpoint, checkpoint.spec, lambda name: Value(checkpoint.tensor(name).data / 0.0))
    with pytest.raises(CheckpointError, match=r"tensor transformer.wte.weight holds NaN or infinite values"):
        shared(damaged, tmp_path, 4).tensor("transformer.wte.weight")
