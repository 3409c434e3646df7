"""The Pareto front: trials that no other trial beats in every goal."""

from __future__ import annotations

from collections.abc import Sequence


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one point is nowhere worse and somewhere better; less is better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that none dominates, by the first coordinate; of equal points the first alone."""
    kept = [
        i
        for i, point in enumerate(points)
        if not any(dominates(other, point) for other in points)
        and list(point) not in [list(other) for other in points[:i]]
    ]
    return sorted(kept, key=lambda i: list(points[i]))
