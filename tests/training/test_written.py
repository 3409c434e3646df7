"""Every weight that training changes has its place in the file."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.models.loading import load_checkpoint
from compress.training.file_names import file_names
from tests import pico


@pytest.mark.parametrize("family", [f for f in pico.FAMILIES if f not in ("t5", "vit")])
def test_file_names_places_every_weight(tmp_path, family):
    checkpoint = open_checkpoint(pico.save(tmp_path / "model", family))
    model = load_checkpoint(checkpoint, dtype="float32")
    places = file_names(checkpoint.spec, model)
    assert not places.kept
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    found, buffers = places.tensors(model, model.state_dict()), {name for name, _ in model.named_buffers()}
    for tensor in checkpoint.spec.stored():
        floats = torch.is_floating_point(checkpoint.tensor(tensor.name).data)
        moved = 1 if floats and tensor.name not in buffers else 0
        assert torch.equal(found[tensor.name], checkpoint.tensor(tensor.name).data + moved), tensor.name


def test_file_names_refuses_weights_without_a_place(pico_llama):
    checkpoint = open_checkpoint(pico_llama)
    model = load_checkpoint(checkpoint, dtype="float32")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        PassError, match=r"transformers writes extra\.weight, which the file does not have.*from_pretrained"
    ):
        file_names(checkpoint.spec, model)
    del model.extra
    model.lm_head = torch.nn.Linear(32, 7, bias=False)
    with pytest.raises(
        PassError, match=r"transformers writes lm_head\.weight as \[7, 32\], and the file has \[300, 32\]"
    ):
        file_names(checkpoint.spec, model)
