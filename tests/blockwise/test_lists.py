"""Encoder-decoders run block by block: the decoder's blocks read what the encoder outputs as it is by then."""

from __future__ import annotations

import pytest
import torch
import transformers

from compress import architectures
from compress.blockwise.executor import BlockExecutor
from compress.blockwise.inputs import Inputs
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.values import Derived
from compress.errors import PassError
from compress.models.blocks import find_lists
from compress.models.loading import load_checkpoint
from tests import pico
from tests.toolbox import matrices, runner_of

SOURCE, TARGET, SAMPLES = 12, 9, 5


def pairs(masked: bool, target: int = TARGET) -> Inputs:
    """Sources and targets, each padded on the right where ``masked``."""
    generator = torch.Generator().manual_seed(0)
    ids, read = (torch.randint(2, 250, (SAMPLES, n), generator=generator) for n in (SOURCE, target))
    lengths = torch.tensor([SOURCE, 4, 7, 5, 9])[:, None]
    mask = torch.arange(SOURCE) < lengths
    target_mask = torch.arange(target) < lengths - 3
    values = {"input_ids": ids, "decoder_input_ids": read}
    return Inputs(values, mask, target_mask) if masked else Inputs(values)


def whole(checkpoint, inputs):
    """Outputs of every block and inputs of every linear layer in a plain forward of the stock model, by name in memory."""
    model = load_checkpoint(checkpoint, dtype="float32")
    record = architectures.of(checkpoint.spec.structure.config)
    blocks = [block for modules in find_lists(model, record).values() for block in modules]
    outputs: dict[int, torch.Tensor] = {}
    reads: dict[str, torch.Tensor] = {}
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda m, a, o, i=i: outputs.__setitem__(i, o[0] if isinstance(o, tuple) else o))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, a, name=name: reads.__setitem__(f"{name}.weight", a[0]))
    with torch.no_grad():
        model(**inputs.rows(range(SAMPLES)))
    return outputs, reads


@pytest.mark.parametrize(
    ("masked", "target"),
    [
        *(pytest.param(masked, TARGET, marks=pytest.mark.slow) for masked in (False, True)),
        (True, SOURCE),
    ],
)
def test_both_lists_match_the_whole_model(masked, target, folders, tmp_path):
    """Outputs of blocks, and statistics of all matrices; those of cross-attention count the source's tokens."""
    checkpoint, inputs = open_checkpoint(folders["t5"]), pairs(masked, target)
    outputs, reads = whole(checkpoint, inputs)
    runner = runner_of(checkpoint, tmp_path, inputs, with_targets=True)
    seen, compared = {}, []

    def look(block):
        seen.update({linear.name: sums for group, sums, _ in block.statistics(1) for linear in group})
        rows = list(range(SAMPLES))
        with torch.no_grad():
            output = block.forward(rows, block.inputs.read(rows))
            assert torch.equal(output, block.targets.read(rows))
        expected = outputs[block.index]
        output = output[:, : expected.shape[1]]  # a decoder may have got a token that does not count
        assert (output - expected).abs().max() <= 1e-5 * output.abs().max()
        compared.append(block.index)
        return {}

    runner.run(look, "looking")
    assert compared == list(range(7))
    assert seen.keys() == matrices(checkpoint)
    for name, sums in seen.items():
        x = reads[name]
        of_source = name.startswith("encoder.") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
        mask = inputs.mask if of_source else inputs.target_mask
        x = (x.flatten(0, 1) if mask is None else x[mask]).double()
        assert sums.tokens == len(x), name
        assert torch.allclose(sums.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-4 * float((x.T @ x).abs().max())), name


@pytest.mark.parametrize("told", [True, False])
def test_a_decoder_at_its_longest_position_gets_no_further_token(told, tmp_path, monkeypatch):
    """Where its texts are as long as what the encoder outputs, masks cannot be told apart without one."""
    sizes = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    config = transformers.BartConfig(**sizes, **heads, vocab_size=256, d_model=16, max_position_embeddings=SOURCE)
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path / "in")
    if not told:
        monkeypatch.setattr(BlockExecutor, "_longest", lambda self: None)
    line = "as long as what the encoder outputs, 12 positions.* takes no longer ones; give texts that are shorter by a token"
    with pytest.raises(PassError, match=line):
        runner_of(open_checkpoint(tmp_path / "in"), tmp_path, pairs(True, SOURCE)).run(lambda block: {}, "looking")


