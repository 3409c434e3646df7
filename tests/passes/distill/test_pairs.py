"""Encoder-decoders learn from pairs of texts: the decoder's tokens are predicted from the source and the tokens before them."""

from __future__ import annotations

import json

import pytest
import torch

import compress
from compress.data.batches import Batches
from compress.errors import PassError
from compress.evaluation.tasks import LANGUAGE
from compress.models.loading import load_model
from compress.training.data import Samples
from compress.training.features import FeatureModel
from tests import pico


@pytest.fixture
def pairs(tmp_path):
    rows = [{"de": "ein Satz " * (i % 3 + 1), "en": "a sentence " * (i % 2 + 1)} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "pairs.jsonl"


def test_batches_of_pairs_predict_the_decoders_next_token():
    ids, read = torch.arange(2, 14).view(2, 6), torch.arange(20, 28).view(2, 4)
    mask = torch.tensor([[True, True, False, False]] * 2)
    samples = Samples(Batches(ids, targets=read, target_mask=mask), LANGUAGE, 0)
    batch = samples.batch([(0, 0), (1, 0)], samples.counts([(0, 0), (1, 0)]), "cpu")
    assert batch.inputs["input_ids"].tolist() == ids.tolist()
    assert batch.inputs["decoder_input_ids"].tolist() == [[20, 21], [24, 25]]  # cut behind the longest
    assert batch.targets.tolist() == [21, 25]
    assert samples.counts([(0, 0)]) == (2, 1)


def test_features_of_a_model_without_a_base_are_its_logits(folders):
    model = load_model(folders["t5"])
    inputs = pico.inputs(model)
    features = FeatureModel(model, LANGUAGE)
    with torch.no_grad():
        output = features.run(inputs)
        where = torch.ones(1, 12, dtype=torch.bool)
        assert torch.equal(features.head(features.predicted(output, inputs, where)), model(**inputs).logits[0])


@pytest.mark.slow
def test_distill_lowers_the_loss_of_a_pruned_encoder_decoder(pairs, tmp_path):
    recipe = {
        "model": str(pico.folder("t5")),
        "output": str(tmp_path / "out"),
        "data": {"training": {"files": [str(pairs)], "text": ["de", "en"], "length": 32}},
        "evaluate": [],
        "passes": [
            {"prune_unstructured": {"method": "magnitude", "sparsity": 0.3}},
            {"distill": {"steps": 4, "batch_size": 4, "validation_samples": 4, "learning_rate": 1e-3}},
        ],
    }
    stages = compress.run(recipe).report["stages"]
    training = next(p["details"]["training"] for s in stages for p in s["passes"] if p["name"] == "distill")
    assert training["helped"]
    model = load_model(tmp_path / "out")
    zeros = {
        n: float((p == 0).float().mean()) for n, p in model.named_parameters() if n.endswith("EncDecAttention.q.weight")
    }
    assert zeros
    assert all(0.05 < share < 0.9 for share in zeros.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": {"kl": 1, "hidden": 1}}, "`hidden` compares states of blocks, .* use `kl` or `labels`"),
        ({"losses": {"kl": 1, "cosine": 1}}, "`cosine` compares states of blocks"),
        ({"losses": {"kl": 1}, "teacher_cache": {"folder": "cache"}}, "`teacher_cache` keeps predictions of one text"),
    ],
)
def test_what_needs_one_list_of_blocks_is_refused(settings, message, folders):
    from compress.checkpoint.open import open_checkpoint
    from tests.toolbox import plan

    with pytest.raises(PassError, match=message):
        plan(open_checkpoint(folders["t5"]), "distill", **settings)
