"""Dropout of a student, which is off where it recovers."""

from __future__ import annotations

import pytest
import torch

from compress.training.features import without_dropout
from tests import pico

#: Everything that families call their rates of dropout.
RATES = ("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "dropout_rate",
         "activation_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "classifier_dropout", "classifier_dropout_prob",
         "layerdrop", "embedding_dropout")  # fmt: skip


@pytest.mark.parametrize("family", [f for f in pico.FAMILIES if f not in ("t5", "vit")])
def test_a_model_without_dropout_computes_in_training_what_it_does_in_evaluation(family):
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
