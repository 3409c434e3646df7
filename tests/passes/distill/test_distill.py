"""`distill` on pico models: what it learns, keeps, refuses, and goes on from."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.checkpoint.open import open_checkpoint
from compress.errors import CompressError, DataError, PassError
from tests import pico
from tests.conftest import ROOT
from tests.processes import Process


def ids(rows=48, length=16, seed=0):
    """Text that a model can learn something of: each token follows from the one before."""
    lot = torch.Generator().manual_seed(seed)
    found = [torch.randint(2, 250, (rows, 1), generator=lot)]
    for _ in range(length - 1):
        found.append((found[-1] * 3 + torch.randint(0, 3, (rows, 1), generator=lot)) % 248 + 2)
    return torch.cat(found, 1)


def distilled(tmp_path, model, name="out", data=None, **settings):
    details = {}
    how = {"steps": 8, "batch_size": 8, "validation_samples": 8, "evaluate_every": 4, "device": "cpu", **settings}
    out = compress.apply(
        "distill", model, tmp_path / name, data=ids() if data is None else data, details=details, **how
    )
    return out, details["training"]


@pytest.fixture
def pruned(tmp_path, pico_llama):
    """Two of four blocks, and half of the weights of the MLPs masked."""
    small = compress.apply("prune_structured", pico_llama, tmp_path / "cut", layers=[1, 2], compensation="none")
    return compress.apply(
        "prune_unstructured", small, tmp_path / "pruned", method="magnitude", sparsity=0.5, store="compact"
    )


def weights(folder):
    checkpoint = open_checkpoint(folder)
    return {t.name: checkpoint.tensor(t.name).data for t in checkpoint.spec.stored()}


def same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_distill_brings_pruned_student_nearer_and_keeps_masks(tmp_path, pruned, pico_llama):
    out, said = distilled(
        tmp_path, pruned, steps=30, evaluate_every=10, teacher=str(pico_llama), store="compact", learning_rate=5e-3
    )
    held = [row["loss"] for row in said["held_out"]]
    assert held[-1] < 0.8 * held[0]
    before, after = open_checkpoint(pruned), open_checkpoint(out)
    masked = [t.name for t in before.spec.stored() if t.kept is not None]
    assert masked
    for name in masked:
        assert torch.equal(before.tensor(name).mask, after.tensor(name).mask)
        assert not torch.equal(before.tensor(name).data, after.tensor(name).data)
        assert not after.tensor(name).data[~after.tensor(name).mask].any()


@pytest.mark.slow
def test_distill_does_not_depend_on_micro_batches_and_checkpointing(tmp_path, pruned, pico_llama):
    whole, _ = distilled(tmp_path, pruned, "a", teacher=str(pico_llama))
    parts, _ = distilled(
        tmp_path, pruned, "b", teacher=str(pico_llama), micro_batch_size=3, gradient_checkpointing=True
    )
    a, b = weights(whole), weights(parts)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=2e-3)
    assert not same(whole, pruned)


@pytest.mark.slow
def test_distill_weighs_padded_samples_by_token(tmp_path, pico_llama, texts):
    """A micro-batch with few tokens weighs as its tokens, not as a batch."""
    train, _ = texts
    short = tmp_path / "short.txt"
    short.write_text("\n<|doc|>\n".join(train.read_text()[i * 37 : i * 37 + 3 + i % 40] for i in range(60)))
    how = {"data": short, "mode": "padded", "length": 32, "document_separator": "<|doc|>"}
    how |= {"losses": {"labels": 1.0}, "max_grad_norm": None}
    whole, _ = distilled(tmp_path, pico_llama, "a", **how)
    parts, _ = distilled(tmp_path, pico_llama, "b", micro_batch_size=2, **how)
    a, b = weights(whole), weights(parts)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=2e-3)


def test_distill_is_reproducible(tmp_path, pruned, pico_llama, device):
    how = {"teacher": str(pico_llama), "ema_decay": 0.9, "optimizer": "muon", "device": device}
    assert same(distilled(tmp_path, pruned, "a", **how)[0], distilled(tmp_path, pruned, "b", **how)[0])


#: Other tests train with AdamW, Muon and cosines; the other pairs are slow.
QUICK = ("adafactor", "wsd")


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        pytest.param(*pair, marks=[] if pair == QUICK else [pytest.mark.slow])
        for pair in itertools.product(("adamw", "muon", "adafactor"), ("cosine", "linear", "wsd", "constant"))
    ],
)
def test_distill_learns_with_every_optimizer_and_schedule(tmp_path, pico_llama, optimizer, schedule):
    _, said = distilled(
        tmp_path,
        pico_llama,
        losses={"labels": 1.0},
        optimizer=optimizer,
        schedule=schedule,
        learning_rate=3e-3,
        steps=12,
    )
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]
    assert said["tokens"] == 12 * 8 * 16


@pytest.mark.slow
def test_distill_lowers_every_loss(tmp_path, pruned, pico_llama):
    losses = {
        "reverse_kl": 0.5,
        "skewed_kl": 0.5,
        "js": 0.5,
        "labels": 0.1,
        "hidden": 0.5,
        "cosine": 0.5,
        "relations": 0.5,
    }
    _, said = distilled(
        tmp_path,
        pruned,
        teacher=str(pico_llama),
        losses=losses,
        relation_heads=2,
        steps=40,
        learning_rate=5e-3,
        evaluate_every=20,
    )
    first, last = said["losses"][0], said["losses"][-1]
    assert set(first) == {"step", "loss", *losses}
    assert all(last[name] < first[name] for name in losses if name != "labels"), (first, last)


@pytest.mark.slow
def test_distill_reports_rate_and_dropout(tmp_path, pico_llama):
    how = {"student": {"layers": 2}, "allow_noop": True, "steps": 2, "evaluate_every": 2}
    assert distilled(tmp_path, pico_llama, "a", **how)[1]["rate"] == pytest.approx(5e-4 * (2 / 500) ** 0.5)
    assert distilled(tmp_path, pico_llama, "b", learning_rate=1e-3, **how)[1]["rate"] == 1e-3
    assert distilled(tmp_path, pico_llama, "c", preset="from_scratch", **how)[1]["rate"] == 3e-3


@pytest.mark.slow
def test_distill_turns_dropout_off_by_default(tmp_path):
    """As one whose config has none; `dropout: true` turns it on."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name, given in (("with", {}), ("without", rates)):
        pico.model("bert", class_name="BertModel", **given).save_pretrained(tmp_path / name)
        pico.tokenizer().save_pretrained(tmp_path / name)
    how = {"student": {"layers": 2}, "learning_rate": 3e-3, "steps": 4}
    off, _ = distilled(tmp_path, tmp_path / "with", "off", **how)
    none, _ = distilled(tmp_path, tmp_path / "without", "none", **how)
    on, _ = distilled(tmp_path, tmp_path / "with", "on", dropout=True, **how)
    assert same(off, none)
    assert not same(on, off)
    assert json.loads((off / "config.json").read_text())["hidden_dropout_prob"] == 0.1


