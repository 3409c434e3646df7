"""Files of hidden states: what a block reads survives until the next block writes."""

from __future__ import annotations

import torch

from compress.blockwise.activations import ActivationStream


def states(value):
    return torch.full((2, 3), float(value))


def test_stream_alternates_between_two_files(tmp_path):
    stream = ActivationStream(tmp_path, "inputs", 2, [(3,)] * 4, torch.float32)
    for index in range(4):
        stream.before(index).write([0, 1], states(index))
        if index:
            assert torch.equal(stream.before(index - 1).read([0, 1]), states(index - 1))
    stream.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs0.act", "inputs1.act"]


def test_stream_opened_again_holds_what_was_written(tmp_path):
    stream = ActivationStream(tmp_path, "inputs", 2, [(3,)] * 4, torch.float32)
    stream.before(1).write([1], states(7)[:1])
    stream.close()
    again = ActivationStream(tmp_path, "inputs", 2, [(3,)] * 4, torch.float32)
    assert torch.equal(again.before(1).read([1]), states(7)[:1])
    assert torch.equal(again.before(1).read([0]), states(0)[:1])


def test_released_file_is_removed_only_on_demand(tmp_path):
    stream = ActivationStream(tmp_path, "", 2, [(3,)] * 4, torch.float32, files=3)
    for index in range(3):
        stream.before(index).write([0, 1], states(index))
    stream.release(0)
    stream.release(1, delete=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.act", "2.act"]
    assert torch.equal(stream.before(0).read([0, 1]), states(0))
