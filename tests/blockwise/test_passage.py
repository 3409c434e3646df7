"""Samples that go through a block once meet the same numbers, to the bit, as in passes that start anew at each stop."""

from __future__ import annotations

import pytest
import torch

from compress.blockwise.device_room import DeviceRoom
from compress.blockwise.inputs import Inputs
from compress.blockwise.memory_budget import TOKENS_PER_BATCH
from compress.blockwise.passage import Passage, WaitingValues
from compress.blockwise.tape import record
from compress.checkpoint.open import open_checkpoint
from tests import pico
from tests.toolbox import LENGTH, inputs_of, runner_of

#: Blocks whose MLP depends on values: their tapes end there.
EXPERTS = {"qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3"}


def compare(seen):
    """A change of a block that compares both ways of going through it, and appends whether tapes came to the end."""

    def change(block):
        once = block.groups_once()
        shown = {len(once) - 1: [once[0][0]]}
        tape, anew = Passage(block, once, shown), Passage(block, once, shown, taped=False)
        for number, group in enumerate(once):
            for (rows, ours), (others, theirs) in zip(tape.advance(number), anew.advance(number), strict=True):
                assert rows == others
                assert len(ours) == len(theirs) == 1 + len(shown.get(number, ()))
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            again = tape.waiting(number, 0)
            assert torch.equal(again[0], anew.waiting(number, 0)[0])
            for linear in group:
                linear.weight.mul_(0.9)
        complete = {one is not None and one.complete for one in tape._of}
        seen.append(not tape.starts_anew(len(once) - 1, 0) and complete == {True})
        tape.seal()
        assert tape.holds()
        with torch.no_grad():
            for rows, output in tape.outputs():
                assert torch.equal(output, block.forward(rows, block.read_inputs(rows)))
        block.linears[0].weight.data[0, 0] += 1
        assert not tape.holds()
        return {}

    return change