def test_the_decoder_reads_the_encoder_as_it_was_changed(folders, tmp_path):
    """Statistics of the decoder are those of the model with the changed encoder; originals are those of the model as it came."""
    checkpoint, inputs = open_checkpoint(folders["t5"]), pairs(masked=True)
    name = "encoder.block.3.layer.1.DenseReluDense.wo.weight"
    value = checkpoint.tensor(name)
    changed = Derived(
        checkpoint,
        checkpoint.spec,
        lambda n: type(value)(value.data * 3) if n == name else checkpoint.tensor(n),
    )
    _, reads = whole(changed, inputs)
    _, before = whole(checkpoint, inputs)
    key = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    hessians, originals = [], []

    def change(block):
        by_name = {linear.name: linear for linear in block.linears}
        if name in by_name:
            by_name[name].weight.mul_(3)
        if key in by_name:
            hessians.append(next(block.statistics(groups=block.groups_with([key])))[1].hessian)
            handle = by_name[key].module.register_forward_pre_hook(lambda m, a: originals.append(a[0]))
            with torch.no_grad():
                block.forward_original([0, 1], block.originals.read([0, 1]))
            handle.remove()
        return {}

    runner_of(checkpoint, tmp_path, inputs, with_targets=True).run(change, "changing")
    x = reads[key][inputs.mask].double()
    assert torch.allclose(hessians[0].double(), x.T @ x, rtol=1e-4, atol=1e-3)
    assert torch.allclose(originals[0], before[key][:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before[key], reads[key], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 1, 3, 6])
def test_a_killed_run_continues_in_either_list(stop, folders, tmp_path):
    """Stopped inside the encoder, at its last block, at the decoder's first, or later: the same bytes as in one go."""
    checkpoint, inputs = open_checkpoint(folders["t5"]), pairs(masked=True)

    def change(block):
        if block.index == stop and killing:
            raise KeyboardInterrupt
        for group, sums, _ in block.statistics():
            for linear in group:
                linear.weight.mul_(
                    1 + sums.hessian.diagonal().mean().float() / (1 + sums.hessian.diagonal().max().float())
                )
        return {}

    killing = False
    once = runner_of(checkpoint, tmp_path / "once", inputs, with_targets=True).run(change, "changing").reader()
    killing = True
    with pytest.raises(KeyboardInterrupt):
        runner_of(checkpoint, tmp_path / "twice", inputs, with_targets=True).run(change, "changing")
    killing = False
    twice = runner_of(checkpoint, tmp_path / "twice", inputs, with_targets=True).run(change, "changing").reader()
    assert all(torch.equal(once(n).data, twice(n).data) for n in matrices(checkpoint))


def test_what_later_blocks_read_of_the_first_stays_as_it_is(folders, tmp_path):
    """T5's first blocks compute the biases of positions for all others: reconstruction must not train them."""
    checkpoint = open_checkpoint(folders["t5"])
    frozen = {}

    def look(block):
        frozen[block.index] = {n for n, p in block.module.named_parameters() if id(p) in block.frozen}
        return {}

    runner_of(checkpoint, tmp_path, pairs(masked=False)).run(look, "looking")
    table = {"layer.0.SelfAttention.relative_attention_bias.weight"}
    assert frozen == {i: table if i in (0, 4) else set() for i in range(7)}


def test_blocks_that_hand_on_what_depends_on_hidden_states_are_refused(folders, tmp_path):
    checkpoint = open_checkpoint(folders["t5"])
    runner = runner_of(checkpoint, tmp_path, pairs(masked=False))
    first = runner.streamed.layers[0]
    forward = first.forward
    first.forward = lambda hidden, *a, **k: (lambda o: (o[0], o[1] + o[0].mean(), o[2]))(forward(hidden, *a, **k))
    with pytest.raises(PassError, match=r"encoder\.block\.0 hands more than its hidden states to later blocks; use"):
        runner.run(lambda block: {}, "looking")


def test_a_matrix_that_no_layer_is_called_with_is_refused_before_the_work(folders, tmp_path):
    """Its inputs would stay unseen, and its statistics zero."""
    runner = runner_of(open_checkpoint(folders["llama"]), tmp_path)
    mlp = runner.streamed.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (x @ mlp.up_proj.weight.T))
    with pytest.raises(
        PassError, match=r"layers\.1\.mlp\.up_proj\.weight is used by its block without a call .*\*\.mlp\.up_proj"
    ):
        runner.run(lambda block: {}, "looking")


def test_a_matrix_that_the_block_does_not_use_has_no_tokens(folders, tmp_path):
    runner = runner_of(open_checkpoint(folders["llama"]), tmp_path)
    mlp = runner.streamed.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
    unread = {}

    def look(block):
        tokens = {linear.name: sums.tokens for group, sums, _ in block.statistics() for linear in group}
        unread[block.index] = (block.unread, [name for name, count in tokens.items() if not count])
        return {}

    runner.run(look, "looking")
    name = "model.layers.1.mlp.up_proj.weight"
    assert unread == {i: ([name], [name]) if i == 1 else ([], []) for i in range(4)}


def test_a_block_that_runs_more_than_once_is_refused(tmp_path):
    """ALBERT runs one block several times: its inputs are those of all times."""
    folder = pico.save(tmp_path / "in", "albert", with_tokenizer=False, num_hidden_groups=1)
    with pytest.raises(PassError, match="block 0 is run more than once; use a method that needs no calibration"):
        runner_of(open_checkpoint(folder), tmp_path / "work").run(lambda block: {}, "looking")