@pytest.mark.slow
def test_distill_recovers_the_example_model_in_20_steps(tmp_path):
    """After least squares it is near an optimum: large first steps of Adam would throw it off."""
    text = {"document_separator": "<|doc|>", "data": ROOT / "examples/text/train.txt", "device": "cpu", "length": 64}
    model = ROOT / "examples/tiny-lm"
    cut = {"layers": 1, "mlp": "25%", "compensation": "least_squares"}
    small = compress.apply("prune_structured", model, tmp_path / "small", samples=32, **cut, **text)
    details = {}
    how = {"teacher": str(model), "steps": 20, "batch_size": 8}
    compress.apply("distill", small, tmp_path / "out", details=details, **how, **text)
    held = [row["loss"] for row in details["training"]["held_out"]]
    assert held[-1] < 0.95 * held[0], held


@pytest.mark.parametrize(
    "begin", ["spread", "last", *(pytest.param(one, marks=pytest.mark.slow) for one in ("every_second", "first"))]
)
def test_distill_student_is_cut_from_the_checkpoint(tmp_path, pico_llama, begin):
    out, _ = distilled(
        tmp_path, pico_llama, steps=1, learning_rate=1e-9, allow_noop=True, student={"layers": 2, "from": begin}
    )
    kept = {"spread": (0, 3), "every_second": (0, 2), "first": (0, 1), "last": (2, 3)}[begin]
    before, after = weights(pico_llama), weights(out)
    for new, old in enumerate(kept):
        name = "model.layers.{}.mlp.down_proj.weight"
        torch.testing.assert_close(after[name.format(new)], before[name.format(old)], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_distill_student_is_narrower_or_fresh(tmp_path, pico_llama):
    out, _ = distilled(
        tmp_path,
        pico_llama,
        "a",
        student={"layers": 3, "mlp": 32, "heads": 2, "hidden": 16},
        losses={"kl": 1, "hidden": 1},
    )
    config = json.loads((out / "config.json").read_text())
    assert (
        config["num_hidden_layers"],
        config["intermediate_size"],
        config["num_attention_heads"],
        config["hidden_size"],
    ) == (3, 32, 2, 16)
    fresh, _ = distilled(
        tmp_path, pico_llama, "b", student={"init": "random"}, preset="from_scratch", steps=1, allow_noop=True
    )
    assert (
        weights(fresh)["model.layers.0.mlp.up_proj.weight"].std()
        < 0.1
        < weights(pico_llama)["model.layers.0.mlp.up_proj.weight"].std()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["gpt2", "qwen3_moe", "bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma2", "opt", "distilbert"))],
)
def test_distill_writes_every_family_by_its_file_names(tmp_path, family):
    teacher = pico.save(tmp_path / "in", family)
    if family in ("bert", "distilbert"):
        tokenizer = pico.tokenizer()
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        tokenizer.save_pretrained(teacher)
    out, said = distilled(tmp_path, teacher, student={"layers": 2}, learning_rate=3e-3, steps=20, evaluate_every=10)
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]
    before, after = (
        {re.sub(r"\d+", "N", name): t.dtype for name, t in open_checkpoint(f).spec.tensors.items()}
        for f in (teacher, out)
    )
    assert after.items() <= before.items()


