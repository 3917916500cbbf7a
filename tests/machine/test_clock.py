# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from pkvm.machine.clock import COUNTER_HZ, Clock, RealClock, VirtualClock, counter_ticks


def test_a_tick_of_the_counter_is_sixteen_nanoseconds() -> None:
    assert counter_ticks(15) == 0
    assert counter_ticks(16) == 1
    assert counter_ticks(1_000_000_000) == COUNTER_HZ


def test_the_counter_has_64_bits() -> None:
    assert counter_ticks(16 << 64) == 0


def test_real_time_is_the_monotonic_clock() -> None:
    clock: Clock = RealClock()
    before = time.monotonic_ns()
    now = clock.now_ns()
    assert before <= now <= time.monotonic_ns()
    assert not clock.virtual


def test_virtual_time_counts_blocks_and_jumps() -> None:
    blocks = 0
    clock = VirtualClock(lambda: blocks)
    assert clock.virtual
    assert clock.now_ns() == 0
    blocks = 3
    assert clock.now_ns() == 48
    clock.advance_to(1000)
    assert clock.now_ns() == 1000
    clock.advance_to(999)
    assert clock.now_ns() == 1000
    blocks = 5
    assert clock.now_ns() == 1032


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1 << 40)), max_size=30))
def test_virtual_time_never_goes_back(steps: list[tuple[bool, int]]) -> None:
    blocks = 0
    clock = VirtualClock(lambda: blocks)
    last = 0
    for jump, amount in steps:
        if jump:
            clock.advance_to(amount)
            assert clock.now_ns() == max(last, amount)
        else:
            blocks += amount
            assert clock.now_ns() == last + 16 * amount
        last = clock.now_ns()
