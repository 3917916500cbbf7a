# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine's time: real, or virtual and repeatable.

Virtual time is a count of translated blocks of guest code, 16 ns a block, plus
the jumps that whoever schedules vCPUs makes when every one of them waits. One
block is one tick of the 62.5 MHz system counter, the frequency that the CPU
engine's CNTVCT_EL0 has on the real clock too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

COUNTER_HZ = 62_500_000
"""Frequency of the system counter, CNTFRQ_EL0."""
NS_PER_TICK = 1_000_000_000 // COUNTER_HZ
NS_PER_BLOCK = NS_PER_TICK
"""Virtual nanoseconds that one translated block of guest code takes."""


def counter_ticks(ns: int) -> int:
    """The system counter (CNTPCT_EL0) at `ns` nanoseconds; a 64-bit counter, so it wraps."""
    return ns // NS_PER_TICK & (1 << 64) - 1


class Clock(Protocol):
    """What the machine's parts may ask of time."""

    @property
    def virtual(self) -> bool:
        """Whether time stands still while no guest runs, until somebody advances it."""
        ...

    def now_ns(self) -> int:
        """Nanoseconds; never goes back."""
        ...


class RealClock:
    """The monotonic clock of the computer pkvm runs on, which CNTVCT_EL0 counts as well."""

    virtual = False
    now_ns = staticmethod(time.monotonic_ns)
    """Nanoseconds of CLOCK_MONOTONIC."""


class VirtualClock:
    """Time as `blocks()` counts it, in translated blocks since the machine was made.

    Starts at 0. `blocks` must never decrease.
    """

    virtual = True

    def __init__(self, blocks: Callable[[], int]) -> None:
        self._blocks = blocks
        self._jumped_ns = 0
        self._lock = threading.Lock()

    def now_ns(self) -> int:
        """Virtual nanoseconds."""
        return self._blocks() * NS_PER_BLOCK + self._jumped_ns

    def advance_to(self, ns: int) -> None:
        """Jump to `ns`; nothing happens if that is past. For when every vCPU waits."""
        with self._lock:
            ahead = ns - self.now_ns()
            if ahead > 0:
                self._jumped_ns += ahead
