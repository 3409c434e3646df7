"""Windows by measured divergence: the written model, resumed runs, repeated passages, and repair."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface

import compress
from compress.architectures.conversions.windows import NO_SINK, current_windows
from compress.checkpoint.open import open_checkpoint
from compress.data.batches import Batches
from compress.errors import DataError, PassError
from compress.models.loading import load_model
from compress.passes.base import Context
from compress.passes.local_attention.divergence import samples, window_losses
from compress.passes.local_attention.long_range import Repeated, with_repeats
from compress.passes.local_attention.settings import LocalAttentionSettings
from compress.progress import SilentProgress
from compress.sensitivity.labels import draw
from compress.solvers import windows as solver
from compress.workspace import Workspace
from tests import pico
from tests.processes import Process
from tests.toolbox import divergence, plan

SETTINGS = {"window": 8, "full": 1}


def apply(folder, out, data, **settings):
    compress.apply("local_attention", folder, out, data=data.ids, **{**SETTINGS, **settings})
    return load_file(out / "model.safetensors"), current_windows(open_checkpoint(out).spec)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A model in which the attention of block 2 does by far the most."""
    folder = pico.save(tmp_path_factory.mktemp("uneven") / "in", "llama")
    tensors = load_file(folder / "model.safetensors")
    for i in range(4):
        tensors[f"model.layers.{i}.self_attn.o_proj.weight"] *= 20.0 if i == 2 else 0.001
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("sinks", ["learned", 0])
def test_the_block_that_would_lose_most_stays_full(sinks, uneven, tmp_path, data):
    details = {}
    tensors, windows = apply(uneven, tmp_path / "out", data, sinks=sinks, details=details)
    assert windows == (8, 8, None, 8)
    assert [row["window"] for row in details["windows"]] == list(windows)
    assert details["windows"][2]["share"] > 0.5
    logits = {i: tensors.get(f"model.layers.{i}.self_attn.sinks") for i in range(4)}
    if sinks == 0:
        assert set(logits.values()) == {None}
    else:
        assert bool((logits[2] == NO_SINK).all())
        assert any(bool((logits[i] > NO_SINK).any()) for i in (0, 1, 3))


def test_windows_of_all_blocks_shrink_with_measured_logits(tmp_path, data):
    tensors, windows = apply(pico.folder("mistral", sliding_window=12), tmp_path / "out", data, full=0)
    assert windows == (8, 8, 8, 8)
    assert any(bool((tensors[f"model.layers.{i}.self_attn.sinks"] > NO_SINK).any()) for i in range(4))


def test_names_of_no_sink_agree():
    assert solver.NO_SINK == NO_SINK


def test_logits_are_measured_where_blocks_are_named(uneven, tmp_path, data):
    tensors, windows = apply(uneven, tmp_path / "out", data, full=[0])
    assert windows == (None, 8, 8, 8)
    assert bool((tensors["model.layers.2.self_attn.sinks"] > NO_SINK).any())
    lowered, raised = (tensors[f"model.layers.2.self_attn.{name}.bias"] for name in ("v_proj", "o_proj"))
    image = tensors["model.layers.2.self_attn.o_proj.weight"] @ lowered.view(2, 1, -1).expand(2, 2, -1).flatten()
    assert lowered.abs().min() > 0
    assert torch.allclose(raised, -image, atol=1e-5)
    assert not tensors["model.layers.0.self_attn.v_proj.bias"].any()


