"""Divergences, chunked losses and what is read off models, against formulas and implementations that are not ours."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from compress.training.chunks import summed
from compress.training.divergence import DIVERGENCES, bucketed, ensemble, skewed_kl
from compress.training.features import FeatureModel
from compress.training.objective import Batch, Objective, Signal, Terms, _relation
from compress.training.teacher import Teachers, reader_of
from tests import pico


def two(seed=0, rows=5, buckets=11):
    lot = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(rows, buckets, generator=lot, dtype=torch.float64) * 2  # noqa: E731
    return make().log_softmax(-1), make().requires_grad_()


def test_divergences_are_those_of_torch():
    p, logits = two()
    q = logits.log_softmax(-1)
    kl = lambda a, b: functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)  # noqa: E731
    middle = (0.5 * (p.exp() + q.exp())).log()
    expected = {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "skewed_kl": kl(p, (0.1 * p.exp() + 0.9 * q.exp()).log()),
        "js": 0.5 * kl(p, middle) + 0.5 * kl(q, middle),
    }
    assert DIVERGENCES.keys() == expected.keys()
    for name, function in DIVERGENCES.items():
        torch.testing.assert_close(function(p, q), expected[name])
        mine = torch.autograd.grad(function(p, q).sum(), logits, retain_graph=True)[0]
        theirs = torch.autograd.grad(expected[name].sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", [*DIVERGENCES, "skewed"])
def test_what_has_no_probability_spoils_no_gradient(name):
    logits = torch.randn(3, 4, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.5, 0, 0]] * 3).log()
    student = torch.cat([logits, torch.full((3, 1), -math.inf)], 1).log_softmax(-1)
    if name == "reverse_kl":
        teacher = torch.tensor([[0.4, 0.4, 0.1, 0.1]] * 3).log()  # else it is infinite, and rightly so
    teacher = torch.cat([teacher, torch.full((3, 1), -math.inf)], 1)
    function = skewed_kl if name == "skewed" else DIVERGENCES[name]
    value = function(teacher, student).sum()
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


def test_buckets_hold_the_rest_in_one_and_bound_the_divergence_from_below():
    p, logits = two(rows=6, buckets=30)
    q = logits.log_softmax(-1)
    ids = p.topk(5).indices
    a, b = bucketed(p, ids), bucketed(q, ids)
    torch.testing.assert_close(a.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(a[:, -1].exp(), 1 - p.gather(1, ids).exp().sum(-1))
    # data processing: merging outcomes never raises a divergence
    assert (DIVERGENCES["kl"](a, b) <= DIVERGENCES["kl"](p, q) + 1e-12).all()
    every = p.topk(29).indices
    torch.testing.assert_close(DIVERGENCES["kl"](bucketed(p, every), bucketed(q, every)), DIVERGENCES["kl"](p, q))


def test_an_ensemble_is_the_mean_of_probabilities():
    (a, _), (b, _) = two(1), two(2)
    torch.testing.assert_close(ensemble([a, b], [0.25, 0.75]).exp(), 0.25 * a.exp() + 0.75 * b.exp())


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("kind", ["linear", "any"])
def test_a_loss_by_chunks_has_the_value_and_gradients_of_the_whole(rows, kind):
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 50)
    hidden = torch.randn(10, 6, requires_grad=True)
    targets = torch.randint(0, 50, (10,))
    head = linear if kind == "linear" else lambda h: linear(h).tanh() * 3

    def loss(logits, part):
        found = functional.cross_entropy(logits, targets[part], reduction="sum")
        return torch.stack([found, found.detach() * 2])

    parameters = list(linear.parameters())
    sums = summed(loss, head, hidden, parameters, rows, factor=0.25, scale=128.0)
    mine = torch.autograd.grad(sums[0] * 3, [hidden, *parameters])
    whole = functional.cross_entropy(head(hidden), targets, reduction="sum") / 4
    theirs = torch.autograd.grad(whole * 3, [hidden, *parameters])
    torch.testing.assert_close(sums, torch.stack([whole, whole * 2]))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(summed(loss, head, hidden, parameters, rows, factor=0.25), sums)


@pytest.mark.parametrize("family", [f for f, (name, _) in pico.FAMILIES.items() if name.endswith(("LM", "HeadModel"))])
def test_logits_of_a_few_tokens_are_the_models_own(family):
    """By the model's own code: softcaps of Gemma 2, the transform of BERT's head, OPT's decoder inside its base."""
    model = pico.model(family)
    reader = FeatureModel(
        model, "masked" if family in ("albert", "bert", "roberta", "electra", "distilbert") else "causal"
    )
    inputs = pico.inputs(model)
    assert reader.check(inputs)
    with torch.no_grad():
        hidden = reader.run(inputs).last[0]
        torch.testing.assert_close(reader.logits(hidden[3:7]), model(**inputs).logits[0, 3:7], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reader.head(hidden[3:7]), reader.logits(hidden[3:7]), atol=1e-4, rtol=1e-4)
    assert model.base_model is reader.base  # and is in its place again
    assert isinstance(reader.head, torch.nn.Linear) == (
        family not in ("gemma2", "albert", "bert", "roberta", "electra", "distilbert")
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "bert"])
def test_queries_keys_and_values_are_those_that_attention_reads(family):
    """Scores of the first position's value: attention over one token returns its value, whatever query and key."""
    model = pico.model(family)
    reader = FeatureModel(model, "masked" if family == "bert" else "causal", vectors=[1])
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


