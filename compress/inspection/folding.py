"""Names that differ in numbers alone, and whose rows are equal, as one: ``model.layers.{0…4}.mlp.down_proj.weight``."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence

#: A number between dots; not one with a leading zero, which would not be told from the one without.
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.|$)")


def folded(rows: Iterable[tuple[str, Hashable]]) -> list[tuple[str, list[str]]]:
    """Fold names by their numbers, the last number first, where what goes with them is equal.

    Args:
        rows: name, and what must be equal for two names to become one.

    Returns:
        The folded name and the names it stands for, in order of the first.
    """
    groups = [(_parts(name), equal, [name]) for name, equal in rows]
    most = max((len(parts) for parts, _, _ in groups), default=0)
    for back in range(2, most + 1, 2):  # parts alternate: text, number, text …
        groups = _fold_at(groups, back)
    return [("".join(parts), names) for parts, _, names in groups]


_Group = tuple[tuple[str, ...], Hashable, list[str]]


def _parts(name: str) -> tuple[str, ...]:
    """Text and numbers of a name in turn, beginning and ending with text."""
    texts, numbers = _NUMBER.split(name), _NUMBER.findall(name)
    return tuple(part for pair in zip(texts, [*numbers, ""], strict=True) for part in pair)[:-1]


def _fold_at(groups: Sequence[_Group], back: int) -> list[_Group]:
    """Fold the groups that differ in one number: the ``back``-th part from the end."""
    result: dict[Hashable, list[_Group]] = {}
    for index, group in enumerate(groups):
        parts, equal, _ = group
        key = (parts[:-back], parts[len(parts) - back + 1 :], equal) if len(parts) > back else index
        result.setdefault(key, []).append(group)
    return [_joined(same, back) if len(same) > 1 else same[0] for same in result.values()]


def _joined(groups: Sequence[_Group], back: int) -> _Group:
    parts = list(groups[0][0])
    parts[-back] = f"{{{ranges([int(group[0][-back]) for group in groups])}}}"
    return tuple(parts), groups[0][1], [name for group in groups for name in group[2]]


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, neighbours as a range: ``0…4, 6``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        "…".join(map(str, (run[0], run[-1]))) if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )
