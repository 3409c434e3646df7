from __future__ import annotations

import pytest
import torch

from compress import architectures, passes
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived, Value
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import apply, plan, write


def test_remove_layers_cuts_config_and_per_layer_lists(tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / "in", "qwen2"))
    kinds = checkpoint.spec.structure.config["layer_types"]
    assert kinds == ["full_attention"] * 2 + ["sliding_attention"] * 2
    out = write(apply(checkpoint, "prune_structured", layers=[1], compensation="none"), tmp_path / "out")
    assert out.spec.structure.config["num_hidden_layers"] == 3
    assert out.spec.structure.config["layer_types"] == ["full_attention"] + ["sliding_attention"] * 2
    model = load_model(out.folder)
    assert [b.self_attn.layer_idx for b in model.model.layers] == [0, 1, 2]


OUTPUTS = (
    "o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h", "out_proj", "fc2", "output.dense",
    "w2", "out_lin", "lin2",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert")


@pytest.mark.parametrize(
    "family",
    pico.families(
        ["llama", "gemma2", "mixtral", "qwen3_moe", "gpt2", "bloom", "gpt_neox", "opt", *ENCODERS],
        tier=("gemma2", "gpt2", "bert"),
    ),
)
@pytest.mark.parametrize("importance", ["kl", "block_influence"])
def test_remove_layers_by_count_takes_least_influential_block(family, importance, tmp_path):
    """Block 2 is made to do almost nothing, so it must be the one to go; its influence is checked against a plain forward."""
    base = open_checkpoint(pico.save(tmp_path / "in", family))
    record = architectures.of(base.spec.structure.config)

    def quiet(name: str) -> Value:
        value = base.tensor(name)
        if record.block_index(name) != 2:
            return value
        if any(part in name for part in OUTPUTS):
            return Value(value.data * 1e-4)
        if family in ENCODERS and "norm" in name.lower():
            return Value(torch.ones_like(value.data) if name.endswith("weight") else torch.zeros_like(value.data))
        if family == "gemma2" and name.partition(".post_")[2]:  # norms after the outputs; they scale by 1 + weight
            return Value(torch.full_like(value.data, -1 + 1e-4))
        return value

    quieted = write(Derived(base, base.spec, quiet), tmp_path / "quiet")
    ids = torch.randint(0, 250, (6, 16), generator=torch.Generator().manual_seed(0))
    details: dict = {}
    dropped = apply(
        quieted,
        "prune_structured",
        layers=1,
        layer_importance=importance,
        compensation="none",
        data=Batches(ids),
        details=details,
        work=tmp_path,
    )
    assert details["removed_blocks"] == [2]
    assert record.depth(dropped.spec.structure.config) == 3
    if importance == "kl":
        return
    model = load_model(quieted.folder)
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    cosine = torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1)
    assert details["block_influence"][1] == pytest.approx(1 - cosine.mean().item(), abs=1e-5)


def test_remove_layers_takes_models_of_images():
    checkpoint = open_checkpoint(pico.folder("vit"))
    for layers in (1, [1]):
        planned = plan(checkpoint, "prune_structured", layers=layers, compensation="none")
        assert planned.structure.config["num_hidden_layers"] == 3


def test_remove_layers_takes_shares_and_counts(pico_llama):
    checkpoint = open_checkpoint(pico_llama)
    for amount, left in ((0.5, 2), ("25%", 3), (3, 1), ([0, 1, 2], 1)):
        assert (
            plan(checkpoint, "prune_structured", layers=amount, compensation="none").structure.config[
                "num_hidden_layers"
            ]
            == left
        )


def test_plan_of_chosen_blocks_says_how_many_sets_are_tried():
    """And its memory is that of one block, where blocks are chosen by trials."""
    instance = passes.get("prune_structured")
    specs = [open_checkpoint(pico.folder("llama", num_hidden_layers=depth)).spec for depth in (4, 24)]
    settings = instance.settings(layers=2)
    said = "choosing 2 of 4 blocks tries at most 10 sets, each on at most 32 samples"  # 4, then 3, and 3 pairs
    assert instance.plan_notes(specs[0], settings) == [said]
    assert "tries at most 55 sets" in instance.plan_notes(specs[1], settings)[0]  # 24, then 23, and 8 of 23 pairs
    assert instance.plan_notes(specs[0], instance.settings(layers=[1])) == []
    for repair in ("none", "reconstruction"):
        few, many = (instance.memory(spec, instance.settings(layers=2, compensation=repair), 4) for spec in specs)
        assert few == many


def test_memory_counts_the_head_where_predictions_are_compared():
    instance = passes.get("prune_structured")
    for family, more in (("llama", True), ("vit", False)):
        spec = open_checkpoint(pico.folder(family)).spec
        best, usual = (instance.memory(spec, instance.settings(mlp=0.25, effort=e), 4) for e in ("best", "balanced"))
        assert (best > usual) == more


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (4, "cannot remove 4 of 4 blocks; at most 3 can go"),
        ("10%", "10% of 4 blocks rounds to none"),
        ([4], "there is no block 4: the model has 4, numbered from 0"),
        ([0, 1, 2, 3], "cannot remove all 4 blocks"),
    ],
)
def test_prune_structured_refuses_bad_settings(layers, message, pico_llama):
    with pytest.raises(PassError, match=message) as caught:
        plan(open_checkpoint(pico_llama), "prune_structured", layers=layers, compensation="none")
    assert caught.value.key == "layers"


def test_prune_structured_refuses_patterns(pico_llama):
    with pytest.raises(PassError, match="do not apply to units that go from every block"):
        plan(open_checkpoint(pico_llama), "prune_structured", layers=1, compensation="none", only=["*"])
