"""Units chosen and repaired by calibration data."""

from __future__ import annotations

import json

import pytest
import torch

from compress.blockwise.memory_budget import HELD_OUT
from compress.blockwise.predictions import divergence
from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import apply, plan, write

TEXT = [f for f in pico.ONE_LIST if f != "vit"]
#: Plain, with experts, transposed, with blocks alone to remove, and an encoder: each method is run on these at every commit.
REPAIRED = ("llama",)
IDS = torch.randint(0, 250, (96, 16), generator=torch.Generator().manual_seed(0))
TEST = torch.randint(0, 250, (8, 16), generator=torch.Generator().manual_seed(1))


def states(folder) -> torch.Tensor:
    """Last hidden states of the test samples."""
    model = load_model(folder)
    with torch.no_grad():
        return model(input_ids=TEST, output_hidden_states=True).hidden_states[-1]


def error(folder, original) -> float:
    before, after = states(original), states(folder)
    return float((after - before).square().sum() / (before - before.mean()).square().sum())


def smaller(original, folder, *, details=None, **settings):
    """Units removed with the calibration samples, written to a folder; the sweep works beside it."""
    made = apply(
        original,
        "prune_structured",
        data=Batches(IDS),
        work=folder.with_name(f"{folder.name}-work"),
        details=details,
        **settings,
    )
    return write(made, folder)


def amounts(family: str) -> dict:
    return {"layers": [1]} if family == "bloom" else {"mlp": "50%"}


@pytest.mark.slow
@pytest.mark.parametrize("family", pico.families(TEXT, tier=REPAIRED))
def test_compensation_methods_lower_the_error_in_turn(family, folders, tmp_path):
    original = open_checkpoint(folders[family])
    errors, layers = {}, {}
    for compensation in ("none", "least_squares", "reconstruction"):
        if family == "bloom" and compensation == "least_squares":
            continue
        details: dict = {}
        out = smaller(
            original,
            tmp_path / compensation,
            details=details,
            compensation=compensation,
            reconstruction_epochs=5,
            **amounts(family),
        )
        assert (
            plan(original, "prune_structured", compensation=compensation, **amounts(family)).tensors == out.spec.tensors
        )
        errors[compensation] = error(out.folder, folders[family])
        layers[compensation] = {n: row["error"] for n, row in details.get("blocks", [{}])[0].get("tensors", {}).items()}
        assert json.loads(json.dumps(details)) == details
        if compensation == "reconstruction":
            assert any(row["tuning"]["kept"] for row in details["blocks"])
    # random routers send tokens elsewhere after the least change
    assert errors["reconstruction"] < (1.0 if family in ("mixtral", "qwen3_moe") else 0.9) * errors["none"]
    if "least_squares" in errors:
        assert errors["least_squares"] < 1.01 * errors["none"]
        for name, error_before in layers["none"].items():
            assert layers["least_squares"][name] < 0.9 * error_before


