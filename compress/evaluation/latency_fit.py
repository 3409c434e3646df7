"""Prefill seconds as a + b·n + c·n² of the length n: the last term is attention that sees every earlier token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Bootstrap draws of the bounds of c, and their one-sided confidence.
_DRAWS, _CONFIDENCE = 200, 0.95
#: Lengths that a fit of three terms takes.
FEWEST = 3


def fit(lengths: Sequence[int], samples: Sequence[Sequence[float]], seed: int = 0) -> dict[str, Any]:
    """Fit the medians of the seconds at each length, with relative weights and no negative term.

    Args:
        samples: seconds of every round, by length.

    Returns:
        ``a``, ``b``, ``c`` in seconds, per token, per token²; bounds ``c_lower`` and ``c_upper`` of c over resampled rounds
        (one-sided 95 %); ``half``: the length where c·n² is half of the seconds, None where c is 0. ``doubt``: why c is not
        to be relied on, None for a sound fit. With fewer than three lengths all numbers are None.
    """
    import numpy as np

    empty = dict.fromkeys(("a", "b", "c", "c_lower", "c_upper", "half"))
    if len(lengths) < FEWEST:
        return {**empty, "doubt": f"a fit takes {FEWEST} lengths or more, there are {len(lengths)}"}
    medians = np.array([np.median(row) for row in samples])
    a, b, c = map(float, nonnegative(lengths, medians))
    random = np.random.default_rng(seed)
    drawn = [
        nonnegative(lengths, np.array([np.median(random.choice(row, len(row))) for row in samples]))[2]
        for _ in range(_DRAWS)
    ]
    lower, upper = (float(x) for x in np.quantile(drawn, [1 - _CONFIDENCE, _CONFIDENCE]))
    doubt = None
    if lower <= 0.5 * c or c == 0:
        doubt = f"the rounds do not tell n² from noise: c lies between {lower:.2g} and {upper:.2g}"
    half = half_length(a, b, c)
    return {"a": a, "b": b, "c": c, "c_lower": lower, "c_upper": upper, "half": half, "doubt": doubt}


def half_length(a: float, b: float, c: float) -> float | None:
    """The length n where c·n² equals a + b·n; None where c is 0."""
    return (b + math.sqrt(b * b + 4 * a * c)) / (2 * c) if c > 0 else None


def nonnegative(lengths: Sequence[int], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """a, b, c ≥ 0 with the least sum of squared relative errors.

    The active set of non-negative least squares is found by trying all seven sets of terms: the best of those whose
    solution has no negative term.
    """
    import numpy as np

    n = np.array(lengths, dtype=np.float64)
    scale = np.array([1.0, n.max(), n.max() ** 2])
    rows = np.stack([np.ones_like(n), n, n * n], 1) / scale / seconds[:, None]
    best, least = np.zeros(3), math.inf
    for count in (1, 2, 3):
        for terms in map(list, itertools.combinations(range(3), count)):
            solved = np.linalg.lstsq(rows[:, terms], np.ones_like(n), rcond=None)[0]
            error = float(((rows[:, terms] @ solved - 1) ** 2).sum())
            if (solved >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[terms] = solved
    result: NDArray[np.float64] = best / scale
    return result
