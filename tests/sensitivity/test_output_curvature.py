"""Output curvature, against a plain backward pass through the whole model with the same drawn tokens."""

from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from compress.checkpoint.open import open_checkpoint
from compress.models.loading import load_checkpoint
from compress.progress import SilentProgress
from compress.sensitivity import output_curvature
from compress.sensitivity.labels import draw
from compress.sensitivity.output_curvature import Gradients
from compress.workspace import Workspace
from tests import pico
from tests.toolbox import LENGTH, SAMPLES, inputs_of, runner_of

FAMILIES = ["llama", "gemma2", "phi3", "mixtral", "gpt2", "gpt_neox", "opt", "bloom", "bert", "distilbert", "electra"]


def measured(folder, work, mask=None):
    """Σ g gᵀ by name from a run over the blocks, and the runner."""
    checkpoint = open_checkpoint(folder)
    runner = runner_of(checkpoint, work, inputs_of(checkpoint, mask=mask), with_targets=True)
    gradients, found = Gradients(runner.executor, Workspace(work / "gradients"), SilentProgress()), {}

    def change(block):
        found.update(gradients.by_outputs(block))
        for linear in block.linears:  # what earlier blocks become does not matter
            linear.weight.mul_(0.5)
        return {}

    runner.run(change, "looking", gradients.measure)
    return found, runner


def expected(runner, chunk):
    """Σ g gᵀ by module of the whole model."""
    model = load_checkpoint(runner.checkpoint, dtype="float32").requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.requires_grad_())
    mask, sums = runner.inputs.mask, {}

    def listen(name):
        def hook(module, args, output):
            def add(gradient):
                g = gradient.reshape(-1, gradient.shape[-1]).double()
                counted = g if mask is None or len(g) != LENGTH else g[mask[row]]
                sums[name] = sums.get(name, 0) + counted.T @ counted

            if output.requires_grad:
                output.register_hook(add)

        return hook

    for name, module in model.base_model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and "router" not in name:
            module.register_forward_hook(listen(name))
    for row in range(SAMPLES):
        generator = torch.Generator().manual_seed(runner.executor.seed * 1_000_003 + row)
        logits = model(**runner.inputs.rows([row]))[0][0]
        drawn = [draw(part, generator)[:, None] for part in logits.split(chunk)]
        losses = torch.nn.functional.cross_entropy(logits, torch.cat(drawn)[:, 0], reduction="none")
        (losses if mask is None else losses[mask[row]]).sum().backward()
    return sums


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_output_curvature_matches_a_backward_pass_through_the_whole_model(family, tmp_path, monkeypatch):
    mask = None
    if family in ("llama", "bert"):
        mask = torch.ones(SAMPLES, LENGTH, dtype=torch.bool)
        mask[1, 5:] = mask[4, 9:] = False
    if family == "llama":
        monkeypatch.setattr(output_curvature, "LOGITS_PER_CHUNK", 5)
    found, runner = measured(pico.save(tmp_path / "model", family, with_tokenizer=False), tmp_path / "work", mask)
    wanted = expected(runner, 5 if family == "llama" else LENGTH)
    names = {name: name.removesuffix(".weight") for name in runner.wanted if ".experts." not in name}
    assert found.keys() == names.keys()
    for name, module in names.items():
        other = next(total for known, total in wanted.items() if f".{module}".endswith(f".{known}"))
        assert float(other.diagonal().sum()) > 0
        assert (found[name] - other).abs().max() <= 1e-3 * other.abs().max(), name
    assert sorted(p.name for p in (tmp_path / "work/gradients").iterdir()) == [
        "0.act",
        "1.act",
        "2.act",
        "3.act",
        "gradients.json",
    ]


def test_resumed_run_measures_no_gradients_again(tmp_path, monkeypatch):
    folder = pico.save(tmp_path / "model", "llama", with_tokenizer=False)
    first, _ = measured(folder, tmp_path / "work")
    (tmp_path / "work/state.json").unlink()
    monkeypatch.setattr(Gradients, "_at_the_end", None)
    again, _ = measured(folder, tmp_path / "work")
    assert all(torch.equal(again[name], total) for name, total in first.items())


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_models_without_token_predictions_have_no_curvature(family, tmp_path):
    folder = pico.save(
        tmp_path / "model",
        family,
        with_tokenizer=False,
        **({"class_name": "BertForSequenceClassification"} if family == "bert" else {}),
    )
    found, _ = measured(folder, tmp_path / "work")
    assert found == {}