@pytest.mark.slow
def test_distill_averages_several_teachers_by_weight(tmp_path, pico_llama):
    """Twice the same teacher is that teacher; another one beside it has its say, by weight."""
    student = {"layers": 2}
    one, _ = distilled(tmp_path, pico_llama, "a", student=student)
    two, _ = distilled(
        tmp_path, pico_llama, "b", student=student, teacher=["original", {"checkpoint": str(pico_llama), "weight": 3}]
    )
    a, b = weights(one), weights(two)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=2e-3)
    other = str(pico.save(tmp_path / "other", seed=7))
    mixed = [
        distilled(
            tmp_path,
            pico_llama,
            f"m{w}",
            student=student,
            allow_noop=True,
            teacher=["original", {"checkpoint": other, "weight": w}],
        )[1]
        for w in (1e-6, 1.0)
    ]
    first = [said["held_out"][0]["loss"] for said in mixed]
    alone = distilled(tmp_path, pico_llama, "alone", student=student)[1]["held_out"][0]["loss"]
    assert first[0] == pytest.approx(alone, rel=1e-3)
    assert abs(first[1] - alone) > 0.01 * alone


def test_distill_cache_matches_teacher_and_is_reused(tmp_path, pico_llama):
    """With nearly all of the vocabulary kept the loss is that at work; the second run asks nobody."""
    how = {"student": {"layers": 2}}
    _, at_work = distilled(tmp_path, pico_llama, "a", **how)
    cache = {"folder": str(tmp_path / "cache"), "top_k": 299}
    offline, cached = distilled(tmp_path, pico_llama, "b", teacher_cache=cache, **how)
    assert cached["held_out"][-1]["loss"] == pytest.approx(at_work["held_out"][-1]["loss"], rel=0.01)
    assert cached["teacher_cache"]["samples_added"] == 48
    assert cached["teacher_cache"]["bytes_per_token"] == 299 * 2 + 300 * 2
    predicted = 48 * 15
    size = sum(f.stat().st_size for f in (tmp_path / "cache").glob("*.safetensors"))
    assert predicted * 1198 <= size <= predicted * 1198 + 2000
    again, reused = distilled(tmp_path, pico_llama, "c", teacher_cache=cache, **how)
    assert reused["teacher_cache"]["samples_added"] == 0
    assert same(offline, again)


