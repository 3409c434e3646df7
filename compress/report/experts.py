"""Experts that no calibration token reached, and how many tokens would likely reach them.

If none of N tokens reaches an expert, its share of the tokens is below 3/N (at 95 %), but may be arbitrarily small, so no
number of tokens surely suffices. The estimate counts half a token (Jeffreys' prior): a share of 1/(2N). With that share, 6N
tokens reach the expert with probability 1 - exp(-3) = 95 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from compress.passes.details import PassDetails

#: Factor on the number of tokens, by the estimate above.
TIMES = 6
#: Most experts of a block that are named.
_NAMED = 8


def expert_rows(details: PassDetails) -> list[tuple[str, ...]]:
    """A row per block with experts that no token reached: block, their number, their names, the fewest tokens that reached
    another expert, tokens read, and tokens that would likely reach them."""
    rows: list[tuple[str, ...]] = []
    for block, tokens, reached in _blocks(details):
        if cold := [name for name, count in reached.items() if not count]:
            numbers = [name.rpartition(".")[2] for name in cold]
            shown = ", ".join(numbers[:_NAMED]) + (f" and {len(cold) - _NAMED} more" if len(cold) > _NAMED else "")
            fewest = min((count for count in reached.values() if count), default=None)
            rows.append(
                (
                    str(block),
                    f"{len(cold)} of {len(reached)}",
                    shown,
                    "" if fewest is None else f"{fewest:,}",
                    f"{tokens:,}",
                    f"{TIMES * tokens:,}",
                )
            )
    return rows


def cold_experts(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each pass with experts that no token reached."""
    sentences = []
    for row in (row for stage in report["stages"] for row in stage["passes"]):
        counts = [
            (sum(not n for n in reached.values()), len(reached), tokens)
            for _, tokens, reached in _blocks(row["details"])
        ]
        if cold := sum(count for count, _, _ in counts):
            tokens = max(tokens for _, _, tokens in counts)
            sentences.append(
                f"{row['name']}: no calibration token reached {cold:,} of {sum(of for _, of, _ in counts):,} experts, so only "
                f"their weights were used; {tokens:,} tokens were read, and {TIMES * tokens:,} would likely reach them"
            )
    return sentences


def _blocks(details: PassDetails) -> Iterator[tuple[int, int, Mapping[str, int]]]:
    """Number, tokens read, and tokens by expert of each block whose experts were counted; its first count."""
    seen = set()
    for row in [*details.get("experts", ()), *details.get("blocks", ())]:
        if (experts := row.get("experts")) is not None and row["block"] not in seen:
            seen.add(row["block"])
            yield row["block"], experts["tokens"], experts["reached"]
