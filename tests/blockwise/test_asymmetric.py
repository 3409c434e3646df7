"""Mismatch of inputs and of the residual stream, against both models run whole."""

from __future__ import annotations

import pytest
import torch

from compress.architectures.model_map import model_map
from compress.blockwise.asymmetric import asymmetric_statistics
from compress.blockwise.correction import HeldOutTokens, InputMismatch, choose, corrected, held_out
from compress.blockwise.hessians import tensor_cores
from compress.blockwise.inputs import Inputs
from compress.blockwise.linears import TargetLinear
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived
from compress.distributed import ProcessGroup
from compress.models.loading import load_checkpoint
from tests import pico
from tests.toolbox import inputs_of, runner_of

#: Which matrices add to the residual stream: none where a norm, or experts, stand between.
WRITERS = {
    "llama": ("o_proj", "down_proj"),
    "qwen2": ("o_proj", "down_proj"),
    "phi3": ("o_proj", "down_proj"),
    "gemma3_text": (),
    "mixtral": (),
    "gpt2": ("c_proj", "c_proj"),
    "opt": ("out_proj", "fc2"),
    "bloom": ("dense", "dense_4h_to_h"),
    "gpt_neox": ("dense", "dense_4h_to_h"),
    "bert": (),
}


def shrink(found):
    """A change that tells group from group: what is found, and weights of its sites times 0.8."""

    def change(block):
        for group, statistics, mismatch, free, _ in asymmetric_statistics(block):
            if mismatch is not None:
                assert free
                found[group[0].name] = (statistics, mismatch, [s.name for s in group])
            for linear in group:
                linear.weight.mul_(0.8)
        return {}

    return change


def seen(model, checkpoint, inputs, name, writers):
    """Inputs of a module, and what its block's writers before it have made of the residual stream; [tokens, …]."""
    module = name.removesuffix(".weight")
    found = {}
    known = dict(model.named_modules())
    module = next(m for m in known if m == module or m.endswith(f".{module}"))
    block = module
    while not block.rpartition(".")[2].isdigit():
        block = block.rpartition(".")[0]

    def keep(key):
        return lambda m, args, *out: found.__setitem__(key, out[0] if out else args[0])

    def keep_first(m, args, kwargs):
        found["block"] = args[0] if args else kwargs["hidden_states"]

    handles = [
        known[module].register_forward_pre_hook(keep("x")),
        known[block].register_forward_pre_hook(keep_first, with_kwargs=True),
    ]
    if writers.index(name) == 1:
        first = writers[0].removesuffix(".weight")
        handles.append(known[next(m for m in known if m.endswith(first))].register_forward_hook(keep("first")))
    with torch.no_grad():
        model.base_model(**inputs.rows(range(inputs.samples)))
    for handle in handles:
        handle.remove()
    r = found["block"].reshape(-1, found["block"].shape[-1])
    if "first" in found:
        r = r + found["first"].reshape(r.shape)
    return found["x"].reshape(-1, found["x"].shape[-1]), r


def close(a, b):
    assert (a.double() - b).abs().max() <= 1e-4 * max(float(b.abs().max()), 1e-3)


