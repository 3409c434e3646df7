"""Divergences estimated by matrix, against the model."""

from __future__ import annotations

import shutil

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.models.loading import load_model
from compress.solvers.quant_format import fit, to_codes
from compress.spec.formats import QuantFormat
from tests import pico


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_divergences_match_the_model(family, folders, data):
    """Half the expected squared directional derivative is the KL divergence to second order: of a fine format, exactly."""
    from compress.progress import SilentProgress
    from compress.sensitivity.matrices import RoundingDelta, divergences
    from compress.solvers.quant_format import dequantize
    from compress.spec.formats import QuantFormat

    checkpoint = open_checkpoint(folders[family])
    ends = ("layers.1.mlp.up_proj.weight", "layers.1.block_sparse_moe.experts.2.w3.weight")  # a fused expert's
    name = next(n for n in checkpoint.spec.tensors if n.endswith(ends))
    ids = data.ids.repeat(3, 1)[:32]
    quant_format = QuantFormat("int6", 16)
    found, _ = divergences(
        checkpoint,
        [name],
        RoundingDelta(lambda n, f: quant_format, {"int6": "int6"}),
        Batches(ids),
        setting=("", ""),
        device="cpu",
        seed=0,
        progress=SilentProgress(),
    )
    model = load_model(folders[family], dtype="float32")
    with torch.no_grad():
        before = model(input_ids=ids).logits.log_softmax(-1)
        mlp = model.model.layers[1].mlp
        W = mlp.up_proj.weight if family == "llama" else mlp.experts.gate_up_proj[2].chunk(2)[1]
        W.copy_(dequantize(to_codes(W, quant_format, fit(W, quant_format), torch.float32)))
        after = model(input_ids=ids).logits.log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    # blocks mix tokens, and each token's gradient is taken alone: the same order of size, not the same number
    assert 0.2 < found[name]["int6"] / kl < 5


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_divergences_by_block_are_those_of_the_whole_model(family, folders, data, tmp_path, monkeypatch):
    from compress.blockwise.inputs import Inputs
    from compress.blockwise.runner import BlockRunner
    from compress.progress import SilentProgress
    from compress.sensitivity import matrices, output_curvature, samples
    from compress.workspace import Workspace

    for module in (output_curvature, samples):
        monkeypatch.setattr(module, "draw", lambda logits, generator: logits.argmax(-1))
    monkeypatch.setattr(matrices, "PROBE_BYTES", 1 << 13)  # some matrices at a time
    checkpoint = open_checkpoint(folders[family])
    names = [
        n for n, t in checkpoint.spec.tensors.items() if ".layers." in n and len(t.shape) == 2 and ".gate." not in n
    ]
    ids, mask = data.ids[:4], torch.arange(data.ids.shape[1]) < torch.tensor([9, 12, 5, 12])[:, None]
    whole, groups = matrices.divergences(
        checkpoint,
        names,
        lambda linear, weight: {"less": 0.01 * weight, "none": 0 * weight},
        Batches(ids, mask),
        setting=("", ""),
        device="cpu",
        seed=0,
        progress=SilentProgress(),
    )
    runner = BlockRunner(
        checkpoint,
        Inputs(Batches(ids, mask).values, mask),
        set(names),
        workspace=Workspace(tmp_path),
        dtype="float32",
        device="cpu",
        progress=SilentProgress(),
        with_targets=False,
    )

    def probe(block):
        for linear in block.linears:
            yield linear.name, {"less": 0.01 * linear.weight, "none": 0 * linear.weight}

    found = matrices.block_divergences(runner, "", probe, ("", ""))
    assert found.by_tensor.keys() == whole.keys() == set(names)
    for name in names:
        assert found.by_tensor[name] == pytest.approx(whole[name], rel=1e-3)
    assert sorted(map(sorted, found.groups)) == sorted(map(sorted, groups))


def test_divergences_of_other_groups_follow_weight_error(folders, data):
    from compress.progress import SilentProgress
    from compress.sensitivity.matrices import RoundingDelta, divergences

    checkpoint = open_checkpoint(folders["llama"])
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)]
    quant_formats = {"int4": QuantFormat("int4", 8), "int4/channel": QuantFormat("int4")}

    def measure(options):
        rounding = RoundingDelta(lambda n, o: quant_formats[o], options)
        found, _ = divergences(
            checkpoint,
            names,
            rounding,
            Batches(data.ids),
            setting=("", ""),
            device="cpu",
            seed=0,
            progress=SilentProgress(),
        )
        return rounding.scaled(found)

    scaled = measure({"int4": "int4", "int4/channel": "int4"})
    itself = measure({"int4": "int4", "int4/channel": "int4/channel"})
    for name in names:
        assert scaled[name]["int4"] == itself[name]["int4"] < scaled[name]["int4/channel"]
        assert 0.6 < scaled[name]["int4/channel"] / itself[name]["int4/channel"] < 1.6