def recipe(name, folder, texts, tmp_path):
    settings = {**SETTINGS, "sinks": "learned", "sink_steps": 2, "tune_epochs": 4}
    made = {
        "model": str(folder),
        "output": str(tmp_path / name),
        "data": {
            "calibration": {"files": [str(texts[0])], "samples": 8, "length": 24},
            "evaluation": {"files": [str(texts[1])], "window": 24},
        },
        "passes": [{"local_attention": settings}],
        "evaluate": ["kl"],
    }
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(made))
    return path


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bytes(texts, tmp_path):
    compress.run(str(recipe("whole", pico.folder(), texts, tmp_path)))
    report = json.loads((tmp_path / "whole.run/report.json").read_text())
    details = report["stages"][0]["passes"][0]["details"]
    assert sum(row["share"] for row in details["windows"]) == pytest.approx(1)
    assert details["training"]["helped"]
    path = recipe("killed", pico.folder(), texts, tmp_path)
    for sign in ("windows/*.act", "tune/training/step-3"):
        process = Process("from compress.cli import main; main()", "run", path, "--quiet")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if list((tmp_path / "killed.run/work").glob(f"*/{sign}")):
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed").exists()
    done = Process("from compress.cli import main; main()", "run", path)
    _, errors = done.communicate()
    assert done.returncode == 0, errors
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_tuning_comes_nearer_to_the_predictions_of_the_original(tmp_path, data):
    """On other samples than those of the calibration, and sinks that are off stay so."""
    before, windows = apply(pico.folder(), tmp_path / "before", data)
    after, same = apply(pico.folder(), tmp_path / "after", data, tune_epochs=4)
    assert windows == same
    assert after.keys() == before.keys()
    names = [f"model.layers.{i}.self_attn.sinks" for i in range(4)]
    assert all(torch.equal(after[n] == NO_SINK, before[n] == NO_SINK) for n in names)
    assert any(not torch.equal(after[n], before[n]) for n in names)
    ids = torch.randint(2, 250, (8, 24), generator=torch.Generator().manual_seed(2))
    kl = [divergence(pico.folder(), tmp_path / out, ids) for out in ("before", "after")]
    assert kl[1] < 0.999 * kl[0]


def test_sinks_are_refined_towards_the_predictions_of_the_original(uneven, tmp_path, data):
    before, _ = apply(uneven, tmp_path / "before", data, full=[0])
    after, _ = apply(uneven, tmp_path / "after", data, full=[0], sink_steps=16)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= {f"model.layers.{i}.self_attn.sinks" for i in (1, 2, 3)}
    ids = data.ids
    kl = [divergence(load_model(uneven), load_model(tmp_path / out), ids) for out in ("before", "after")]
    assert kl[1] < 0.98 * kl[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"`choose: divergence` needs a model that predicts tokens; set `choose: every` and `sinks: 0`"),
        ({"choose": "every"}, r"`sinks: learned` needs a model that predicts tokens"),
    ],
)
def test_models_without_a_head_are_refused_in_the_plan(settings, message):
    folder = pico.folder("llama", class_name="LlamaModel")
    with pytest.raises(PassError, match=message):
        plan(open_checkpoint(folder), "local_attention", **{**SETTINGS, **settings})


def test_steps_of_sinks_need_logits(tmp_path):
    with pytest.raises(compress.errors.CompressError, match=r"`sink_steps` trains logits: set `sinks: learned`"):
        compress.apply("local_attention", pico.folder(), tmp_path / "out", window=8, sinks=0, sink_steps=4)


