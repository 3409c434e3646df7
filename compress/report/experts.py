"""Experts that no calibration token reached: which they are, and how many tokens would reach them.

A count of none among N tokens bounds an expert's share of the tokens from above alone (below 3/N, at 95 %), so there is no
number that surely suffices. The rule is the usual one for a count of none: it stands for half a token (Jeffreys' prior), a
share of 1/(2N), and an expert of that share is reached by 6N tokens in 95 of 100 draws, as 1 - exp(-3) is 95 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Tokens that reach an expert that none of one token reached, by the rule above.
TIMES = 6
#: Experts of a block that are named.
_NAMED = 8


def expert_rows(details: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line for each block with experts that no token reached: the block, how many of its experts these are, which, the
    fewest tokens that reached another one, and the tokens that would reach them."""
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
    said = []
    for row in (row for stage in report["stages"] for row in stage["passes"]):
        found = [
            (sum(not n for n in reached.values()), len(reached), tokens)
            for _, tokens, reached in _blocks(row["details"])
        ]
        if cold := sum(count for count, _, _ in found):
            tokens = max(tokens for _, _, tokens in found)
            said.append(
                f"{row['name']}: no calibration token reached {cold:,} of {sum(of for _, of, _ in found):,} experts, which "
                f"went by their weights alone; {tokens:,} tokens were read, and {TIMES * tokens:,} would likely reach them"
            )
    return said


def _blocks(details: Mapping[str, Any]) -> Iterator[tuple[int, int, Mapping[str, int]]]:
    """Each block whose experts were counted, when they first were: its number, tokens read, and tokens by expert."""
    seen = set()
    for row in [*details.get("experts", ()), *details.get("blocks", ())]:
        if (experts := row.get("experts")) is not None and row["block"] not in seen:
            seen.add(row["block"])
            yield row["block"], experts["tokens"], experts["reached"]
