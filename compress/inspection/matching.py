"""Which block of one checkpoint is which of another, where blocks were removed or added and the others renumbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.architectures.matrices import ModelBlock
from compress.architectures.model_map import model_map

if TYPE_CHECKING:
    import torch

    from compress.checkpoint.values import Checkpoint
    from compress.spec.spec import Spec

#: Values of a tensor that are compared, and tensors of a block.
_VALUES, _TENSORS = 16_384, 4


@dataclass(frozen=True)
class BlockMatch:
    """A list of blocks of which one checkpoint has more than the other.

    Attributes:
        path: of the list, such as ``model.layers``. removed: numbers of blocks of the first that the second lacks.
        added: numbers of blocks of the second that the first lacks. renumbered: number in the first ▶ in the second.
    """

    path: str
    removed: tuple[int, ...]
    added: tuple[int, ...]
    renumbered: Mapping[int, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        pairs = [list(pair) for pair in self.renumbered.items()]
        return {"path": self.path, "removed": list(self.removed), "added": list(self.added), "renumbered": pairs}


def match_blocks(first: Checkpoint, second: Checkpoint, *, values: bool) -> tuple[list[BlockMatch], dict[str, str]]:
    """Match the blocks of two checkpoints, in order, by the least sum of relative differences of a few of their tensors.

    By numbers alone where both have as many, or where no other order is closer.

    Args:
        values: compare matrices; False compares only vectors, which are small.

    Returns:
        The lists that differ in length, and name in the second checkpoint ▶ name in the first. The tensors of a block that was
        added are not in it.
    """
    names = {name: name for name in second.spec.tensors}
    matches = []
    a, b = _lists(first.spec), _lists(second.spec)
    for path in a.keys() & b.keys():
        if len(a[path]) == len(b[path]):
            continue
        pairs = _pairs(first, second, a[path], b[path], values)
        matches.append(
            BlockMatch(
                path,
                tuple(block.index for block in a[path] if block.index not in pairs),
                tuple(block.index for block in b[path] if block.index not in pairs.values()),
                {before: after for before, after in pairs.items() if before != after},
            )
        )
        back = {after: before for before, after in pairs.items()}
        for block in b[path]:
            for rest, tensor in block.tensors.items():
                if block.index in back:
                    names[tensor.name] = f"{path}.{back[block.index]}.{rest}"
                else:
                    del names[tensor.name]
    return matches, names


def _lists(spec: Spec) -> dict[str, list[ModelBlock]]:
    """The blocks of each list, by the list's path."""
    result: dict[str, list[ModelBlock]] = {}
    known = model_map(spec)
    for block in known.blocks if known.known else ():
        result.setdefault(block.path.removesuffix(".").rpartition(".")[0], []).append(block)
    return result


def _pairs(
    first: Checkpoint, second: Checkpoint, a: Sequence[ModelBlock], b: Sequence[ModelBlock], values: bool
) -> dict[int, int]:
    """Number of a block of the first ▶ of the second."""
    by_number = list(range(min(len(a), len(b))))
    costs = _costs(first, second, a, b, values)
    if costs is not None:
        turned = len(a) < len(b)
        rows = costs.T.tolist() if turned else costs.tolist()  # rows: the longer list
        best = _cheapest(rows)
        if _total(rows, best) < _total(rows, by_number):
            by_number = best
        if turned:
            return {a[short].index: b[long].index for short, long in enumerate(by_number)}
        return {a[long].index: b[short].index for short, long in enumerate(by_number)}
    return {a[i].index: b[i].index for i in by_number}


def _costs(
    first: Checkpoint, second: Checkpoint, a: Sequence[ModelBlock], b: Sequence[ModelBlock], values: bool
) -> torch.Tensor | None:
    """Relative differences [A, B] of the blocks; None where no tensor has one shape in all of them."""
    import torch

    blocks = [*a, *b]
    shapes = {
        rest: tensor.shape
        for rest, tensor in blocks[0].tensors.items()
        if tensor.is_float
        and tensor.alias_of is None
        and (values or len(tensor.shape) == 1)
        and all(rest in block.tensors and block.tensors[rest].shape == tensor.shape for block in blocks)
    }
    chosen = sorted(shapes, key=lambda rest: (len(shapes[rest]) < 2, blocks[0].tensors[rest].count))[:_TENSORS]
    if not chosen:
        return None

    def samples(checkpoint: Checkpoint, blocks: Sequence[ModelBlock], rest: str) -> torch.Tensor:
        return torch.stack([_sample(checkpoint, block.tensors[rest].name) for block in blocks])

    total = torch.zeros(len(a), len(b))
    for rest in chosen:
        x, y = samples(first, a, rest), samples(second, b, rest)
        total += (torch.cdist(x, y) / x.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(2.0).nan_to_num(2.0)
    return total / len(chosen)


def _sample(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return checkpoint.tensor(name).data.flatten()[:_VALUES].float()


def _total(costs: Sequence[Sequence[float]], pairs: Sequence[int]) -> float:
    return sum(costs[long][short] for short, long in enumerate(pairs))


def _cheapest(costs: Sequence[Sequence[float]]) -> list[int]:
    """The row of each column, ascending, at the least sum of costs (dynamic programming over both)."""
    long, short = len(costs), len(costs[0])
    best = [[0.0] * (long + 1) for _ in range(short + 1)]
    for s in range(1, short + 1):
        best[s][s - 1] = float("inf")
        for row in range(s, long + 1):
            best[s][row] = min(best[s][row - 1], best[s - 1][row - 1] + costs[row - 1][s - 1])
    pairs, row = [], long
    for s in range(short, 0, -1):
        while best[s][row] == best[s][row - 1]:
            row -= 1
        row -= 1
        pairs.append(row)
    return pairs[::-1]
