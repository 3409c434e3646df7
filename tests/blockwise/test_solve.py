"""`solve_block` asks a solver for each matrix once, and places solutions when the block may be changed."""

from __future__ import annotations

import pytest
import torch

from compress.blockwise.asymmetric import statistics_of, symmetric_statistics
from compress.blockwise.solve import shared_out, solve_block
from compress.checkpoint.open import open_checkpoint
from tests import pico
from tests.toolbox import matrices, runner_of


class Halve:
    """Halves every matrix, and records what it is asked."""

    def __init__(self):
        self.solved, self.placed, self.groups = [], [], []

    def prepare(self, linears, statistics, mismatch, shared):
        assert not shared
        shared["next"] = [linear.name for linear in linears]
        self.groups.append({linear.group for linear in linears})

    def solve(self, linear, statistics, mismatch, shared):
        assert linear.name == shared["next"].pop(0)
        self.solved.append(linear.name)
        return linear.weight / 2, {"error": statistics.relative_error(linear.weight, linear.weight / 2)}

    def blank(self, linear):
        raise AssertionError("one process solves everything itself")

    def tensors(self, solution):
        return [solution]

    def place(self, linear, solution):
        assert linear.name in self.solved
        self.placed.append(linear.name)
        linear.weight.copy_(solution)


@pytest.mark.parametrize("measure", [symmetric_statistics, statistics_of])
def test_solve_block_solves_and_places_each_matrix_once(measure, tmp_path):
    checkpoint = open_checkpoint(pico.folder("llama"))
    solvers = []

    def change(block):
        solvers.append(Halve())
        solutions = solve_block(block, measure(block), solvers[-1])
        assert all(torch.equal(linear.weight, solutions[linear.name]) for linear in block.linears)
        assert block.details["tensors"].keys() == solutions.keys()
        assert all(row["error"] == pytest.approx(0.25, rel=1e-4) for row in block.details["tensors"].values())
        return {}

    result = runner_of(checkpoint, tmp_path, with_targets=True).run(change, "halving")
    for solver in solvers:
        assert sorted(solver.solved) == sorted(solver.placed) == sorted(set(solver.solved))
        assert all(len(group) == 1 for group in solver.groups)
    read = result.reader()
    assert all(torch.equal(read(name).data, checkpoint.tensor(name).data / 2) for name in matrices(checkpoint))


def test_matrices_are_shared_out_by_cost():
    loads = [0.0, 0.0]
    assert shared_out([3, 1, 1], loads) == [0, 1, 1]
    assert loads == [3, 2]
    assert shared_out([4], loads) == [1]
    assert shared_out([5, 5, 5], [0.0]) == [0, 0, 0]