def test_distill_cache_of_another_teacher_or_samples_is_refused(tmp_path, pico_llama):
    cache = {"folder": str(tmp_path / "cache"), "top_k": 8}
    distilled(tmp_path, pico_llama, "a", student={"layers": 2}, teacher_cache=cache)
    other = pico.save(tmp_path / "other", seed=5)
    with pytest.raises(
        DataError, match=r"cache: holds predictions of another teacher, or for other samples: its teachers differs"
    ):
        distilled(tmp_path, pico_llama, "b", student={"layers": 2}, teacher_cache=cache, teacher=str(other))
    with pytest.raises(DataError, match="its samples differs"):
        distilled(tmp_path, pico_llama, "c", student={"layers": 2}, teacher_cache=cache, data=ids(seed=9))
    with pytest.raises(DataError, match="its k differs"):
        distilled(tmp_path, pico_llama, "d", student={"layers": 2}, teacher_cache={**cache, "top_k": 9})
    shard = next((tmp_path / "cache").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        distilled(tmp_path, pico_llama, "e", student={"layers": 2}, teacher_cache=cache)
    with pytest.raises(DataError, match="is a folder with other files"):
        distilled(tmp_path, pico_llama, "f", student={"layers": 2}, teacher_cache=str(pico_llama))


@pytest.mark.slow
def test_distill_trains_a_classifier(tmp_path, labelled):
    teacher, texts = labelled
    how = {"data": texts, "text": "sentence", "length": 32, "student": {"layers": 2}, "learning_rate": 3e-3}
    how |= {"batch_size": 4, "steps": 20, "evaluate_every": 10}
    _, said = distilled(tmp_path, teacher, "a", losses={"kl": 1.0, "hidden": 0.1}, **how)
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]
    _, said = distilled(tmp_path, teacher, "b", losses={"labels": 1.0}, label="label", **how)
    assert said["losses"][-1]["labels"] < said["losses"][0]["labels"]
    with pytest.raises(DataError, match="the loss `labels` needs labelled text; name the columns"):
        distilled(tmp_path, teacher, "c", losses={"labels": 1.0}, **how)
    wrong = tmp_path / "wrong.tsv"
    wrong.write_text("sentence\tlabel\nabc\tpurple\n")
    with pytest.raises(DataError, match=r'wrong.tsv:2: `label` is "purple", not a label of the model'):
        distilled(tmp_path, teacher, "d", losses={"labels": 1.0}, label="label", **{**how, "data": wrong})


@pytest.mark.slow
def test_distill_trains_sentence_embeddings_by_cosine(tmp_path):
    for name, sizes in (("in", {}), ("wide", {"hidden_size": 48})):
        pico.model("bert", class_name="BertModel", **sizes).save_pretrained(tmp_path / name)
        pico.tokenizer().save_pretrained(tmp_path / name)
    how = {"learning_rate": 3e-3, "steps": 20, "evaluate_every": 10}
    _, said = distilled(tmp_path, tmp_path / "in", "a", student={"layers": 2}, **how)
    assert said["losses"][0].keys() == {"step", "loss", "cosine"}
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]
    _, said = distilled(tmp_path, tmp_path / "in", "b", teacher=str(tmp_path / "wide"), **how)
    assert 0 < said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]


@pytest.mark.slow
def test_distill_in_bfloat16_compiled_and_batched_by_tokens(tmp_path, pico_llama):
    how = {"losses": {"labels": 1.0}, "learning_rate": 3e-3, "evaluate_every": 8, "steps": None}
    _, said = distilled(tmp_path, pico_llama, "a", autocast="bfloat16", tokens=16 * 8 * 12, **how)
    assert said["steps"] == 12
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]
    _, said = distilled(tmp_path, pico_llama, "b", autocast="float16", optimizer="muon", epochs=2, **how)
    assert said["steps"] == 10
    assert said["held_out"][-1]["loss"] < said["held_out"][0]["loss"]


@pytest.mark.slow
def test_distill_compiled_matches_eager(tmp_path, pico_llama):
    how = {"student": {"layers": 2}, "steps": 4}
    plain, _ = distilled(tmp_path, pico_llama, "a", **how)
    compiled, _ = distilled(tmp_path, pico_llama, "b", compile=True, **how)
    a, b = weights(plain), weights(compiled)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=2e-3)


