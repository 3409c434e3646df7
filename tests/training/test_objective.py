"""The objective of training, against stock transformers and the definitions of its losses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compress.evaluation.tasks import LANGUAGE, MASKED
from compress.training.objective import Batch, Objective, Signal, Terms, _relation
from compress.training.teachers import Teachers, frozen_teacher
from tests import pico


def batch_of(ids, counted=None):
    counted = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
    predict = torch.zeros_like(counted)
    predict[:, :-1] = counted[:, :-1] & counted[:, 1:]
    inputs = {"input_ids": ids, "attention_mask": counted.long()}
    return Batch(
        inputs,
        counted,
        predict,
        ids.roll(-1, 1)[predict],
        torch.arange(len(ids)),
        int(counted.sum()),
        int(predict.sum()),
    )


def test_objective_matches_stock_transformers():
    """Labels: the loss that a stock model gives. KL: of the stock logits."""
    student, teacher = pico.model("llama", seed=1), pico.model("llama", seed=2)
    ids = torch.randint(1, 250, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = student(input_ids=ids).logits[:, :-1], teacher(input_ids=ids).logits[:, :-1]
        nll = float(student(input_ids=ids, labels=ids).loss)
    kl = float(
        functional.kl_div((a / 2).log_softmax(-1), (b / 2).log_softmax(-1), reduction="none", log_target=True)
        .sum(-1)
        .mean()
        * 4
    )
    terms = Terms({"labels": 0.5, "kl": 2.0}, temperature=2.0)
    objective = Objective(student, LANGUAGE, terms, vocabulary=300)
    says = Teachers([frozen_teacher(teacher, LANGUAGE, terms)], [1.0], terms, 300)
    batch = batch_of(ids)
    total, labels, divergence = objective(batch, says(batch)).tolist()
    assert labels == pytest.approx(nll, rel=1e-4)
    assert divergence == pytest.approx(kl, rel=1e-4)
    assert total == pytest.approx(0.5 * nll + 2 * kl, rel=1e-4)


def test_objective_is_zero_when_student_is_teacher():
    weights = {
        "kl": 1.0,
        "reverse_kl": 1.0,
        "skewed_kl": 1.0,
        "js": 1.0,
        "hidden": 1.0,
        "cosine": 1.0,
        "relations": 1.0,
    }
    terms = Terms(weights, states=((0, 0), (2, 2), (4, 4)), vectors=(3, 3), relation_heads=4)
    objective = Objective(pico.model("llama"), LANGUAGE, terms, vocabulary=300, teacher_width=32)
    says = Teachers([frozen_teacher(pico.model("llama"), LANGUAGE, terms)], [1.0], terms, 300)
    counted = torch.ones(2, 10, dtype=torch.bool)
    counted[1, 6:] = False
    batch = batch_of(torch.randint(1, 250, (2, 10), generator=torch.Generator().manual_seed(0)), counted)
    assert objective(batch, says(batch)).abs().max() < 1e-5


def test_objective_ignores_logits_beyond_shared_vocabulary():
    student, teacher = pico.model("llama"), pico.model("llama", vocab_size=340)
    with torch.no_grad():
        teacher.get_input_embeddings().weight[:300] = student.get_input_embeddings().weight
        teacher.get_output_embeddings().weight[:300] = student.get_output_embeddings().weight
        for (_, a), (_, b) in zip(
            teacher.model.layers.named_parameters(), student.model.layers.named_parameters(), strict=True
        ):
            a.copy_(b)
        teacher.model.norm.weight.copy_(student.model.norm.weight)
    terms = Terms({"kl": 1.0})
    objective = Objective(student, LANGUAGE, terms, vocabulary=300)
    says = Teachers([frozen_teacher(teacher, LANGUAGE, terms)], [1.0], terms, 300)
    batch = batch_of(torch.randint(1, 250, (2, 10), generator=torch.Generator().manual_seed(0)))
    assert float(objective(batch, says(batch))[0]) == pytest.approx(0, abs=1e-6)


def test_objective_ignores_padding():
    terms = Terms(
        {"kl": 1.0, "hidden": 1.0, "cosine": 1.0, "relations": 1.0}, states=((2, 3),), vectors=(0, 1), relation_heads=2
    )
    objective = Objective(pico.model("bert", seed=1), MASKED, terms, vocabulary=300, teacher_width=32)
    says = Teachers([frozen_teacher(pico.model("bert", seed=2), MASKED, terms)], [1.0], terms, 300)
    ids = torch.randint(1, 250, (1, 8), generator=torch.Generator().manual_seed(0))
    alone = batch_of(ids)
    counted = torch.zeros(1, 12, dtype=torch.bool)
    counted[:, :8] = True
    padded = batch_of(functional.pad(ids, (0, 4)), counted)
    torch.testing.assert_close(objective(padded, says(padded)), objective(alone, says(alone)), atol=1e-4, rtol=1e-4)


def test_relation_matches_scaled_dot_product_attention():
    """MiniLMv2's relation of queries is scaled dot-product attention of the queries with themselves as keys."""
    vectors = torch.randn(2, 5, 12)
    mine = _relation(vectors, 3, torch.ones(2, 5, dtype=torch.bool), causal=True).exp()
    split = vectors.view(2, 5, 3, 4).transpose(1, 2)
    eye = torch.eye(5).expand(2, 3, 5, 5)
    theirs = functional.scaled_dot_product_attention(split, split, eye, is_causal=True)
    torch.testing.assert_close(mine, theirs)


def test_objective_trains_a_projection_between_widths():
    student = pico.model("llama", hidden_size=16, intermediate_size=32)
    terms = Terms({"hidden": 1.0, "cosine": 1.0}, states=((1, 1), (4, 4)))
    objective = Objective(student, LANGUAGE, terms, vocabulary=300, teacher_width=32)
    assert set(objective.projections) == {"state0", "state1", "last"}
    says = Teachers([frozen_teacher(pico.model("llama"), LANGUAGE, terms)], [1.0], terms, 300)
    batch = batch_of(torch.randint(1, 250, (2, 10), generator=torch.Generator().manual_seed(0)))
    objective(batch, says(batch))[0].backward()
    assert all(p.weight.grad.abs().sum() > 0 for p in objective.projections.values())


def test_objective_of_padding_only_gives_zero_loss_and_gradients():
    terms = Terms({"labels": 1.0})
    objective = Objective(pico.model("llama"), LANGUAGE, terms, vocabulary=300)
    ids = torch.ones(1, 5, dtype=torch.long)
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    batch = Batch({"input_ids": ids}, nothing, nothing, ids[nothing], torch.tensor([-1]), 10, 8)
    value = objective(batch, Signal())
    value[0].backward()
    assert float(value[0].detach()) == 0
    assert objective.student.lm_head.weight.grad is not None
