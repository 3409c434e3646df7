from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.data.given_inputs import given_inputs
from compress.errors import DataError, PassError
from compress.models.pico import pico_model
from compress.models.shrink import default_config, shrunken

IDS = torch.arange(10, 34).view(3, 8)
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SPARSE = {"method": "sparsegpt", "sparsity": 0.5}


def test_given_inputs_tells_padding_by_the_mask():
    mask = torch.ones(3, 8, dtype=torch.long)
    assert given_inputs({"input_ids": IDS, "attention_mask": mask}).mask is None
    mask[0, 5:] = 0
    drawn = given_inputs({"input_ids": IDS, "attention_mask": mask, "pixel_values": PIXELS}, samples=2)
    assert drawn.mask is not None
    assert int(drawn.mask.sum()) == 13
    assert {name: len(value) for name, value in drawn.values.items()} == {"input_ids": 2, "pixel_values": 2}
    assert drawn.inputs("cpu").keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert [len(part.inputs("cpu")["pixel_values"]) for part in drawn.parts(8)] == [1, 1]
    assert drawn.sha256() != given_inputs({"input_ids": IDS, "attention_mask": mask}, samples=2).sha256()


@pytest.mark.parametrize(
    ("values", "samples", "message"),
    [
        ({}, None, "holds no inputs"),
        ({"input_ids": [[1]]}, None, "`input_ids` is no tensor"),
        ({"input_ids": IDS, "pixel_values": PIXELS[:2]}, None, "`input_ids` has 3 samples, `pixel_values` has 2"),
        ({"input_ids": IDS}, 4, "holds 3 samples, 4 are asked for"),
        ({"input_ids": IDS[:0]}, None, "holds 0 samples, 1 are asked for"),
    ],
)
def test_given_inputs_refuses(values, samples, message):
    with pytest.raises(DataError, match=message):
        given_inputs(values, samples)


def test_inputs_by_name_calibrate_as_ids_do(pico_llama, tmp_path):
    compress.apply("prune_unstructured", pico_llama, tmp_path / "ids", data=IDS, **SPARSE)
    compress.apply("prune_unstructured", pico_llama, tmp_path / "named", data={"input_ids": IDS}, **SPARSE)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ids", "named")]
    assert files[0] == files[1]
    with pytest.raises(DataError, match="LlamaForCausalLM reads no `pixel_values`"):
        compress.apply(
            "prune_unstructured", pico_llama, tmp_path / "x", data={"input_ids": IDS, "pixel_values": PIXELS}, **SPARSE
        )
    with pytest.raises(DataError, match="`length` is no setting of inputs by name"):
        compress.apply("prune_unstructured", pico_llama, tmp_path / "x", data={"input_ids": IDS}, length=4, **SPARSE)


@pytest.mark.slow
def test_images_and_texts_calibrate_together(tmp_path):
    """A captioner, whose decoder reads what its vision model makes of the image: text alone is refused."""
    model = pico_model(transformers.BlipForConditionalGeneration, shrunken(default_config("blip")))
    model.save_pretrained(tmp_path / "model")
    inputs = {"input_ids": IDS, "pixel_values": PIXELS}
    compress.apply("prune_unstructured", tmp_path / "model", tmp_path / "out", data=inputs, **SPARSE)
    small = transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    blocks = small.text_decoder.bert.encoder.layer
    zeros = [float((m.weight == 0).float().mean()) for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert len(zeros) == 3 * 10
    assert all(0.3 < zero < 0.7 for zero in zeros), zeros
    ours = compress.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, ours(**inputs).logits)
    with pytest.raises(PassError, match="pixel_values"):
        compress.apply("prune_unstructured", tmp_path / "model", tmp_path / "x", data=IDS, **SPARSE)
