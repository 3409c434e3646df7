"""Convolutions in calibrated passes: their Hessian is that of the unfolded input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import compress
from compress.architectures.model_map import model_map
from compress.blockwise.kernels import is_kernel, patches
from compress.checkpoint.open import open_checkpoint
from compress.models.loading import load_model
from compress.solvers.hessian import inverse_factor
from compress.solvers.sparsegpt import sparsegpt
from tests.passes.test_convolutions import same_as_stock, saved


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (torch.nn.Conv2d(3, 5, 3, stride=2, padding=(1, 2), dilation=(2, 1)), (2, 3, 11, 9)),
        (torch.nn.Conv2d(3, 5, (3, 5), padding="same", padding_mode="reflect"), (2, 3, 8, 8)),
        (torch.nn.Conv1d(4, 6, 4, padding="same", dilation=2), (2, 4, 9)),
        (torch.nn.Conv1d(4, 6, 1, stride=2), (2, 4, 7)),
    ],
)
def test_patches_times_kernel_are_the_outputs_of_a_convolution(conv, shape):
    assert is_kernel(conv)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = conv(x).movedim(1, -1).reshape(-1, conv.out_channels)
        found = patches(conv, x) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(found, expected)


def test_convolutions_that_compute_something_else_are_no_kernels():
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    odd = WeightStandardizedConv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 1, groups=2), torch.nn.ConvTranspose2d(4, 4, 1)
    assert not any(map(is_kernel, odd))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic", "num_labels": 3}
    folder = saved(
        transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)), tmp_path_factory.mktemp("resnet")
    )
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pixels = torch.randint(0, 256, (8, 32 * 32 * 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, picture in enumerate(pixels):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        image = Image.frombytes("RGB", (32, 32), picture.numpy().tobytes())
        image.save(folder / str(number % 2) / f"{number}.png")
    return folder


@pytest.mark.slow
def test_sparsegpt_of_kernels_equals_a_solver_on_unfolded_inputs(resnet, images, tmp_path):
    """The first convolution of the first block, on the inputs that transformers gives it, unfolded by torch."""
    settings = {"method": "sparsegpt", "sparsity": 0.5, "reconstruction_epochs": 0}
    out = compress.apply("prune_unstructured", resnet, tmp_path / "out", data=images, samples=8, **settings)
    model = load_model(resnet, dtype="float32")
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    read: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    processor = transformers.ViTImageProcessorPil.from_pretrained(resnet)
    pictures = [Image.open(path) for path in sorted(images.rglob("*.png"))]
    with torch.no_grad():
        model(processor(pictures, return_tensors="pt")["pixel_values"])
    conv = model.get_submodule(name)
    x = torch.nn.functional.unfold(read[0], 3, padding=1, stride=conv.stride).transpose(1, 2).flatten(0, 1).double()
    kernel = conv.weight.detach()
    weight, mask = sparsegpt(kernel.flatten(1).contiguous(), inverse_factor(x.T @ x)[0].float(), sparsity=0.5)
    pruned = open_checkpoint(out).tensor(f"{name}.weight")
    assert torch.equal(pruned.mask, mask.view(kernel.shape))
    torch.testing.assert_close(pruned.data, weight.masked_fill(~mask, 0).view(kernel.shape), rtol=1e-3, atol=1e-4)
    assert same_as_stock(out, tmp_path)


@pytest.mark.slow
def test_gptq_of_kernels_loses_less_than_rounding(resnet, images, tmp_path):
    common = {"weights": "int3", "store": "compact"}
    alone = {"error_correction": [], "reconstruction_epochs": 0}
    compress.apply("cast", resnet, tmp_path / "rtn", method="rtn", **common)
    compress.apply("cast", resnet, tmp_path / "gptq", data=images, samples=8, **alone, **common)
    compress.apply("cast", resnet, tmp_path / "all", data=images, samples=8, **common)
    targets = {x.name for x in model_map(open_checkpoint(resnet).spec).targets}
    for folder in ("gptq", "all"):
        assert {t.name for t in open_checkpoint(tmp_path / folder).spec.stored() if t.quant_format} == targets
    processor = transformers.ViTImageProcessorPil.from_pretrained(resnet)
    pixels = processor([Image.open(p) for p in sorted(images.rglob("*.png"))], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        original = load_model(resnet)(pixels).logits
        errors = {
            name: float((load_model(tmp_path / name)(pixels).logits - original).square().mean())
            for name in ("rtn", "gptq", "all")
        }
    print(errors)
    assert errors["gptq"] < 0.7 * errors["rtn"]
    assert errors["all"] < 0.7 * errors["rtn"]
    assert same_as_stock(tmp_path / "gptq", tmp_path, trust=True)
