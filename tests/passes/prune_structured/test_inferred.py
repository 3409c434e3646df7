"""Structured pruning of families without a written record: stock transformers computes what zeroing or skipping would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress import architectures
from compress.architectures.groups import Hidden
from compress.architectures.model_map import model_map
from compress.checkpoint.open import open_checkpoint
from compress.errors import PassError
from compress.models.pico import dummy_inputs, pico_model
from compress.models.shrink import default_config, shrunken
from tests import pico
from tests.toolbox import plan

DATA_FREE = {"importance": "magnitude", "compensation": "none"}
FAMILIES = {
    "olmo2": "Olmo2ForCausalLM",
    "falcon": "FalconForCausalLM",
    "glm": "GlmForCausalLM",
    "granite": "GraniteForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "cohere": "CohereForCausalLM",
    "phi": "PhiForCausalLM",
    "helium": "HeliumForCausalLM",
}
#: Those whose neurons alone are tested.
NEURONS = {"ctrl": "CTRLLMHeadModel"}
families = pytest.mark.parametrize("family", pico.families(FAMILIES, tier=("falcon",)))


def save(family: str, folder: Path) -> Path:
    pico_model(
        getattr(transformers, (FAMILIES | NEURONS)[family]), shrunken(default_config(family)), seed=3
    ).save_pretrained(folder)
    return folder


def stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits at once, then of a prompt and single steps."""
    with torch.inference_mode():
        logits, cache = [model(ids).logits], None
        for piece in (ids[:, :4], *torch.split(ids[:, 4:], 1, 1)):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", pico.families([*FAMILIES, *NEURONS], tier=("falcon",)))
def test_neurons_that_go_equal_neurons_that_are_zero(family, tmp_path):
    before = save(family, tmp_path / "in")
    compress.apply("prune_structured", before, tmp_path / "out", mlp=0.25, **DATA_FREE)
    small, twin = stock(tmp_path / "out"), stock(before)
    rest = small.state_dict()
    for name, weight in twin.state_dict().items():
        if weight.ndim == 2 and weight.shape[1] != rest[name].shape[1]:  # it reads the neurons
            kept = (weight.T[:, None] == rest[name].T[None]).all(-1).any(1)
            assert kept.sum() == rest[name].shape[1] == 72
            weight[:, ~kept] = 0
    ids = dummy_inputs(twin, 20)["input_ids"]
    torch.testing.assert_close(outputs(small, ids), outputs(twin, ids), rtol=1e-4, atol=1e-4)
    assert (outputs(stock(before), ids) - outputs(small, ids)).abs().max() > 0.01


@families
def test_a_block_that_goes_equals_a_block_that_adds_nothing(family, tmp_path):
    before = save(family, tmp_path / "in")
    compress.apply("prune_structured", before, tmp_path / "out", layers=(1,), **DATA_FREE)
    small, twin = stock(tmp_path / "out"), stock(before)
    base = twin.transformer.h if family == "falcon" else twin.model.layers
    whole = base[1].forward
    base[1].forward = lambda hidden, *args, **kwargs: (
        (hidden, *out[1:]) if isinstance(out := whole(hidden, *args, **kwargs), tuple) else hidden
    )
    ids = dummy_inputs(twin, 20)["input_ids"]
    torch.testing.assert_close(outputs(small, ids), outputs(twin, ids), rtol=1e-4, atol=1e-4)


def test_heads_go_where_a_config_has_their_width(tmp_path):
    before = save("glm", tmp_path / "in")
    compress.apply("prune_structured", before, tmp_path / "out", heads=0.5, **DATA_FREE)
    assert stock(tmp_path / "out").config.num_attention_heads == 2
    with pytest.raises(PassError, match="normalises the queries and keys of all heads together"):
        plan(open_checkpoint(save("olmo2", tmp_path / "olmo2")), "prune_structured", heads=0.5, **DATA_FREE)
    pico_model(transformers.StableLmForCausalLM, shrunken(default_config("stablelm"))).save_pretrained(tmp_path / "lm")
    with pytest.raises(
        PassError, match=r"no other number of heads .*layers.0.self_attn.k_proj.weight \(\[32, 64\] in the files, \[64,"
    ):
        plan(open_checkpoint(tmp_path / "lm"), "prune_structured", heads=1, **DATA_FREE)
    pico_model(transformers.ArceeForCausalLM, shrunken(default_config("arcee"))).save_pretrained(tmp_path / "arcee")
    with pytest.raises(PassError, match=r"arcee takes no config with 3 of 4 heads; set `heads: 2`") as error:
        plan(open_checkpoint(tmp_path / "arcee"), "prune_structured", heads=1, **DATA_FREE)
    assert error.value.key == "heads"


