"""Sentence encoders are often saved without the pooler that their stock class has: nothing of them is left at random."""

from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.checkpoint.open import open_checkpoint
from compress.models.loading import load_model
from tests import pico, processes

IDS = torch.randint(5, 250, (16, 24), generator=torch.Generator().manual_seed(0))
STOCK = """
import sys, torch, transformers
found = transformers.AutoModel.from_pretrained(sys.argv[1], add_pooling_layer=False, trust_remote_code=True)
assert not any(m == "compress" or m.startswith("compress.") for m in sys.modules)
with torch.no_grad():
    torch.save(found(torch.arange(20)[None] + 5).last_hidden_state, sys.argv[2])
"""


@pytest.fixture(params=["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def encoder(request, tmp_path):
    stock = {"bert": transformers.BertModel, "roberta": transformers.RobertaModel}[request.param]
    torch.manual_seed(0)
    stock(pico.config(request.param), add_pooling_layer=False).save_pretrained(tmp_path / "in")
    pico.tokenizer().save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def hidden(folder):
    with torch.no_grad():
        return load_model(folder)(torch.arange(20)[None] + 5).last_hidden_state


@pytest.mark.parametrize(
    ("store", "name", "settings"),
    [
        pytest.param(
            "stock", "prune_structured", {"mlp": 0.25, "compensation": "least_squares"}, marks=pytest.mark.slow
        ),
        ("stock", "cast", {"weights": "bf16"}),
        pytest.param(
            "compact", "prune_unstructured", {"sparsity": 0.5, "reconstruction_epochs": 1}, marks=pytest.mark.slow
        ),
        pytest.param("compact", "share", {"groups": 2, "residual_rank": 0}, marks=pytest.mark.slow),
        ("compact", "factorize", {"keep_parameters": 0.5, "allocation": "uniform", "reconstruction_epochs": 0}),
    ],
)
def test_encoder_without_pooler_is_compressed_and_loaded(store, name, settings, encoder, tmp_path):
    assert load_model(encoder).pooler is None
    out = compress.apply(name, encoder, tmp_path / "out", store=store, data=IDS, **settings)
    assert not any("pooler" in tensor for tensor in open_checkpoint(out).spec.tensors)
    processes.run(STOCK, out, tmp_path / "found.pt", foreign=True).check_returncode()
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), hidden(out), rtol=1e-4, atol=1e-4)
    if store == "compact" and name != "prune_unstructured":
        load_model(out).save_pretrained(tmp_path / "twin")
        torch.testing.assert_close(hidden(tmp_path / "twin"), hidden(out), rtol=1e-4, atol=1e-4)
