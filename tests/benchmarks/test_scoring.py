"""The scores that every benchmark reports."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import scoring
from compress.models.loading import load_model
from tests import pico


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text("".join(f"{n} blocks, pruned. " for n in range(60)))
    return path


def test_scores_of_the_dense_model_itself_are_its_own(text: Path):
    model = pico.folder("llama", max_position_embeddings=256)
    held = scoring.HeldOut(model, [str(text)], second=text, windows=2)
    assert held.cells([held.score(model)])[:2] == ["+0.0000", "0.0000"]
    assert held.score(model)[0].agreement == 1
    assert scoring.token_windows(model, text, 2)[1] == 1  # a byte is a token here
    assert held.bits_per_byte(held.dense) == pytest.approx(held.dense[0].loss / math.log(2))


def test_loss_and_divergence_are_those_of_whole_logits(text: Path):
    dense, other = pico.folder("llama"), pico.folder("llama", hidden_size=48)
    held = scoring.HeldOut(dense, [str(text)], second=text, windows=2)
    score = held.score(other)[0]
    ids, _ = scoring.token_windows(dense, text, 2)
    with torch.no_grad():
        theirs, mine = (load_model(f, dtype="float32")(ids).logits[:, :-1].log_softmax(-1) for f in (dense, other))
    chosen = mine.gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(score.losses, -chosen.double().mean((1, 2)), rtol=1e-6, atol=0)
    assert score.kl == pytest.approx(float((theirs.exp() * (theirs - mine)).sum(-1).mean()), rel=1e-5)
    assert held.rise(held.score(other)) == pytest.approx(score.loss - held.dense[0].loss)
    assert scoring.mean_loss(other, [ids]) == pytest.approx(score.loss)


def test_logits_that_are_not_a_product_with_the_head_are_refused(text: Path):
    with pytest.raises(ValueError, match="more than a product"):
        scoring.HeldOut(pico.folder("gemma2"), [str(text)], second=text, windows=1)


def test_second_text_is_of_another_kind_than_the_held_out_one():
    code, prose = scoring.SECOND
    assert scoring._second([prose]) == code
    assert scoring._second([code]) == prose
