"""Other tools get an equal model, and their figures stand beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import page
from benchmarks.peers import alps, worker
from compress.models.loading import load_model
from tests import pico


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_workers_model_is_equal_and_what_it_writes_too(family: str, tmp_path: Path):
    folder = pico.folder(family)
    stock, model = load_model(folder, dtype="float32"), worker.linear_model(str(folder))
    assert not any(isinstance(module, worker.Conv1D) for module in model.modules())
    ids = pico.inputs(stock)["input_ids"]
    torch.testing.assert_close(model(ids).logits, stock(ids).logits)
    next(m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)).weight[0, 0] = 7.0
    worker.write(model, str(folder), str(tmp_path / "out"))
    torch.testing.assert_close(load_model(tmp_path / "out")(ids).logits, model(ids).logits)


def test_alps_gets_the_same_largest_entries():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert set(alps.topk(values, 300)[1].tolist()) == set(torch.topk(values, 300).indices.tolist())


#: Stands for the published class: it keeps what a layer reads, and removes all of its weights.
PUBLISHED = """
class ALPS_prune:
    reads = {}

    def __init__(self, layer, nsamples, seqlen):
        self.layer = layer

    def add_batch(self, inputs, outputs):
        self.reads.setdefault(self.layer, []).append(inputs)

    def ALPS_admm(self, **settings):
        assert settings == {"rho": 0.1, "sp": 0.5, "nm_n": 2, "nm_m": 4}
        self.layer.weight.data.zero_()

    def free(self):
        pass
"""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_alps_goes_block_by_block_on_what_pruned_ones_give(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "alps.py").write_text(PUBLISHED)
    published = alps.published(str(tmp_path / "alps.py"))
    monkeypatch.setattr(alps, "published", lambda code: published)
    model, twin = worker.linear_model(str(pico.folder(family))), worker.linear_model(str(pico.folder(family)))
    ids = pico.inputs(model)["input_ids"][:1].repeat(2, 1)
    alps.compress(model, ids, {"code": None, "amount": "2:4"})
    first, second = (linears(block) for block in blocks(model)[:2])
    assert all(len(published.reads[layer]) == len(ids) for layer in (*first, *second))
    for layer in linears(blocks(twin)[0]):
        layer.weight.zero_()
    read = []
    linears(blocks(twin)[1])[0].register_forward_pre_hook(lambda _, x: read.append(x[0]))
    twin(ids[:1])
    torch.testing.assert_close(published.reads[second[0]][0], read[0])


def blocks(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def linears(block: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in block.modules() if isinstance(module, torch.nn.Linear)]


def test_figures_of_other_tools_stand_at_their_amount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        {"tool": "llm-compressor 0.14", "method": "GPTQ asymmetric", "amount": "int4", "rise": 0.0078},
        {"tool": "ALPS as published", "method": "ALPS", "amount": "50%", "rise": 0.0271, "kl": 0.03},
        {"tool": "other", "method": "units", "amount": "MLP 50%", "rise": 0.8},
    ]
    file = tmp_path / "peers.json"
    file.write_text(json.dumps(rows))
    monkeypatch.setattr(page, "peers_file", lambda model: file)
    assert page.others("m", "int4", "gptq") == "llm-compressor 0.14 GPTQ asymmetric 0.0078"
    assert page.others("m", "int4", "rtn") == page.others("m", "70%") == ""
    assert page.others("m", "50%") == "ALPS as published 0.0271 (KL 0.0300)"
    page.keep_peer("m", {**rows[1], "rise": 0.02})
    assert page.known_peers("m") == [rows[0], rows[2], {**rows[1], "rise": 0.02}]


def test_a_folder_called_model_is_named_by_the_one_around_it():
    assert page.model_name("benchmarks/third/model") == "third"
    assert page.model_name("examples/tiny-lm") == "tiny-lm"