def dense(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Eager attention that keeps its outputs, and those where each query sees 8 tokens."""
    n = torch.arange(query.shape[2])
    ago = n[:, None] - n
    scores = query @ key.mT.repeat_interleave(2, 1) * scaling
    value = value.repeat_interleave(2, 1)
    full, windowed = (scores.masked_fill(~((ago >= 0) & (ago < w)), -torch.inf).softmax(-1) @ value for w in (99, 8))
    full.retain_grad()
    kept.append((full, windowed.detach()))
    return full.transpose(1, 2).contiguous(), None


kept: list[tuple[torch.Tensor, torch.Tensor]] = []
AttentionInterface.register("dense", dense)


def weighted(folder, ids, weights):
    """The joint loss of windows of 8 by block: a weighted mean over tokens, by plain backward passes of the whole model."""
    model = load_model(folder, dtype="float32").requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.requires_grad_())
    model.set_attn_implementation("dense")
    joint = torch.zeros(4, 4, dtype=torch.float64)
    for row, sample in enumerate(ids):
        kept.clear()
        output = model(input_ids=sample[None], use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(row)
        drawn = draw(output, generator)
        torch.nn.functional.cross_entropy(output, drawn, reduction="sum").backward()
        for t in range(len(sample)):
            r = torch.stack([(a.grad * (w - a.detach()))[0, :, t].double().sum() for a, w in kept])
            joint += weights[row][t] * r[:, None] * r / 2
    return joint / sum(map(sum, weights))


def test_tokens_of_repeated_passages_count_by_their_weight(tmp_path, data):
    folder, ids = pico.folder("llama"), data.ids[:4]
    checkpoint = open_checkpoint(folder)
    found = {}
    for weight in (1, 9):
        context = Context(
            checkpoint,
            "cpu",
            "float32",
            0,
            None,
            lambda _: Batches(ids),
            SilentProgress(),
            Workspace(tmp_path / f"{weight}"),
        )
        settings = LocalAttentionSettings(window=8, full=1, sinks=0, long_range=0.5, repeat_weight=weight)
        found[weight] = window_losses(checkpoint, settings, context).joint
        read = samples(settings, context).ids
        weights = [[1.0] * len(row) for row in ids]
        for row in (1, 3):  # an even half of the samples ends with tokens from its second on
            passage = max(p for p in range(6, 13) if torch.equal(read[row, -p:], ids[row, 1 : p + 1]))
            weights[row][-passage:] = [float(weight)] * passage
        wanted = weighted(folder, read, weights)
        assert torch.allclose(found[weight], wanted, rtol=1e-3, atol=1e-3 * float(wanted.diagonal().min()))
    assert not torch.allclose(found[1], found[9], rtol=0.05)


def test_the_weight_decides_which_block_copies(tmp_path):
    """Only where a passage comes again does the change of block 1 count more than that of block 0."""
    changes = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.5]])
    passages = torch.tensor([[False, False, False, True]])
    chosen = []
    for weight in (1.0, 4.0):
        counts = Repeated(Batches(passages.long()), passages).weights(weight).flatten()
        chosen.append(solver.choose([[2, 1]] * 2, solver.losses(changes, counts), 3))
    assert chosen == [[0, 1], [1, 0]]


def test_a_weight_without_passages_is_refused(tmp_path):
    with pytest.raises(compress.errors.CompressError, match=r"`repeat_weight` is for passages that come again"):
        compress.apply("local_attention", pico.folder(), tmp_path / "out", window=8, long_range=0, repeat_weight=4)


def test_repeats_are_out_of_reach_of_the_window():
    ids = torch.arange(8 * 40).view(8, 40)
    repeated = with_repeats(Batches(ids), 0.25, 16, seed=3)
    passages, repeated = repeated.passages, repeated.batches
    changed = [row for row in range(8) if not torch.equal(repeated.ids[row], ids[row])]
    assert changed == [3, 7]
    for row in changed:
        first = int((repeated.ids[row] != ids[row]).nonzero()[0])
        passage = 40 - first
        assert 10 <= passage <= 20
        assert torch.equal(repeated.ids[row, first:], ids[row, 1 : passage + 1])
        assert first - 1 > 16 - 1  # a query sees 15 tokens before it
        assert passages[row].tolist() == [column >= first for column in range(40)]
    assert passages.any(1).nonzero().flatten().tolist() == changed
    assert torch.equal(with_repeats(Batches(ids), 0.25, 16, seed=3).batches.ids, repeated.ids)
    others = [with_repeats(Batches(ids), 0.25, 16, seed=s).batches.ids for s in range(4)]
    assert any(not torch.equal(other, repeated.ids) for other in others)
    assert torch.equal(with_repeats(Batches(ids), 0.0, 16, seed=3).batches.ids, ids)
    assert (
        len([r for r in range(8) if not torch.equal(with_repeats(Batches(ids), 1.0, 16, 0).batches.ids[r], ids[r])])
        == 8
    )


def test_repeats_of_padded_samples_end_with_the_text():
    ids, mask = torch.arange(4 * 40).view(4, 40), torch.ones(4, 40, dtype=torch.bool)
    mask[0, 30:] = mask[1, 17:] = mask[2, 10:] = False
    repeated = with_repeats(Batches(ids, mask), 1.0, 16, seed=0)
    assert not repeated.passages[~mask].any()
    assert repeated.passages.any(1).tolist() == [True, False, False, True]
    repeated = repeated.batches.ids
    assert torch.equal(repeated[~mask], ids[~mask])
    assert repeated[0, 29] < 16
    assert not torch.equal(repeated[0], ids[0])
    assert torch.equal(repeated[1:3], ids[1:3])  # too short to repeat anything
    mask[0, 16:] = mask[3, 16:] = False
    mask[1, 16:] = False
    with pytest.raises(DataError, match=r"the longest calibration sample has 16 tokens and fits into a window of 16"):
        with_repeats(Batches(ids, mask), 0.25, 16, seed=0)


def test_weights_that_are_no_numbers_are_refused(tmp_path, data):
    folder = pico.save(tmp_path / "in", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((PassError, compress.errors.CompressError), match="NaN"):
        apply(folder, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()