@pytest.mark.parametrize("family", pico.families([*pico.ONE_LIST, "t5"], tier=["llama", "qwen3_moe"]))
def test_passage_matches_passes_that_start_anew(family, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 2 * LENGTH)
    checkpoint = open_checkpoint(pico.folder(family))
    inputs, seen = inputs_of(checkpoint, samples=5), []
    if family == "t5":
        inputs = Inputs({**inputs.values, "decoder_input_ids": inputs.values["input_ids"][:, :7]})
    runner_of(checkpoint, tmp_path, inputs).run(compare(seen), "comparing")
    assert all(seen) == (family not in EXPERTS)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_passage_of_padded_samples_has_a_tape_for_each_kind_of_call(family, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", LENGTH)
    checkpoint = open_checkpoint(pico.folder(family))
    values = inputs_of(checkpoint, samples=4).values
    mask = torch.ones_like(values["input_ids"], dtype=torch.bool)
    mask[2, LENGTH // 2 :] = mask[3, LENGTH // 3 :] = False
    seen = []
    runner_of(checkpoint, tmp_path, Inputs(values, mask)).run(compare(seen), "comparing")
    assert all(seen)


class Net(torch.nn.Module):
    """Two linears with something between them."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
        self.register_buffer("table", torch.arange(4.0))
        self.between, self.elsewhere = between, torch.ones(4)

    def forward(self, x):
        return x + self.second(self.between(self, self.first(x)))


def in_place(net, x):
    y = torch.zeros_like(x)
    y[..., :2] += x[..., 2:]
    return y.mul_(2) + torch.tensor(0.5) * net.table.view(4)


@pytest.mark.parametrize(
    "between",
    [
        in_place,
        lambda net, x: x @ net.first.weight.T.softmax(-1),
        lambda net, x: x.chunk(2, -1)[0].repeat(1, 2),
        lambda net, x: x[..., torch.tensor([1, 0, 3, 3])],
    ],
)
def test_tape_runs_again_in_parts(between):
    """With other inputs and changed weights, each part gives what the module gives; values wait between the parts."""
    net, (x, y) = Net(between), torch.randn(2, 3, 4)
    tape = record(
        lambda: net(x), [x], [*net.parameters(), *net.buffers()], [[net.first], [net.second]], {1: [net.first]}
    )
    assert (tape.reach, tape.complete) == (2, True)
    state = tape.run(0, [y], {})
    assert tape.shown(0, [y], state)[0] is y
    net.first.weight.data.mul_(3)
    state = tape.run(1, [y], state)
    inputs, output = tape.shown(1, [y], state)
    with torch.no_grad():
        assert torch.equal(output, net.first(y))
        assert torch.equal(inputs, between(net, net.first(y)))
        net.second.weight.data.mul_(3)
        assert torch.equal(tape.output([y], tape.run(2, [y], state)), y + net.second(inputs))


def test_tape_has_no_output_where_a_weight_is_read_before_it_changes():
    """The block's outputs are those of the changed weights, on which what the tape has done already depends."""
    net, x = Net(lambda net, x: x @ net.second.weight.T.softmax(-1)), torch.randn(3, 4)
    tape = record(lambda: net(x), [x], [*net.parameters()], [[net.first], [net.second]], {})
    assert (tape.reach, tape.complete) == (2, False)


def test_tape_reads_an_argument_where_the_first_one_was_a_buffer():
    net, x, other = Net(lambda net, x: x * net.given), torch.randn(3, 4), torch.randn(4)
    net.given = net.table
    tape = record(lambda: net(x), [x, net.table], [*net.parameters(), net.table], [[net.first], [net.second]], {})
    state = tape.run(1, [x, other], tape.run(0, [x, other], {}))
    assert torch.equal(tape.shown(1, [x, other], state)[0], net.first(x) * other)


def or_else(net, x):
    """Goes on where the pass is stopped."""
    try:
        return x * float(x.sum())
    except Exception:
        return x


@pytest.mark.parametrize(
    "between",
    [
        lambda net, x: x * float(x.sum()),
        lambda net, x: x[x > 0].sum() + x,
        lambda net, x: torch.nn.functional.dropout(x, 0.5),
        lambda net, x: x * net.elsewhere,
        lambda net, x: x * net.table.add_(1),
        lambda net, x: x.roll(x.argmax(-1).tolist()[0], -1),
        lambda net, x: x * float(x.numpy().sum()),
        lambda net, x: x * torch.tensor(list(x[0])),
        lambda net, x: torch.cat(x.tensor_split(x.argmax(-1)[:1], -1)[::-1], -1),
        or_else,
    ],
)
def test_tape_ends_where_it_could_not_be_run_again(between):
    net, x = Net(between), torch.randn(3, 4)
    tape = record(lambda: net(x), [x], [*net.parameters(), *net.buffers()], [[net.first], [net.second]], {})
    assert (tape.reach, tape.complete) == (1, False)
    assert torch.equal(tape.shown(0, [x], tape.run(0, [x], {}))[0], x)


@pytest.mark.parametrize("size", [0, 100, 1 << 20], ids=["in a file", "some on the device", "on the device"])
def test_waiting_values_are_read_as_they_were(size, tmp_path):
    """Views of one memory still are, and those that are to be conjugated or negated have their own values."""
    room = DeviceRoom(size, int)
    room.learn()
    z = torch.randn(3, 4, dtype=torch.complex64)
    values = {4: z, 5: z[:, 1:].T, 6: z.conj(), 7: z.conj().imag, 8: torch.empty(0)}
    waiting = WaitingValues(tmp_path, "cpu", [], room)
    waiting.write(0, values)
    waiting.turn()
    assert (room.left == size) == (size == 0)
    read = waiting.read(0)
    assert all(torch.equal(read[slot], value) for slot, value in values.items())
    read[4][0, 1] = 7
    assert read[5][0, 0] == 7
    assert torch.equal(waiting.read(0, [4])[4], z)
    waiting.turn()
    assert room.left == size
