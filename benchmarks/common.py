# SPDX-License-Identifier: GPL-2.0-or-later
"""What every benchmark shares: a result with its bound, and paired measurement.

Absolute times on a shared machine mean little, so every figure is a ratio of two
things measured in turn in one run (A B A B ...), and the median of the pairs is
what counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass


class Unavailable(Exception):
    """Something that a benchmark needs is missing; the text says what, and how to get it."""


@dataclass(frozen=True, slots=True)
class Result:
    """One figure: `ratio` must not exceed `bound`. `detail` says what was measured, in words."""

    name: str
    ratio: float
    bound: float
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the promise holds."""
        return self.ratio <= self.bound


_limit: int | None = None


def limit_pairs(limit: int | None) -> None:
    """Let every measurement take at most so many pairs; None: as many as it wants."""
    global _limit
    _limit = limit


def median_ratio(
    ours: Callable[[], float], unit: Callable[[], float], pairs: int
) -> tuple[float, float, float]:
    """Measure `unit` and `ours` in turn; each returns a time in seconds.

    Returns the median of the pairwise ratios, and the median of each side.
    """
    rows = []
    for _ in range(pairs if _limit is None else min(pairs, _limit)):
        base = unit()
        rows.append((ours() / base, base))
    ratio = statistics.median(row[0] for row in rows)
    base = statistics.median(row[1] for row in rows)
    return ratio, statistics.median(row[0] * row[1] for row in rows), base