@pytest.mark.slow
@pytest.mark.parametrize("family", pico.families(["llama", "gpt2", "phi3", "gemma2"], tier=("llama",)))
def test_last_block_is_trained_towards_predictions(family, folders, tmp_path):
    """The last block's row holds the divergence of the whole model on the held-out samples; other blocks are as without it."""
    original, settings = open_checkpoint(folders[family]), {"mlp": "50%", "effort": "best", "reconstruction_epochs": 2}
    rows, folder = {}, {}
    for target in ("outputs", "predictions"):
        details: dict = {}
        out = smaller(original, tmp_path / target, details=details, reconstruction_target=target, **settings)
        rows[target], folder[target] = [block["tuning"] for block in details["blocks"]], out.folder
    before, after = rows["outputs"], rows["predictions"]
    assert [row["after"] for row in before[:-1]] == [row["after"] for row in after[:-1]]
    order = torch.Generator().manual_seed(len(before) - 1)
    held = IDS[torch.randperm(len(IDS), generator=order)[: round(HELD_OUT * len(IDS))]]
    kl = {}
    with torch.no_grad():
        expected = load_model(folders[family])(input_ids=held).logits
        for target, out in folder.items():
            kl[target] = float(divergence(expected, load_model(out)(input_ids=held).logits, None)) / held.numel()
    assert after[-1]["after"] == pytest.approx(kl["predictions"], rel=1e-3)
    assert kl["predictions"] < after[-1]["before"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_importance_by_loss_beats_activation_and_magnitude(family, folders, tmp_path):
    original = open_checkpoint(folders[family])
    errors = {}
    for score in ("obs", "activation", "magnitude"):
        out = smaller(original, tmp_path / score, importance=score, mlp="50%", compensation="least_squares")
        errors[score] = error(out.folder, folders[family])
    assert errors["obs"] < errors["activation"]
    assert errors["obs"] < errors["magnitude"]


@pytest.mark.slow
def test_prune_structured_removes_every_kind_at_once(tmp_path):
    """Blocks, experts, hidden channels, heads and neurons in one pass: planned, loaded, nearer to the original when repaired."""
    folder = pico.save(tmp_path / "in", "qwen3_moe", with_tokenizer=False)
    original = open_checkpoint(folder)
    settings = {"layers": 1, "experts": 1, "hidden": 8, "heads": 2, "mlp": "25%", "multiple_of": 4}
    errors = {}
    for compensation in ("none", "reconstruction"):
        out = smaller(original, tmp_path / compensation, compensation=compensation, **settings)
        config = out.spec.structure.config
        assert config["num_hidden_layers"] == 3
        assert config["num_local_experts"] == 3
        assert config["hidden_size"] == 24
        assert config["num_attention_heads"] == 2
        assert config["moe_intermediate_size"] == 24
        before, after = (load_model(f)(input_ids=TEST).logits.detach() for f in (folder, out.folder))
        errors[compensation] = float((after - before).square().mean())
    assert errors["reconstruction"] < errors["none"]


def test_compensation_covers_a_removed_block(tmp_path):
    """The block before the gap moves towards what the original has after it."""
    folder = pico.save(tmp_path / "in", "llama", with_tokenizer=False)
    original = open_checkpoint(folder)
    errors, details = {}, {}
    for compensation in ("none", "least_squares", "reconstruction"):
        details = {}
        out = smaller(original, tmp_path / compensation, details=details, layers=[2], compensation=compensation)
        errors[compensation] = error(out.folder, folder)
        if compensation == "least_squares":
            gap = details["blocks"][1]["gap"]
            assert gap["matrix"] == "model.layers.1.mlp.down_proj.weight"
            assert gap["after"] < gap["before"]
            assert [row["block"] for row in details["blocks"] if "gap" in row] == [1]
            for name in out.spec.tensors:
                kept = name.replace("layers.2.", "layers.3.")  # the last block moves up
                same = torch.equal(out.tensor(name).data, original.tensor(kept).data)
                assert same == (name != gap["matrix"]), name
    assert errors["least_squares"] < errors["none"]
    assert errors["reconstruction"] < 0.9 * errors["none"]
    tuned = [row["block"] for row in details["blocks"] if "tuning" in row]
    assert tuned == [1, 2]  # block 0 has nothing to make up for


def test_greedy_layer_removal_matches_trying_each(tmp_path):
    """The first block to go is the one whose bypass changes the predictions least, by a plain forward."""
    from tests.toolbox import bypass

    folder = pico.save(tmp_path / "in", "llama", with_tokenizer=False)
    details: dict = {}
    apply(
        open_checkpoint(folder),
        "prune_structured",
        data=Batches(IDS),
        work=tmp_path,
        details=details,
        layers=2,
        compensation="none",
    )
    with torch.no_grad():
        reference = load_model(folder)(input_ids=IDS[:32]).logits.log_softmax(-1)
        losses = []
        for number in range(4):
            model = load_model(folder)
            bypass(model, [number])
            found = model(input_ids=IDS[:32]).logits.log_softmax(-1)
            losses.append(float((reference.exp() * (reference - found)).sum(-1).mean()))
    said = details["loss_without_block"][0]
    assert [said[str(i)] for i in range(4)] == pytest.approx(losses, rel=1e-4)
    assert losses.index(min(losses)) in details["removed_blocks"]
    assert len(details["samples_without_block"][1]) == 3
    assert details["samples_without_block"][0]["0"] == 32


@pytest.mark.slow
def test_prune_structured_ignores_padding(tmp_path):
    """Padded samples give the same model as the same tokens without padding."""
    folder = pico.save(tmp_path / "in", "bert", with_tokenizer=False)
    original = open_checkpoint(folder)
    padded = torch.cat([IDS, torch.full((96, 6), 7)], 1)
    mask = torch.cat([torch.ones(96, 16), torch.zeros(96, 6)], 1).bool()
    settings = {"mlp": 32, "compensation": "least_squares"}
    plain = apply(original, "prune_structured", data=Batches(IDS), work=tmp_path / "a", **settings)
    other = apply(original, "prune_structured", data=Batches(padded, mask), work=tmp_path / "b", **settings)
    for name in plain.spec.tensors:
        torch.testing.assert_close(plain.tensor(name).data, other.tensor(name).data, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_prune_structured_resumes_between_blocks(tmp_path, monkeypatch):
    from compress.passes.prune_structured import block

    original = open_checkpoint(pico.save(tmp_path / "in", "llama", with_tokenizer=False))
    settings = {"layers": [2], "mlp": "25%", "heads": 2, "reconstruction_epochs": 1}
    whole = smaller(original, tmp_path / "whole", **settings)
    real, calls = block.prune_block_width, []

    def stops(block, how):
        calls.append(block.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(block, how)

    with monkeypatch.context() as patch:
        patch.setattr("compress.passes.prune_structured.remove.prune_block_width", stops)
        with pytest.raises(KeyboardInterrupt):
            smaller(original, tmp_path / "broken", **settings)
    resumed = smaller(original, tmp_path / "broken", **settings)
    weights = "model.safetensors"
    assert (whole.folder / weights).read_bytes() == (resumed.folder / weights).read_bytes()


@pytest.mark.parametrize(
    ("family", "settings", "key", "message"),
    [
        ("llama", {"mlp": 64}, "mlp", "cannot remove 64 of 64 neurons; at most 63 can go"),
        ("llama", {"mlp": "0.5%"}, "mlp", "0% of 64 neurons rounds to none"),
        ("llama", {"mlp": 4, "multiple_of": 64}, "multiple_of", "no multiple of 64 near 60 is below the 64 neurons there are"),
        ("llama", {"heads": 4}, "heads", "cannot remove 4 of 4 heads"),
        ("llama", {"heads": 1}, "heads", "1 heads are neither the same number from each of 2 groups, nor whole groups of 2"),
        ("llama", {"experts": 1}, "experts", "llama has no experts"),
        ("mixtral", {"experts": 3}, "experts", "each token is sent to 2 experts, and 1 would stay; at most 2 of 4 can go"),
        ("qwen3_moe", {"mlp": 4}, "mlp", "MLPs of two kinds"),
        ("bloom", {"mlp": 4}, "mlp", "its config has no field for it"),
        ("bert", {"heads": 1}, "heads", "cannot have fewer heads"),
        ("gpt2", {"hidden": 8}, "hidden", "cannot lose hidden width exactly"),
        ("gemma2", {"hidden": 7}, "heads", "wants a number of heads that divides the hidden size 25, and 4 does not"),
    ],
)  # fmt: skip
def test_prune_structured_refuses_bad_settings_by_place(family, settings, key, message, folders):
    with pytest.raises(PassError, match=message) as caught:
        plan(open_checkpoint(folders[family]), "prune_structured", **settings)
    assert caught.value.key == key


def test_records_name_matrices_that_exist(folders):
    """Every family's record leads to an MLP and heads in every block."""
    from compress.architectures import resize

    for family in TEXT:
        spec = open_checkpoint(folders[family]).spec
        assert sorted(resize.mlp_units(spec)) == [0, 1, 2, 3], family
        heads = [one for block in resize.head_units(spec, True).values() for one in block]
        names = {m.module for units in heads for m in units.members}
        assert all(f"{name}.weight" in spec.tensors for name in names), family
