"""Models in stages run block by block: every stage has a list of blocks, and blocks may change the width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import FunnelConfig, HieraConfig, MobileViTConfig, PvtConfig, SwinConfig

import compress
from compress.architectures.inference import infer
from compress.blockwise.inputs import Inputs
from compress.checkpoint.open import open_checkpoint
from compress.models.blocks import find_lists
from tests.toolbox import runner_of

SAMPLES = 3
TWO = {"image_size": 32, "num_channels": 3, "depths": [1, 2]}
#: Model type ▶ class, config, and the lists of blocks.
CASES = {
    "swin": (
        "SwinForImageClassification",
        SwinConfig(**TWO, embed_dim=8, num_heads=[1, 2], window_size=4),
        ["swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"],
    ),
    "hiera": (
        "HieraForImageClassification",
        HieraConfig(
            **{**TWO, "image_size": [32, 32]},
            embed_dim=8,
            num_heads=[1, 2],
            num_query_pool=1,
            masked_unit_size=[2, 2],
            masked_unit_attention=[True, False],
        ),
        ["hiera.encoder.stages.0.layers", "hiera.encoder.stages.1.layers"],
    ),
    "mobilevit": (  # blocks of convolutions, and rows of patches for each sample
        "MobileViTForImageClassification",
        MobileViTConfig(
            image_size=32,
            hidden_sizes=[16, 20, 24],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2,
            initializer_range=0.3,
        ),
        ["mobilevit.encoder.layer.0.layer", "mobilevit.encoder.layer.1.layer"]
        + [f"mobilevit.encoder.layer.{i}.transformer.layer" for i in (2, 3, 4)],
    ),
    "pvt": (
        "PvtForImageClassification",
        PvtConfig(
            **{**TWO, "image_size": 64},
            num_encoder_blocks=2,
            hidden_sizes=[8, 16],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            patch_sizes=[4, 2],
            strides=[4, 2],
            sequence_reduction_ratios=[2, 1],
        ),
        ["pvt.encoder.block.0", "pvt.encoder.block.1"],
    ),
    "funnel": (
        "FunnelForMaskedLM",
        FunnelConfig(
            vocab_size=64, block_sizes=[1, 2], num_decoder_layers=1, d_model=16, n_head=2, d_head=8, d_inner=32
        ),
        ["funnel.encoder.blocks.0", "funnel.encoder.blocks.1", "funnel.decoder.layers"],
    ),
}


def given(config) -> Inputs:
    """Three samples."""
    generator = torch.Generator().manual_seed(0)
    if config.model_type == "funnel":
        return Inputs({"input_ids": torch.randint(2, 60, (SAMPLES, 12), generator=generator)})
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return Inputs({"pixel_values": torch.randn(SAMPLES, 3, size, size, generator=generator)})


def blocks_of(model, record):
    return [block for modules in find_lists(model, record).values() for block in modules]


def matrix_in(block):
    """The weight of a block's last linear layer; None where it has none."""
    return next((m.weight.data for m in list(block.modules())[::-1] if isinstance(m, torch.nn.Linear)), None)


def outputs_of(model, record, inputs):
    """The output of every block in a plain forward of the stock model."""
    outputs = {}
    for i, block in enumerate(blocks_of(model, record)):
        block.register_forward_hook(lambda m, a, o, i=i: outputs.__setitem__(i, o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        model(**inputs.rows(range(SAMPLES)))
    return outputs


@pytest.mark.parametrize(
    "kind", [kind if kind in ("swin", "funnel") else pytest.param(kind, marks=pytest.mark.slow) for kind in CASES]
)
def test_blocks_of_stages_match_the_whole_model(kind, tmp_path):
    """Later stages read what the changed blocks output; the originals are those of the model as it came."""
    name, config, lists = CASES[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(config).eval().save_pretrained(tmp_path / "in")
    checkpoint, inputs = open_checkpoint(tmp_path / "in"), given(config)
    record = infer(checkpoint.spec)
    assert sorted(entry.path for entry in record.lists) == sorted(lists)
    before = outputs_of(cls.from_pretrained(tmp_path / "in"), record, inputs)
    changed = cls.from_pretrained(tmp_path / "in")
    with_linears = [i for i, block in enumerate(blocks_of(changed, record)) if matrix_in(block) is not None]
    matrix_in(blocks_of(changed, record)[with_linears[0]]).mul_(3)
    after = outputs_of(changed, record, inputs)
    rows, seen = list(range(SAMPLES)), []

    def change(block):
        if block.index == with_linears[0]:
            matrix_in(block.module).mul_(3)
        with torch.no_grad():
            output = block.forward(rows, block.inputs.read(rows))
        for mine, stock in ((output, after[block.index]), (block.targets.read(rows), before[block.index])):
            mine = mine.flatten(0, mine.ndim - stock.ndim)  # samples may have several rows each
            assert mine.shape == stock.shape
            assert (mine - stock).abs().max() <= 1e-5 * stock.abs().max(), block.index
        seen.append(block.index)
        return {}

    runner_of(checkpoint, tmp_path / "work", inputs, with_targets=True).run(change, "changing")
    assert seen == with_linears
    last = len(before) - 1
    assert not torch.allclose(before[last], after[last], rtol=1e-3, atol=0)


@pytest.mark.slow
def test_layers_between_stages_are_treated_by_their_weights_alone(tmp_path):
    """The layer that merges patches is in no block: it is pruned by magnitude, as it is cast, and stock code loads it."""
    config = SwinConfig(**TWO, embed_dim=8, num_heads=[1, 2], window_size=4)
    transformers.SwinForImageClassification(config).save_pretrained(tmp_path / "in")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "in")
    lot = np.random.default_rng(0)
    for label in ("LABEL_0", "LABEL_1"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(2):
            pixels = lot.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    half = {"sparsity": 0.5, "data": tmp_path / "images", "samples": 3}
    compress.apply("prune_unstructured", tmp_path / "in", tmp_path / "out", method="sparsegpt", **half)
    compress.apply("prune_unstructured", tmp_path / "in", tmp_path / "small", method="magnitude", sparsity=0.5)
    ours, theirs = (open_checkpoint(tmp_path / name) for name in ("out", "small"))
    merging = "swin.encoder.layers.0.downsample.reduction.weight"
    inside = "swin.encoder.layers.1.blocks.1.output.dense.weight"
    assert torch.equal(ours.tensor(merging).data, theirs.tensor(merging).data)
    assert not torch.equal(ours.tensor(inside).data, theirs.tensor(inside).data)
    assert all(
        (one.tensor(name).data == 0).float().mean() == 0.5 for one in (ours, theirs) for name in (merging, inside)
    )
    _, missing = transformers.SwinForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(missing[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    coded = {"weights": "int8", "method": "gptq", "data": half["data"], "samples": 3}
    compress.apply("cast", tmp_path / "in", tmp_path / "coded", **coded)
    assert open_checkpoint(tmp_path / "coded").spec.tensors[merging].quant_format is not None
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    stock = transformers.SwinForImageClassification.from_pretrained(tmp_path / "coded", dtype="auto")
    with torch.no_grad():
        assert torch.equal(stock(pixels).logits, compress.load(tmp_path / "coded")(pixels).logits)
