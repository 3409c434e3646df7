"""Fewer experts for each token: the config, the scaled down projections, and what is refused."""

import json

import pytest
import torch

from compress.architectures.model_map import model_map
from compress.checkpoint.older_keys import without_older_keys
from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_model
from tests import pico
from tests.toolbox import apply, plan, write

IDS = torch.randint(0, 250, (8, 16), generator=torch.Generator().manual_seed(0))


def lowered(folder, tmp_path, details=None, **settings):
    """The checkpoint with one of three experts fewer, written."""
    original = open_checkpoint(folder)
    settings = {"active_experts": 2, "compensation": "least_squares", **settings}
    result = apply(
        original,
        "prune_structured",
        data=Batches(IDS),
        work=tmp_path / "work",
        details={} if details is None else details,
        **settings,
    )
    planned = plan(original, "prune_structured", **settings)
    written = write(result, tmp_path / "out")
    assert planned.exact
    assert planned.tensors == written.spec.tensors
    assert model_map(planned).active_parameters == model_map(written.spec).active_parameters
    return written


def scaled(folder, shares, active=2):
    """Stock transformers' original with another number of experts for each token, and scaled down projections."""
    model = load_model(folder)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.top_k = active
            layer.mlp.experts.down_proj.data /= shares.get(str(index), 1.0)
    return model


def test_mixtral_changes_the_config_alone(tmp_path):
    """Its router divides the weights by their sum, so nothing is lost."""
    folder = pico.folder("mixtral", num_experts_per_tok=3)
    details: dict = {}
    out = lowered(folder, tmp_path, details)
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, out.folder))
    assert without_older_keys(after) == {**before, "num_experts_per_tok": 2}
    assert details["active_experts"] == {"before": 3, "after": 2}
    original = open_checkpoint(folder)
    assert all(torch.equal(out.tensor(n).data, original.tensor(n).data) for n in original.spec.tensors)
    torch.testing.assert_close(pico.logits(load_model(out.folder)), pico.logits(scaled(folder, {})))


def test_lost_router_weights_go_into_the_down_projections(tmp_path):
    """Shares by hooks on the stock model; block 1 has no experts."""
    folder = pico.folder("qwen3_moe", num_experts_per_tok=3)
    details: dict = {}
    out = lowered(folder, tmp_path, details)
    shares = details["router_mass_kept"]
    assert shares.keys() == {"0", "2", "3"}
    model, seen = load_model(folder), {}
    for index in (0, 2, 3):
        gate = model.model.layers[index].mlp.gate
        gate.register_forward_hook(lambda module, args, output, index=index: seen.update({index: output[1]}))
    with torch.no_grad():
        model(input_ids=IDS)
    for index, weights in seen.items():
        assert shares[str(index)] == pytest.approx(float((weights[:, :2].sum(1) / weights.sum(1)).mean()), rel=1e-5)
        assert shares[str(index)] < 0.95
    torch.testing.assert_close(pico.logits(load_model(out.folder)), pico.logits(scaled(folder, shares)))


@pytest.mark.parametrize("settings", [{"compensation": "none"}, {}])
def test_weights_stay_without_compensation_and_where_the_config_normalises(settings, tmp_path):
    folder = pico.folder("qwen3_moe", num_experts_per_tok=3, norm_topk_prob=not settings)
    out, original = lowered(folder, tmp_path, **settings), open_checkpoint(folder)
    assert all(torch.equal(out.tensor(n).data, original.tensor(n).data) for n in original.spec.tensors)


@pytest.mark.slow
def test_carved_experts_keep_their_sum(tmp_path):
    """Each of k chosen experts has the weight 1/k, for which its down projection is k times as large."""
    carved = apply(
        open_checkpoint(pico.folder("llama")), "carve_experts", data=Batches(IDS), work=tmp_path / "carving",
        active="88%", experts=4, repair="none",
    )  # fmt: skip
    folder = write(carved, tmp_path / "carved").folder
    assert carved.spec.structure.config["num_experts_per_tok"] == 3
    out = lowered(folder, tmp_path)
    torch.testing.assert_close(
        pico.logits(load_model(out.folder)), pico.logits(scaled(folder, {str(block): 3 / 2 for block in range(4)}))
    )


@pytest.mark.slow
def test_experts_go_after_each_token_has_fewer(tmp_path):
    """Two of four may stay where a token has two instead of three; blocks are then tuned towards the original."""
    folder = pico.folder("qwen3_moe", num_experts_per_tok=3)
    details: dict = {}
    out = lowered(folder, tmp_path, details, experts=2, compensation="reconstruction", reconstruction_epochs=4)
    config = out.spec.structure.config
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    tuned = [row["tuning"] for row in details["blocks"]]
    assert len(tuned) == 4
    assert tuned[0]["after"] < tuned[0]["before"]


@pytest.mark.parametrize(
    ("family", "changes", "active", "message"),
    [
        ("llama", {}, 1, "llama has no experts"),
        ("mixtral", {}, 2, "each token is sent to 2 experts, and 2 is not fewer; give a count from 1 to 1"),
        ("mixtral", {}, 9, "each token is sent to 2 experts, and 9 is not fewer"),
        ("qwen3_moe", {}, 1, "each token is sent to 1 experts, and 1 is not fewer; leave `active_experts` out"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, 1, "no block of this model has experts"),
    ],
)
def test_active_experts_refuses_what_is_not_fewer(family, changes, active, message):
    with pytest.raises(PassError, match=message) as caught:
        plan(open_checkpoint(pico.folder(family, **changes)), "prune_structured", active_experts=active)
    assert caught.value.key == "active_experts"


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "100%", True])
def test_active_experts_is_a_count_or_a_share(wrong):
    from compress.passes.prune_structured.settings import PruneStructuredSettings

    with pytest.raises(ValueError, match="active_experts"):
        PruneStructuredSettings(active_experts=wrong)