def test_the_objective_is_what_stock_transformers_say():
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
    objective = Objective(student, "causal", terms, vocabulary=300)
    says = Teachers([reader_of(teacher, "causal", terms)], [1.0], terms, 300)
    batch = batch_of(ids)
    total, labels, divergence = objective(batch, says(batch)).tolist()
    assert labels == pytest.approx(nll, rel=1e-4)
    assert divergence == pytest.approx(kl, rel=1e-4)
    assert total == pytest.approx(0.5 * nll + 2 * kl, rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_by_any_loss():
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
    objective = Objective(pico.model("llama"), "causal", terms, vocabulary=300, teacher_width=32)
    says = Teachers([reader_of(pico.model("llama"), "causal", terms)], [1.0], terms, 300)
    counted = torch.ones(2, 10, dtype=torch.bool)
    counted[1, 6:] = False
    batch = batch_of(torch.randint(1, 250, (2, 10), generator=torch.Generator().manual_seed(0)), counted)
    assert objective(batch, says(batch)).abs().max() < 1e-5


def test_logits_beyond_the_shared_vocabulary_do_not_count():
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
    objective = Objective(student, "causal", terms, vocabulary=300)
    says = Teachers([reader_of(teacher, "causal", terms)], [1.0], terms, 300)
    batch = batch_of(torch.randint(1, 250, (2, 10), generator=torch.Generator().manual_seed(0)))
    assert float(objective(batch, says(batch))[0]) == pytest.approx(0, abs=1e-6)


def test_padding_changes_no_loss():
    terms = Terms(
        {"kl": 1.0, "hidden": 1.0, "cosine": 1.0, "relations": 1.0}, states=((2, 3),), vectors=(0, 1), relation_heads=2
    )
    objective = Objective(pico.model("bert", seed=1), "masked", terms, vocabulary=300, teacher_width=32)
    says = Teachers([reader_of(pico.model("bert", seed=2), "masked", terms)], [1.0], terms, 300)
    ids = torch.randint(1, 250, (1, 8), generator=torch.Generator().manual_seed(0))
    alone = batch_of(ids)
    counted = torch.zeros(1, 12, dtype=torch.bool)
    counted[:, :8] = True
    padded = batch_of(functional.pad(ids, (0, 4)), counted)
    torch.testing.assert_close(objective(padded, says(padded)), objective(alone, says(alone)), atol=1e-4, rtol=1e-4)


def test_relations_are_attention_over_the_vectors_themselves():
    """MiniLMv2's relation of queries is scaled dot-product attention of the queries with themselves as keys."""
    vectors = torch.randn(2, 5, 12)
    mine = _relation(vectors, 3, torch.ones(2, 5, dtype=torch.bool), causal=True).exp()
    split = vectors.view(2, 5, 3, 4).transpose(1, 2)
    eye = torch.eye(5).expand(2, 3, 5, 5)
    theirs = functional.scaled_dot_product_attention(split, split, eye, is_causal=True)
    torch.testing.assert_close(mine, theirs)


def test_a_projection_stands_between_unlike_widths_and_is_trained():
    student = pico.model("llama", hidden_size=16, intermediate_size=32)
    terms = Terms({"hidden": 1.0, "cosine": 1.0}, states=((1, 1), (4, 4)))
    objective = Objective(student, "causal", terms, vocabulary=300, teacher_width=32)
    assert set(objective.projections) == {"state0", "state1", "last"}
    says = Teachers([reader_of(pico.model("llama"), "causal", terms)], [1.0], terms, 300)
    batch = batch_of(torch.randint(1, 250, (2, 10), generator=torch.Generator().manual_seed(0)))
    objective(batch, says(batch))[0].backward()
    assert all(p.weight.grad.abs().sum() > 0 for p in objective.projections.values())


def test_filling_alone_gives_no_loss_and_every_parameter_of_the_head_a_gradient():
    terms = Terms({"labels": 1.0})
    objective = Objective(pico.model("llama"), "causal", terms, vocabulary=300)
    ids = torch.ones(1, 5, dtype=torch.long)
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    batch = Batch({"input_ids": ids}, nothing, nothing, ids[nothing], torch.tensor([-1]), 10, 8)
    value = objective(batch, Signal())
    value[0].backward()
    assert float(value[0].detach()) == 0
    assert objective.student.lm_head.weight.grad is not None


def test_a_head_that_cannot_be_run_by_itself_is_run_whole():
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
    reader = FeatureModel(model, "causal")
    inputs = {"input_ids": torch.arange(2, 14)[None]}
    assert not reader.check(inputs)
    with torch.no_grad():
        rows = reader.predicted(reader.run(inputs), inputs, torch.ones(1, 12, dtype=torch.bool))
        torch.testing.assert_close(reader.logits(rows), model(inputs["input_ids"]).logits[0])
