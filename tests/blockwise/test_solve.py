"""`solve_block` asks a solver for each matrix once, and places solutions when the block may be changed."""

from __future__ import annotations

import pytest
import torch

from compress.blockwise.asymmetric import statistics_of, symmetric_statistics
from compress.blockwise.linears import TargetLinear
from compress.blockwise.shares import by_cost, by_outputs, shared_out
from compress.blockwise.solve import MatrixSolver, _joined, solve_block
from compress.checkpoint.open import open_checkpoint
from tests import pico
from tests.toolbox import matrices, runner_of


class Halve(MatrixSolver):
    """Halves every matrix, and records what it is asked."""

    def __init__(self):
        self.solved, self.placed, self.groups = [], [], []

    def prepare(self, groups):
        ((linears, _, _, shared),) = groups
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
    assert by_cost([3, 1, 1], loads) == [0, 1, 1]
    assert loads == [3, 2]
    assert by_cost([4], loads) == [1]
    assert by_cost([5, 5, 5], [0.0]) == [0, 0, 0]


def _linear(name, outputs, owner=None):
    return TargetLinear(name, name, torch.arange(outputs * 2.0).view(outputs, 2), False, None, owner=owner)


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("sizes", [(576, 192, 192), (576,), (64,), (7,), (1536, 1536), (100, 3)])
def test_outputs_are_shared_out_evenly(workers, sizes):
    group = [_linear(str(i), size) for i, size in enumerate(sizes)]
    shares = by_outputs(group, workers)
    for linear, own in zip(group, shares, strict=True):
        assert torch.equal(torch.cat([share.linear.weight for share in own]), linear.weight)
        assert [share.worker for share in own] == sorted({share.worker for share in own})
        assert all(share.linear.weight.data_ptr() >= linear.weight.data_ptr() for share in own)
    loads = [sum(len(s.linear.weight) for own in shares for s in own if s.worker == w) for w in range(workers)]
    assert max(loads) - sum(sizes) / workers <= 16


def test_only_matrices_of_independent_outputs_are_divided():
    group = [_linear("a", 64), _linear("b", 64)]
    assert [len(own) for own in shared_out(group[:1], lambda _: True, [0.0, 0.0])] == [2]
    assert [len(own) for own in shared_out(group[:1], lambda _: True, [0.0])] == [1]
    assert [len(own) for own in shared_out(group, lambda linear: linear.name == "a", [0.0, 0.0])] == [1, 1]
    assert [len(own) for own in shared_out([_linear("c", 64, owner=object())], lambda _: True, [0.0, 0.0])] == [1]


def test_rows_of_portions_are_joined():
    rows = [
        {"error": 0.1, "energy": 3.0, "seconds": 1.0, "sparsity": 0.5, "format": "int4"},
        {"error": 0.5, "energy": 1.0, "seconds": 2.0, "sparsity": 0.8, "format": "int4"},
    ]
    joined = _joined(rows, [32, 16])
    assert joined == {"error": pytest.approx(0.2), "seconds": 2.0, "sparsity": pytest.approx(0.6), "format": "int4"}
    unread = {"error": None, "note": "no token reached it: rounded to nearest", "seconds": 1.0}
    assert _joined([unread, unread], [32, 16]) == unread