def test_divergences_read_token_types(tmp_path):
    """A BERT on tokens of the second text is one without types whose first kind of token has the embedding of the second."""
    from safetensors.torch import load_file, save_file

    from compress.progress import SilentProgress
    from compress.sensitivity.matrices import divergences

    folder = pico.save(tmp_path / "second", "bert", with_tokenizer=False)
    other = shutil.copytree(folder, tmp_path / "first")
    state, key = load_file(folder / "model.safetensors"), "bert.embeddings.token_type_embeddings.weight"
    save_file(state | {key: state[key][[1, 1]]}, other / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(2, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([12, 9, 12, 5])[:, None]
    names = [f"bert.encoder.layer.{i}.{part}.dense.weight" for i in (0, 3) for part in ("intermediate", "output")]

    def measure(checkpoint, types):
        found, _ = divergences(
            open_checkpoint(checkpoint),
            names,
            lambda linear, weight: {"less": 0.01 * weight},
            Batches(ids, mask, types=types),
            setting=("", ""),
            device="cpu",
            seed=0,
            progress=SilentProgress(),
        )
        return torch.tensor([found[name]["less"] for name in names])

    typed = measure(folder, torch.ones_like(ids))
    assert torch.equal(typed, measure(other, None))
    assert not torch.allclose(typed, measure(folder, None), rtol=1e-3)


def test_divergences_leave_out_padding_where_tokens_come_first(tmp_path):
    """Longformer's attention reads [length, samples, I], of texts that it fills up to whole windows."""
    import transformers

    from compress.models.pico import pico_model
    from compress.models.shrink import default_config, shrunken
    from compress.progress import SilentProgress
    from compress.sensitivity.block_influence import block_influence
    from compress.sensitivity.matrices import divergences
    from compress.sensitivity.samples import SampleLoop, token_losses

    pico_model(transformers.LongformerForMaskedLM, shrunken(default_config("longformer"))).save_pretrained(tmp_path)
    ids = torch.randint(5, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    batches = Batches(ids, torch.arange(12) < torch.tensor([12, 5])[:, None])
    layers = ["longformer.encoder.layer.0.attention.self.query", "longformer.encoder.layer.1.output.dense"]
    model = transformers.LongformerForMaskedLM.from_pretrained(tmp_path).eval()
    read, gradients = {layer: [] for layer in layers}, {layer: [] for layer in layers}

    def listen(layer):
        def hook(module, args, output):
            read[layer].append(args[0].detach())
            output = output.clone()  # Longformer divides queries in place, and a view would lose its hook
            output.register_hook(gradients[layer].append)
            return output

        return hook

    for layer in layers:
        model.get_submodule(layer).register_forward_hook(listen(layer))
    generator, loop = torch.Generator().manual_seed(0), SampleLoop(batches, "cpu")
    for sample in loop:
        token_losses(model, sample, generator).sum().backward()
    found, _ = divergences(
        open_checkpoint(tmp_path),
        [f"{layer}.weight" for layer in layers],
        lambda linear, weight: {"less": 0.01 * weight},
        batches,
        setting=("", ""),
        device="cpu",
        seed=0,
        progress=SilentProgress(),
    )
    for layer, axis in zip(layers, (0, 1), strict=True):
        delta, total = (0.01 * model.get_submodule(layer).weight).bfloat16().float(), 0.0
        for x, g, length in zip(read[layer], gradients[layer], (12, 5), strict=True):
            rows, outputs = (t.movedim(axis, 0)[:length, 0] for t in (x, g))
            total += float(((rows @ delta.T) * outputs).sum(1).square().sum().detach())
        assert found[f"{layer}.weight"]["less"] == pytest.approx(0.5 * total / 17, rel=1e-4)
    influences = block_influence(
        open_checkpoint(tmp_path), batches, dtype="float32", device="cpu", progress=SilentProgress()
    )
    assert len(influences) == 3
