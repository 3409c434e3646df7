"""`share: {embeddings: factorize}`: thin tables and projections are nearest where it counts, and load and go on everywhere."""

from __future__ import annotations

import json

import pytest
import torch

import compress
from compress.api import unpack
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import stored_form
from compress.errors import CheckpointError, CompressError, PassError
from compress.models.loading import load_model
from compress.solvers.embeddings import thin_input, thin_output, thin_tied
from tests import pico, processes
from tests.conftest import ROOT
from tests.toolbox import divergence, plan

IDS = torch.randint(0, 250, (16, 24), generator=torch.Generator().manual_seed(0))
SETTINGS = {"embeddings": "factorize", "embedding_rank": 12}
#: Family, tied, and what the head is called.
MODELS = [
    ("llama", True), ("llama", False), ("gemma3_text", True), ("gpt2", True), ("gpt_neox", False), ("bloom", True), ("opt", True),
    ("qwen3_moe", False), ("bert", True), ("roberta", True), ("distilbert", True),
]  # fmt: skip
QUICK = ("opt", True)
STOCK = """
import sys, torch, transformers
auto = transformers.AutoModelForMaskedLM if "bert" in sys.argv[1] else transformers.AutoModelForCausalLM
found = []
for folder in sys.argv[1:]:
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True, trust_remote_code="twin" not in folder)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not any(m == "compress" or m.startswith("compress.") for m in sys.modules)
    with torch.no_grad():
        found.append(model.eval()(torch.arange(20)[None] + 5).logits.float())
torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
torch.save(found[0], f"{sys.argv[1]}/logits.pt")
"""


def tables(V=90, h=24):
    generator = torch.Generator().manual_seed(1)
    E = torch.randn(V, h, generator=generator, dtype=torch.float64) @ torch.randn(h, h, generator=generator).double()
    X = torch.randn(h, 400, generator=generator).double() * torch.linspace(0.1, 3, h).double()[:, None]
    f = torch.rand(V, generator=generator).double() ** 4
    return E, f / f.sum(), X @ X.T


def cost(E, f, H, A, P, Q):
    read = (f * (E - A @ P).square().sum(1)).sum() / (f * E.square().sum(1)).sum()
    off = E - A @ Q
    return float(read + torch.trace(off.T @ off @ H) / torch.trace(E.T @ E @ H))


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_thin_input_and_output_match_truncated_svd(rank):
    """Eckart and Young: what is lost are the squares of the singular values left out, of the weighted table."""
    E, f, H = tables()
    A, P = thin_input(E, f, rank)
    weighted = f.sqrt()[:, None] * E
    lost = (f[:, None] * (E - A @ P).square()).sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(weighted)[rank:].square().sum())
    A, Q = thin_output(E, H, rank)
    off = E - A @ Q
    lost = torch.trace(off.T @ off @ H)
    whitened = E @ torch.linalg.cholesky(H)
    torch.testing.assert_close(lost, torch.linalg.svdvals(whitened)[rank:].square().sum())


@pytest.mark.parametrize("rank", [4, 12])
def test_thin_tied_beats_a_table_made_for_one_side(rank):
    E, f, H = tables()
    A, P, Q = thin_tied(E, f, H, rank)
    found = cost(E, f, H, A, P, Q)
    A_in, P_in = thin_input(E, f, rank)
    A_out, Q_out = thin_output(E, H, rank)
    f_ = f.sqrt()[:, None]
    for_in = cost(E, f, H, A_in, P_in, torch.linalg.lstsq(A_in, E).solution)
    for_out = cost(E, f, H, A_out, torch.linalg.lstsq(f_ * A_out, f_ * E).solution, Q_out)
    assert found < 0.98 * min(for_in, for_out)
    # no small step of any of the three lowers it much: near a minimum
    parameters = [t.clone().requires_grad_() for t in (A, P, Q)]
    a, p, q = parameters
    off = E - a @ q
    value = (f * (E - a @ p).square().sum(1)).sum() / (f * E.square().sum(1)).sum()
    value = value + torch.trace(off.T @ off @ H) / torch.trace(E.T @ E @ H)
    value.backward()
    assert all(float(t.grad.norm() * t.norm()) < 0.05 * found for t in parameters)