def test_distill_names_the_package_for_tensorboard(tmp_path, pico_llama):
    if importlib.util.find_spec("tensorboard") is not None:
        pytest.skip("it is installed")
    with pytest.raises(PassError, match="logs for TensorBoard need the package tensorboard"):
        distilled(tmp_path, pico_llama, tensorboard=str(tmp_path / "logs"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": {"kl": 0.0}}, "all losses have the weight 0"),
        ({"steps": 1, "tokens": 5}, "give one of `steps` and `tokens`"),
        ({"student": {"layers": 9}}, "the student would have 9 blocks, the checkpoint has 4"),
        ({"student": {"mlp": 500}}, "the student would have 500 mlp, the checkpoint has 64"),
        ({"student": {"layers": 4}}, "the student is the checkpoint itself"),
        ({"student": {"layers": 3, "from": "every_second"}}, "every second of 4 blocks makes 2, not 3"),
        ({"losses": {"hidden": 1}, "layer_map": [[5, 1]]}, r"\[5, 1\] is out of range: the student's outputs are 0 to 4"),
        ({"losses": {"relations": 1}, "relation_layers": [0, 7]}, r"\[0, 7\] is out of range: the student has 4 blocks"),
        ({"losses": {"relations": 1}, "relation_heads": 5}, "vectors of 16 entries do not split into 5 heads"),
        ({"batch_size": 64}, r"gives 48 samples, 8 are held out and a step takes 64"),
        ({"only": ["*mlp*"]}, "`only` and `skip` do not apply"),
        ({"batch_size": 4, "micro_batch_size": 8}, "`micro_batch_size` 8 is more than `batch_size` 4"),
        ({"teacher_cache": "x", "losses": {"kl": 1, "hidden": 1}}, "leave out the loss `hidden`"),
        ({"teacher": ["original", "original"], "losses": {"labels": 1}}, "several teachers are for losses that compare predictions"),
        ({"layer_map": [[1, 1]]}, "`layer_map` is for the loss `hidden`, which has no weight"),
        ({"teacher_cache": {"folder": "x", "top_k": 300}}, "top_k of 300 is not below the vocabulary of 300"),
    ],
)  # fmt: skip
def test_distill_refuses_bad_settings_in_one_line(tmp_path, pico_llama, settings, message):
    with pytest.raises(CompressError, match=message) as caught:
        distilled(tmp_path, pico_llama, **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_distill_refuses_unfit_teachers(tmp_path, pico_llama):
    small = compress.apply("prune_structured", pico_llama, tmp_path / "small", layers=[1, 2], compensation="none")
    with pytest.raises(PassError, match=r"more than the teacher .*small"):
        distilled(tmp_path, pico_llama, teacher=str(small))
    encoder = pico.save(tmp_path / "bert", "bert")
    with pytest.raises(PassError, match=r"is for masked language modelling, the student for causal language modelling"):
        distilled(tmp_path, pico_llama, teacher=str(encoder))
    other = pico.save(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        PassError, match=r"has another tokenizer: `\w` is token \d+ for the student and \d+ for the teacher"
    ):
        distilled(tmp_path, pico_llama, teacher=str(other))


def test_distill_ends_in_one_line_when_training_diverges(tmp_path, pico_llama):
    with pytest.raises(PassError, match=r"training diverged: the loss is (nan|inf) at step \d+.*lower `learning_rate`"):
        distilled(
            tmp_path,
            pico_llama,
            losses={"labels": 1},
            learning_rate=1e18,
            max_grad_norm=None,
            steps=40,
            schedule="constant",
            warmup_ratio=0,
        )


@pytest.mark.slow
def test_distill_stops_early_and_keeps_the_best(tmp_path, pico_llama):
    how = {"learning_rate": 1.0, "steps": 40, "evaluate_every": 2, "patience": 3, "warmup_ratio": 0}
    with pytest.warns(
        UserWarning, match=r"distill did not help: the held-out loss was .* the weights stay as they were"
    ):
        warned, told = distilled(tmp_path, pico_llama, "warned", **how)
    assert same(warned, pico_llama)
    assert not told["helped"]
    out, said = distilled(tmp_path, pico_llama, allow_noop=True, **how)
    assert said["stopped"] == "no progress on held-out samples since step 0"
    assert said["held_out"][-1]["step"] == 6
    assert same(out, pico_llama)  # its own teacher: nothing is better than not to move


RECIPE = {
    "document_separator": "<|doc|>",
    "device": "cpu",
    "passes": [
        {"prune_structured": {"layers": [1], "compensation": "none"}},
        {"distill": {"steps": 80, "batch_size": 4, "validation_samples": 4, "evaluate_every": 10, "ema_decay": 0.9}},
        {"cast": {"weights": "bf16"}},
    ],
    "gates": {"size": {"max_ratio": 0.9}},
}


@pytest.fixture
def recipe(tmp_path, pico_llama, texts):
    def make(name):
        data = {"training": {"files": [str(texts[0])], "length": 16}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**RECIPE, "model": str(pico_llama), "output": str(tmp_path / name), "data": data}))
        return path

    return make


def start(*parts):
    return Process("from compress.cli import main; main()", *parts)


@pytest.mark.slow
def test_distill_killed_run_ends_with_the_same_bytes(tmp_path, recipe):
    whole = start("run", recipe("whole"), "--quiet")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    path = recipe("killed")
    for after in (10, 30):
        process = start("run", path, "--quiet")
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(FileNotFoundError):  # the work folder goes when the stage is done
                notes = list((tmp_path / "killed.run").rglob("train.json"))
                if notes and json.loads(notes[0].read_text())["data"]["value"]["step"] >= after:
                    break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = start("run", path)
    output, errors = done.communicate()
    assert done.returncode == 0, errors
    assert "training continues from step" in errors + output
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "killed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
