"""Hidden states that are held in a device's memory, here in the CPU's, give what files give."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.blockwise import executor
from compress.blockwise.device_room import DeviceRoom, HeldStates, room_on
from compress.blockwise.hessians import tensor_cores
from compress.blockwise.read_ahead import ReadAhead
from compress.checkpoint.open import open_checkpoint
from tests import pico
from tests.toolbox import prune


def test_the_work_on_a_block_comes_before_hidden_states():
    peaks = iter([600, 900, 700])
    room = DeviceRoom(1000, lambda: next(peaks))
    assert not room.take(1)  # nobody knows yet what a block takes
    room.learn()
    assert room.left == 400
    assert room.take(300)
    assert not room.take(101)
    assert room.take(100)
    room.learn()  # 900 with 400 held
    assert room.left == 0
    room.give(400)
    assert room.left == 400
    room.learn()
    assert room.left == 400  # the most that any block took


def test_a_cpu_has_no_room():
    room = room_on("cpu", None)
    room.learn()
    assert not room.take(1)


def test_held_states_are_copies_and_only_those_that_were_written():
    room = DeviceRoom(1000, int)
    room.learn()
    held = HeldStates(room, torch.empty(0, dtype=torch.bfloat16), (4, 3))
    held.write([2, 0], torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert held.read([0, 1]) is None
    found = held.read([0, 2])
    assert found.tolist() == [[4, 5, 6], [1, 2, 3]]
    found.zero_()
    assert held.read([2]).tolist() == [[1, 2, 3]]
    assert room.left == 1000 - 24
    held.close()
    assert room.left == 1000
    assert HeldStates(DeviceRoom(0, int), torch.empty(0), (4, 3)).read([0]) is None


@pytest.mark.slow
def test_a_run_that_holds_hidden_states_ends_with_the_same_bytes(tmp_path, monkeypatch):
    """Much room, and room for some of them."""
    rooms = []

    def room_of(size):
        def room(device, max_vram):
            rooms.append(DeviceRoom(size, int))
            rooms[-1].learn()
            return rooms[-1]

        return room

    ids = torch.randint(2, 250, (8, 16), generator=torch.Generator().manual_seed(0))
    written = []
    for size in (0, 1 << 30, 50_000):
        monkeypatch.setattr(executor, "room_on", room_of(size))
        out = tmp_path / str(size)
        settings = {"weights": "int4", "group_size": 32, "reconstruction_epochs": 1}
        compress.apply("cast", pico.folder(), out, data=ids, device="cpu", **settings)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
    assert any(room._most > 100_000 for room in rooms)
    assert any(0 < room._most <= 50_000 for room in rooms)
    assert all(room._held == 0 for room in rooms)  # all of it was given back


@pytest.mark.parametrize("on_disk", [True, False])
def test_tensors_that_are_read_ahead_are_those_of_the_checkpoint(on_disk, monkeypatch):
    checkpoint = open_checkpoint(pico.folder())
    if not on_disk:
        checkpoint = prune(checkpoint, sparsity=0.5)
    names = [tensor.name for tensor in checkpoint.spec.stored()][:4]
    expected = [checkpoint.tensor(name).data for name in names]
    ahead = ReadAhead(checkpoint, pinned=False)
    ahead.begin(["missing"])
    ahead.begin(names[:3])
    assert len(ahead._coming) == (3 if on_disk else 0)
    for name, value in zip(names, expected, strict=True):
        assert torch.equal(ahead.tensor(name).data, value)


def test_tensor_cores_are_asked_for_on_a_gpu_alone(device):
    before = torch.get_float32_matmul_precision()
    with tensor_cores(torch.empty(1, device=device)):
        assert torch.get_float32_matmul_precision() == (before if device == "cpu" else "high")
    assert torch.get_float32_matmul_precision() == before