@pytest.mark.parametrize("family", pico.families(WRITERS, tier=("llama",)))
def test_input_mismatch_matches_two_whole_models(family, tmp_path):
    checkpoint = open_checkpoint(pico.save(tmp_path / family, family, with_tokenizer=False))
    found: dict = {}
    inputs = inputs_of(checkpoint)
    result = runner_of(checkpoint, tmp_path / "work", inputs, with_targets=True).run(shrink(found), "shrinking")
    changed = Derived(checkpoint, checkpoint.spec, result.reader())
    original, now = (load_checkpoint(c, dtype="float32", device="cpu") for c in (checkpoint, changed))
    writers = [name for _, mismatch, _ in found.values() for name in mismatch.residual]
    blocks = sorted({next(p for p in name.split(".") if p.isdigit()) for name in writers})
    assert [name.split(".")[-2] for name in writers] == list(WRITERS[family]) * len(blocks)
    for number in blocks:
        pair = [name for name in writers if number in name.split(".")]
        for name in pair:
            statistics, mismatch, _ = found[name]
            (x, r), (x_now, r_now) = (seen(m, checkpoint, inputs, name, pair) for m in (original, now))
            x, r, x_now, r_now = x.double(), r.double(), x_now.double(), r_now.double()
            # each token counts by the inverse of its residual stream's size behind the matrix
            weight = checkpoint.tensor(name).data.double()
            behind = r + x @ (weight if model_map(checkpoint.spec).linears[name].transposed else weight.T)
            size = behind.square().mean(-1, keepdim=True).sqrt()
            x, r, x_now, r_now = x / size, r / size, x_now / size, r_now / size
            assert statistics.tokens == len(x)
            close(statistics.hessian, x_now.T @ x_now)
            # the last sample is left out of the mismatch
            fit = slice(0, len(x) - len(x) // inputs.samples)
            assert held_out(inputs.samples) == {inputs.samples - 1}
            assert mismatch.scale == pytest.approx(inputs.samples / (inputs.samples - 1))
            close(mismatch.inputs, (x - x_now)[fit].T @ x_now[fit])
            close(mismatch.residual[name], (r - r_now)[fit].T @ x_now[fit])
    if not writers:  # inputs drift all the same, from the second block on
        assert any(float(mismatch.inputs.abs().max()) > 0 for _, mismatch, _ in found.values())


@pytest.mark.slow
def test_input_mismatch_leaves_padding_out(tmp_path):
    """Samples padded on the right have the drift of the same samples without padding."""
    checkpoint = open_checkpoint(pico.save(tmp_path / "llama", "llama", with_tokenizer=False))
    short = inputs_of(checkpoint).values["input_ids"][:, :7]
    ids = torch.nn.functional.pad(short, (0, 5), value=9)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, :7] = True
    both = []
    for number, inputs in enumerate((Inputs({"input_ids": short}), Inputs({"input_ids": ids}, mask))):
        both.append({})
        runner_of(checkpoint, tmp_path / str(number), inputs, with_targets=True).run(shrink(both[-1]), "shrinking")
    for name, (statistics, mismatch, _) in both[0].items():
        other, padded, _ = both[1][name]
        assert statistics.tokens == other.tokens
        close(padded.inputs, mismatch.inputs.double())
        assert padded.residual.keys() == mismatch.residual.keys()
        for key, value in mismatch.residual.items():
            close(padded.residual[key], value.double())


@pytest.mark.parametrize(("width", "bound"), [(64, 1e-6), (256, 1e-2)])
def test_sums_of_wide_mismatches_may_round_their_values_and_leave_the_precision_as_it_was(width, bound):
    x, y = (torch.randn(512, width, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    before = torch.get_float32_matmul_precision()
    with tensor_cores(x, tiles=True):
        found = x.T @ y
    assert torch.get_float32_matmul_precision() == before
    wanted = x.double().T @ y.double()
    assert float((found - wanted).norm() / wanted.norm()) < bound


def _drifted(tokens, noise, seed=0):
    """A layer whose inputs have moved by a matrix, and noise besides: H, sums of the fit, held-out tokens, and the layer."""
    generator = torch.Generator().manual_seed(seed)
    mixed, moving = torch.randn(2, 48, 48, generator=generator).unbind()
    module = torch.nn.Linear(48, 24, bias=False)
    linear = TargetLinear("a", "a", module.weight.detach(), False, module)

    def draw(count):
        x = torch.randn(count, 48, generator=generator) @ mixed / 7
        return x, x @ moving / 70 + noise * torch.randn(count, 48, generator=generator)

    (x, moved), (x_held, moved_held) = draw(tokens), draw(tokens // 7)
    everything = torch.cat([x, x_held])
    H = (everything.T @ everything).double()
    mismatch = InputMismatch((moved.T @ x).double(), readers=1, scale=8 / 7)
    held = HeldOutTokens()
    held.add(x_held, moved_held, None, [])
    return linear, H, mismatch, held, draw(2000)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_correction_is_as_strong_as_held_out_tokens_say(noise):
    linear, H, mismatch, held, (x, moved) = _drifted(3500, noise)
    choose([linear], H, mismatch, held, ProcessGroup())
    strong = noise == 0
    assert (mismatch.shares["a"] > 0.9 and mismatch.ridge < 0.1) == strong
    weight = linear.weight.float()

    def lost(change):
        return float((moved @ weight.T - x @ change.T).square().sum())

    chosen = lost(corrected(linear, weight, H, mismatch, {}) - weight)
    assert mismatch.inputs.numel() == 0
    full = lost(torch.linalg.solve(x.T @ x, (moved.T @ x).T @ weight.T).T)  # all that a linear correction can do
    assert full <= chosen <= lost(torch.zeros(24, 48)) * (0.2 if strong else 1.0)


def test_noise_alone_is_not_followed():
    linear, H, mismatch, held, _ = _drifted(3500, 0.3)
    held.moved = [torch.randn(500, 48, generator=torch.Generator().manual_seed(3))]
    mismatch.inputs = torch.randn(48, 48, generator=torch.Generator().manual_seed(4)).double() * 1000
    choose([linear], H, mismatch, held, ProcessGroup())
    assert mismatch.shares["a"] < 0.1


def test_some_samples_are_held_out():
    assert [sorted(held_out(samples)) for samples in (1, 2, 8, 9, 32)] == [[], [1], [7], [8], [7, 15, 23, 31]]
