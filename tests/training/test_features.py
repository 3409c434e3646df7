"""Outputs of models that losses compare, against the model's own code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from compress.evaluation.tasks import LANGUAGE, MASKED
from compress.training.features import FeatureModel, without_dropout
from tests import pico


@pytest.mark.parametrize("family", [f for f, (name, _) in pico.FAMILIES.items() if name.endswith(("LM", "HeadModel"))])
def test_feature_model_logits_match_the_model(family):
    """By the model's own code: softcaps of Gemma 2, the transform of BERT's head, OPT's decoder inside its base."""
    model = pico.model(family)
    reader = FeatureModel(
        model, MASKED if family in ("albert", "bert", "roberta", "electra", "distilbert") else LANGUAGE
    )
    inputs = pico.inputs(model)
    assert reader.check(inputs)
    with torch.no_grad():
        hidden = reader.run(inputs).last[0]
        torch.testing.assert_close(reader.logits(hidden[3:7]), model(**inputs).logits[0, 3:7], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reader.head(hidden[3:7]), reader.logits(hidden[3:7]), atol=1e-4, rtol=1e-4)
    assert model.base_model is reader.base  # and is in its place again
    assert isinstance(reader.head, torch.nn.Linear) == (
        family not in ("gemma2", "minicpm3", "albert", "bert", "roberta", "electra", "distilbert")
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "bert"])
def test_feature_model_queries_keys_values_match_attention(family):
    """Scores of the first position's value: attention over one token returns its value, whatever query and key."""
    model = pico.model(family)
    reader = FeatureModel(model, MASKED if family == "bert" else LANGUAGE, vectors=[1])
    seen = {}
    attention = reader.blocks[1].get_submodule(reader.record.attention.output)
    handle = attention.register_forward_pre_hook(lambda module, args: seen.update(mixed=args[0]))
    with torch.no_grad():
        query, key, value = reader.run({"input_ids": torch.tensor([[5]])}).vectors[1]
    handle.remove()
    heads, width = query.shape[-1], value.shape[-1]
    groups = heads // width
    mixed = seen["mixed"].reshape(-1)
    dim = model.config.to_dict().get("head_dim") or 8
    repeated = value.reshape(-1, dim).repeat_interleave(groups, 0).reshape(-1)
    torch.testing.assert_close(mixed, repeated)
    assert key.shape == value.shape


def test_feature_model_runs_the_whole_head_when_it_cannot_split():
    class Odd(torch.nn.Module):
        base_model_prefix = "base"

        def __init__(self, inner):
            super().__init__()
            self.base, self.head, self.config = inner.model, inner.lm_head, inner.config
            self.base_model = self.base

        def forward(self, input_ids, return_dict=True):
            found = self.base(input_ids=input_ids)
            scale = 1 + input_ids.float().mean()  # of the text itself, which a few hidden states do not tell
            return SimpleNamespace(logits=self.head(found.last_hidden_state) * scale)

    model = Odd(pico.model("llama"))
    reader = FeatureModel(model, LANGUAGE)
    inputs = {"input_ids": torch.arange(2, 14)[None]}
    assert not reader.check(inputs)
    with torch.no_grad():
        rows = reader.predicted(reader.run(inputs), inputs, torch.ones(1, 12, dtype=torch.bool))
        torch.testing.assert_close(reader.logits(rows), model(inputs["input_ids"]).logits[0])


#: Everything that families call their rates of dropout.
RATES = ("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "dropout_rate",
         "activation_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout", "classifier_dropout_prob",
         "layerdrop", "embedding_dropout")  # fmt: skip


@pytest.mark.parametrize("family", [f for f in pico.FAMILIES if f not in ("t5", "vit")])
def test_without_dropout_training_matches_evaluation(family):
    config = pico.model(family).config
    rates = {name: 0.3 for name in RATES if hasattr(config, name) and name != "layerdrop"}
    model = pico.model(family, **rates).train()
    ids = torch.arange(12).remainder(250)[None] + 2
    with torch.no_grad():
        expected = model.eval()(input_ids=ids)[0]
        if rates:
            assert not torch.allclose(model.train()(input_ids=ids)[0], expected, atol=1e-4)
        without_dropout(model)
        torch.testing.assert_close(model.train()(input_ids=ids)[0], expected)
