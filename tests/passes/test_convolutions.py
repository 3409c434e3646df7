"""Kernels of convolutions as matrices [out, in x positions]: codes, keep-masks, and what stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress.architectures.model_map import model_map
from compress.checkpoint.layout import SINGLE_NAME
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Checkpoint
from compress.checkpoint.write import stored_form
from compress.errors import CompressError
from compress.models.loading import load_model
from compress.solvers.quant_format import dequantize, rounded
from compress.spec.formats import QuantFormat
from tests import processes
from tests.toolbox import plan

#: Stock transformers alone: outputs for fixed pixels, to a file.
_STOCK = """
import sys, torch, transformers
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=bool(int(sys.argv[3])))
with torch.no_grad():
    torch.save(model(torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def regnet(tmp_path_factory) -> Path:
    """Stages of convolutions of one group and of several."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8}
    model = transformers.RegNetForImageClassification(transformers.RegNetConfig(**sizes, layer_type="y", num_labels=3))
    return saved(model, tmp_path_factory.mktemp("regnet"))


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory) -> Path:
    """Depthwise and other convolutions in turns, in one list."""
    torch.manual_seed(0)
    config = transformers.MobileNetV1Config(depth_multiplier=0.25, min_depth=4, image_size=32, num_labels=3)
    model = transformers.MobileNetV1ForImageClassification(config)
    return saved(model, tmp_path_factory.mktemp("mobilenet"))


def saved(model: Any, folder: Path) -> Path:
    """The model's folder, with kernels that keep the size of what they read."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_((2 / parameter[0].numel()) ** 0.5 / parameter.std())
    model.eval().save_pretrained(folder)
    return folder


def same_as_stock(folder: Path, tmp_path: Path, *, trust: bool = False) -> bool:
    done = processes.run(_STOCK, folder, tmp_path / "stock.pt", int(trust), foreign=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        ours = load_model(folder)(torch.linspace(-1, 1, 3 * 32 * 32).sin().view(1, 3, 32, 32)).logits
    assert ours.std() > 0.01  # a model whose weights matter
    return torch.allclose(ours, torch.load(tmp_path / "stock.pt"), rtol=1e-5, atol=1e-6)


def kernels(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {t.name: checkpoint.tensor(t.name).data for t in checkpoint.spec.stored() if len(t.shape) == 4}


def test_the_first_and_depthwise_convolutions_are_no_layers(regnet, mobilenet):
    for folder, many in ((regnet, 12), (mobilenet, 13)):
        layers = {x.name for x in model_map(open_checkpoint(folder).spec).targets}
        shapes = {n: value.shape for n, value in kernels(open_checkpoint(folder)).items()}
        assert layers == {
            n for n, shape in shapes.items() if shape[1] != 1 and "stem" not in n and ".embedder." not in n
        }
        assert len(layers) == many


def test_codes_of_kernels_are_those_of_their_matrices(regnet, tmp_path):
    """Each row of [out, in x positions] is rounded as a row of any matrix; planned bytes are exact; so does stock compute."""
    settings = {"weights": "int4", "method": "rtn", "group_size": 4}
    checkpoint = open_checkpoint(regnet)
    skip = ["*attention*"]
    planned = plan(checkpoint, "cast", **settings, convolutions=True, skip=skip)
    out = compress.apply("cast", regnet, tmp_path / "out", store="compact", skip=skip, **settings)
    _, layout = stored_form(planned, "compact", 10**9, checkpoint.metadata)
    assert (out / SINGLE_NAME).stat().st_size == layout.bytes
    after = open_checkpoint(out)
    coded = {t.name for t in after.spec.stored() if t.quant_format is not None}
    assert coded == {x.name for x in model_map(checkpoint.spec).targets if "attention" not in x.name}
    for name, kernel in kernels(checkpoint).items():
        expected = kernel
        if name in coded:
            codes = rounded(kernel.flatten(1), QuantFormat("int4", 4), torch.float32, search=False)
            expected = dequantize(codes).view(kernel.shape)
        assert torch.equal(after.tensor(name).data, expected), name
    assert same_as_stock(out, tmp_path, trust=True)


def test_a_stock_checkpoint_holds_no_codes_of_kernels(regnet, tmp_path):
    with pytest.raises(CompressError, match=r"kernels of convolutions, such as .*use `store: compact`"):
        compress.apply("cast", regnet, tmp_path / "no", weights="int8", method="rtn")


@pytest.mark.slow
def test_depthwise_kernels_are_cast_where_they_are_named(mobilenet, tmp_path):
    only = ["mobilenet_v1.layer.0.convolution", "mobilenet_v1.conv_stem.convolution"]
    out = compress.apply("cast", mobilenet, tmp_path / "out", weights="int8", method="mse", only=only, store="compact")
    assert {t.module for t in open_checkpoint(out).spec.stored() if t.quant_format is not None} == {*only}
    assert same_as_stock(out, tmp_path, trust=True)


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_magnitude_removes_the_smallest_of_each_kernel(regnet, tmp_path, amount):
    """Of a pattern N:M, groups run along [in x positions] of each output."""
    out = compress.apply(
        "prune_unstructured", regnet, tmp_path / "out", method="magnitude", skip=["*attention*"], **amount
    )
    before, after = open_checkpoint(regnet), open_checkpoint(out)
    targets = {x.name for x in model_map(before.spec).targets if "attention" not in x.name}
    for name, kernel in kernels(before).items():
        groups = kernel.flatten(1).reshape(-1, 4) if "pattern" in amount else kernel.reshape(1, -1)
        largest = groups.abs().topk(groups.shape[1] // 2, dim=1).indices
        kept = torch.zeros_like(groups).scatter_(1, largest, 1).view(kernel.shape)
        assert torch.equal(after.tensor(name).data, kernel * kept if name in targets else kernel), name
    assert same_as_stock(out, tmp_path)


def test_linear_layers_of_other_classes_have_codes_in_compact_checkpoints(tmp_path):
    """I-BERT's `QuantLinear` is no `Linear` of torch; compressed-tensors would not find it."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.IBertModel(transformers.IBertConfig(**sizes, vocab_size=40)).save_pretrained(tmp_path / "in")
    with pytest.raises(CompressError, match=r"stock loaders do not read int8 codes .*use `store: compact`"):
        compress.apply("cast", tmp_path / "in", tmp_path / "no", weights="int8", method="rtn")
    out = compress.apply("cast", tmp_path / "in", tmp_path / "out", weights="int8", method="rtn", store="compact")
    assert sum(t.quant_format is not None for t in open_checkpoint(out).spec.stored()) == 6