@pytest.mark.parametrize(
    ("family", "tied"),
    [pytest.param(*case, marks=[] if case == QUICK else [pytest.mark.slow]) for case in MODELS],
    ids=lambda v: str(v),
)
def test_thin_tables_load_in_stock(family, tied, tmp_path):
    """In a process without this package, what is written computes what its dense twin of the stock class does."""
    original = pico.save(tmp_path / "in", family, tie_word_embeddings=tied)
    out = tmp_path / f"{family}_out"
    store = "stock" if family == "opt" else "compact"
    compress.apply("share", original, out, store=store, data=IDS, **SETTINGS)
    before, after = (open_checkpoint(folder) for folder in (original, out))
    planned = plan(before, "share", **SETTINGS)
    assert {n: t.shape for n, t in planned.tensors.items()} == {n: t.shape for n, t in after.spec.tensors.items()}
    _, layout = stored_form(planned, store, 10**9, before.metadata)
    assert layout.bytes == (out / "model.safetensors").stat().st_size
    vocabulary, hidden = next(t.shape for t in before.spec.stored() if t.shape[0] >= 250 and len(t.shape) == 2)
    copies = 1 if tied else 2
    assert before.spec.parameters - after.spec.parameters == copies * vocabulary * (hidden - 12) - 2 * hidden * 12
    loaded = load_model(out)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    if family == "opt":
        assert json.loads((out / "config.json").read_text())["model_type"] == "opt"
        loaded.save_pretrained(tmp_path / "twin")
    else:
        unpack(out, tmp_path / "twin")
        loaded.save_pretrained(tmp_path / "saved_twin")
        saved = pico.logits(load_model(tmp_path / "saved_twin"))
        torch.testing.assert_close(saved, pico.logits(load_model(tmp_path / "twin")), rtol=1e-4, atol=1e-4)
    processes.run(STOCK, out, tmp_path / "twin", foreign=True).check_returncode()
    ours = loaded(torch.arange(20)[None] + 5).logits.detach()
    torch.testing.assert_close(torch.load(out / "logits.pt"), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_thin_tables_error_falls_with_rank_and_passes_follow(tmp_path):
    text = {"data": ROOT / "examples/text/train.txt", "samples": 16, "length": 128, "document_separator": "<|doc|>"}
    trained, found = ROOT / "examples/tiny-lm", []
    ids = torch.randint(0, 1000, (2, 32), generator=torch.Generator().manual_seed(0))
    for rank in (16, 96):
        settings = {"embeddings": "factorize", "embedding_rank": rank}
        compress.apply("share", trained, tmp_path / f"t{rank}", store="compact", **text, **settings)
        found.append(divergence(load_model(trained), load_model(tmp_path / f"t{rank}"), ids))
    assert found[0] > found[1] > 0
    original = pico.save(tmp_path / "in", "llama", tie_word_embeddings=True)
    compress.apply("share", original, tmp_path / "r12", store="compact", data=IDS, **SETTINGS)
    steps = [
        ("prune_unstructured", {"sparsity": 0.5, "data": IDS}),
        ("distill", {"steps": 4, "batch_size": 4, "validation_samples": 4, "data": IDS, "teacher": str(original)}),
        ("cast", {"weights": "int8", "data": IDS}),
    ]
    folder = tmp_path / "r12"
    for name, settings in steps:
        compress.apply(name, folder, tmp_path / name, store="compact", **settings)
        folder = tmp_path / name
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[1] == 12
    trained = open_checkpoint(tmp_path / "distill")
    for name in ("model.embed_tokens.weight", "model.embed_tokens.projection.weight", "lm_head.projection.weight"):
        assert not torch.equal(trained.tensor(name).data, open_checkpoint(tmp_path / "r12").tensor(name).data), name


def test_thin_tables_refuse_bad_input(tmp_path):
    llama = pico.save(tmp_path / "llama", "llama", tie_word_embeddings=True)
    with pytest.raises(PassError, match=r"tables of rank 28 .* as large as what they replace, or larger; at most 2\d"):
        compress.apply(
            "share", llama, tmp_path / "no", store="compact", data=IDS, embeddings="factorize", embedding_rank=28
        )
    for settings in (
        {"embeddings": "factorize"},
        {"embeddings": "tie", "embedding_rank": 4},
        {"groups": 2, "embedding_rank": 4},
    ):
        with pytest.raises(CompressError, match="`embeddings: factorize` and `embedding_rank` go together"):
            compress.apply("share", llama, tmp_path / "no", store="compact", data=IDS, **settings)
    with pytest.raises(PassError, match=r"stock classes cannot express that .*embed_tokens is two factors"):
        compress.apply("share", llama, tmp_path / "no", data=IDS, **SETTINGS)
    compress.apply("share", llama, tmp_path / "thin", store="compact", data=IDS, **SETTINGS)
    with pytest.raises(PassError, match="is two factors already"):
        compress.apply("share", tmp_path / "thin", tmp_path / "no", store="compact", data=IDS, **SETTINGS)
    opt = pico.save(tmp_path / "opt", "opt")
    compress.apply("share", opt, tmp_path / "thin_opt", data=IDS, **SETTINGS)
    with pytest.raises(PassError, match="opt has a projection beside its table already"):
        compress.apply(
            "share", tmp_path / "thin_opt", tmp_path / "no", data=IDS, embeddings="factorize", embedding_rank=4
        )
    for family, message in (("vit", "looks no tokens up"), ("t5", "cannot be changed block by block")):
        with pytest.raises(PassError, match=message):
            plan(open_checkpoint(pico.save(tmp_path / family, family)), "share", **SETTINGS)
    config = json.loads((tmp_path / "thin" / "config.json").read_text())
    config["edits"][0]["values"]["rank"] = 11
    (tmp_path / "thin" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config and weights disagree"):
        open_checkpoint(tmp_path / "thin")