def test_what_only_a_written_record_proves_is_refused(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(save("glm", tmp_path / "in"))
    with pytest.raises(PassError, match="`keep_kv_heads` needs a written record, and glm has none"):
        plan(checkpoint, "prune_structured", keep_kv_heads=1, **DATA_FREE)
    hidden = Hidden(norms=("input_layernorm", "post_attention_layernorm"))
    edited = replace(model_map(checkpoint.spec).record, hidden=hidden)  # as a saved record may be
    monkeypatch.setattr(architectures, "find", lambda config: edited)
    with pytest.raises(PassError, match="`hidden` needs a written record, and glm has none"):
        plan(open_checkpoint(tmp_path / "in"), "prune_structured", hidden=0.25, **DATA_FREE)


def test_fewer_active_experts_are_made_up_for_where_the_config_tells_by_how_much(tmp_path):
    """Jamba does not divide the weights of a token's experts by their sum, and its config has no field for it."""
    config = shrunken(default_config("jamba"))
    pico_model(transformers.JambaForCausalLM, config).save_pretrained(tmp_path)
    with pytest.raises(
        PassError, match="the config of jamba does not say whether the weights of a token's experts are di"
    ):
        plan(open_checkpoint(tmp_path), "prune_structured", active_experts=1)
    planned = plan(open_checkpoint(tmp_path), "prune_structured", active_experts=1, **DATA_FREE)
    assert planned.structure.config["num_experts_per_tok"] == config.num_experts_per_tok - 1 == 1


def test_numbers_of_blocks_follow_when_blocks_go(tmp_path):
    """Blocks without experts come first; a class of decoder alone has no use for its attention to an encoder."""
    config = shrunken(default_config("glm4_moe"))
    assert config.first_k_dense_replace == 1
    pico_model(transformers.Glm4MoeForCausalLM, config).save_pretrained(tmp_path / "in")
    for block, dense in ((0, 0), (1, 1)):
        after = plan(open_checkpoint(tmp_path / "in"), "prune_structured", layers=(block,), **DATA_FREE)
        assert after.structure.config["first_k_dense_replace"] == dense
        assert after.structure.config["num_hidden_layers"] == config.num_hidden_layers - 1


def test_a_block_that_depends_on_its_number_is_refused(tmp_path):
    pico_model(transformers.DiffLlamaForCausalLM, shrunken(default_config("diffllama"))).save_pretrained(tmp_path)
    with pytest.raises(PassError, match=r"cannot lose `layers` by its inferred record: without block 0 .* differ by"):
        plan(open_checkpoint(tmp_path), "prune_structured", layers=(1,), **DATA_FREE)


def test_the_last_block_of_a_kind_is_kept_where_the_class_needs_one(tmp_path):
    pico_model(transformers.BambaForCausalLM, shrunken(default_config("bamba"))).save_pretrained(tmp_path)
    with pytest.raises(PassError, match="bamba does not run without the last block of a kind"):
        plan(open_checkpoint(tmp_path), "prune_structured", layers=(1,), **DATA_FREE)
    assert plan(open_checkpoint(tmp_path), "prune_structured", layers=(2,), **DATA_FREE)


@pytest.mark.slow
def test_a_block_that_the_class_needs_is_not_chosen(tmp_path):
    """ModernBERT's first block has no norm in front of its attention, and the class gives none to whichever block is first."""
    model = pico_model(
        transformers.ModernBertDecoderForCausalLM, shrunken(default_config("modernbert-decoder")), seed=3
    )
    for name, parameter in model.named_parameters():
        if ".layers.0." in name and parameter.ndim > 1:
            parameter.data.zero_()  # nothing would be lost without it
    model.save_pretrained(tmp_path / "in")
    ids, details = torch.arange(128).view(8, 16) + 5, {}
    compress.apply(
        "prune_structured", tmp_path / "in", tmp_path / "out", data=ids, details=details, layers=2, compensation="none"
    )
    assert 0 not in details["removed_blocks"]
    assert "0" not in details["samples_without_block"][0]
    assert all("0" not in name.split("-") for name in details["samples_without_group"])
    twin = stock(tmp_path / "in")
    for index in details["removed_blocks"]:
        for name, parameter in twin.named_parameters():
            if f".layers.{index}." in name and parameter.ndim > 1:
                parameter.data.zero_()
    torch.testing.assert_close(outputs(stock(tmp_path / "out"), ids[:1]), outputs(twin, ids[:1]), rtol=1e-4, atol=1e-4)
    with pytest.raises(PassError, match="block"):
        plan(open_checkpoint(tmp_path / "in"), "prune_structured", layers=[0], **DATA_FREE)
