# SPDX-License-Identifier: GPL-2.0-or-later
"""The real-time clock: the time that it is given, and an alarm that rings once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.vmm import pl031
from pkvm.vmm.pl031 import SECOND, Pl031

NOW = 1_800_000_000


class Bench:
    """A clock on a line, with a time and timers that the test moves."""

    def __init__(self) -> None:
        self.now_ns = NOW * SECOND + SECOND // 2
        self.level = False
        self.timers: list[tuple[int, Callable[[], None]]] = []
        self.rtc = Pl031(self, lambda: self.now_ns, self.after)

    def set(self, level: bool) -> None:
        self.level = level

    def after(self, ns: int, call: Callable[[], None]) -> Callable[[], None]:
        timer = (self.now_ns + ns, call)
        self.timers.append(timer)
        return lambda: self.timers.remove(timer) if timer in self.timers else None

    def rings(self) -> bool:
        return self.level

    def read(self, offset: int) -> int:
        return self.rtc.read(offset, 4)

    def write(self, offset: int, value: int) -> None:
        self.rtc.write(offset, 4, value)

    def pass_time(self, ns: int) -> None:
        self.now_ns += ns
        due = [timer for timer in self.timers if timer[0] <= self.now_ns]
        self.timers = [timer for timer in self.timers if timer not in due]
        for _, call in due:
            call()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_it_tells_the_time_in_seconds(bench: Bench) -> None:
    assert bench.read(pl031.DR) == NOW
    bench.pass_time(SECOND // 2)
    assert bench.read(pl031.DR) == NOW + 1
    assert bench.read(pl031.CR) == 1
    bench.write(pl031.CR, 0)
    assert bench.read(pl031.CR) == 1


def test_loading_sets_the_guests_clock(bench: Bench) -> None:
    bench.write(pl031.LR, 100)
    assert (bench.read(pl031.DR), bench.read(pl031.LR)) == (100, 100)
    bench.pass_time(SECOND - 1)
    assert bench.read(pl031.DR) == 100
    bench.pass_time(1)
    assert bench.read(pl031.DR) == 101
    assert bench.read(pl031.LR) == 100


def test_the_counter_wraps(bench: Bench) -> None:
    bench.write(pl031.LR, 0xFFFF_FFFF)
    bench.pass_time(SECOND)
    assert bench.read(pl031.DR) == 0


def test_the_alarm_rings_by_itself_and_once(bench: Bench) -> None:
    bench.write(pl031.IMSC, 1)
    bench.write(pl031.MR, NOW + 2)
    bench.pass_time(SECOND * 3 // 2 - 1)
    assert not bench.rings()
    bench.pass_time(1)
    assert bench.rings()
    assert bench.read(pl031.RIS) == bench.read(pl031.MIS) == 1
    bench.write(pl031.ICR, 1)
    assert not bench.rings()
    bench.pass_time(100 * SECOND)
    assert not bench.rings()
    assert bench.timers == []


def test_a_masked_alarm_is_pending(bench: Bench) -> None:
    bench.write(pl031.MR, NOW + 1)
    bench.pass_time(SECOND)
    assert (bench.read(pl031.RIS), bench.read(pl031.MIS), bench.rings()) == (1, 0, False)
    bench.write(pl031.IMSC, 1)
    assert bench.rings()


def test_an_alarm_for_now_rings_now(bench: Bench) -> None:
    bench.write(pl031.IMSC, 1)
    bench.write(pl031.MR, NOW)
    assert bench.rings()


def test_setting_the_clock_moves_the_alarm(bench: Bench) -> None:
    bench.write(pl031.IMSC, 1)
    bench.write(pl031.MR, NOW + 1000)
    bench.write(pl031.LR, NOW + 999)
    bench.pass_time(SECOND)
    assert bench.rings()


def test_a_new_match_replaces_the_old(bench: Bench) -> None:
    bench.write(pl031.IMSC, 1)
    bench.write(pl031.MR, NOW + 1)
    bench.write(pl031.MR, NOW + 10)
    assert len(bench.timers) == 1
    bench.pass_time(5 * SECOND)
    assert not bench.rings()
    bench.rtc.close()
    assert bench.timers == []


def test_without_timers_the_alarm_is_noticed_when_looked_for() -> None:
    bench = Bench()
    bench.rtc = Pl031(bench, lambda: bench.now_ns, None)
    bench.write(pl031.IMSC, 1)
    bench.write(pl031.MR, NOW + 1)
    bench.pass_time(SECOND)
    assert not bench.rings()
    bench.write(pl031.IMSC, 1)
    assert bench.rings()


def test_in_real_time_it_rings_by_itself() -> None:
    rang = threading.Event()

    class Line:
        def set(self, level: bool) -> None:
            if level:
                rang.set()

    rtc = Pl031(Line())
    assert abs(rtc.read(pl031.DR, 4) - time.time()) < 5
    rtc.write(pl031.IMSC, 4, 1)
    rtc.write(pl031.MR, 4, rtc.read(pl031.DR, 4) + 1)
    assert rang.wait(20)
    rtc.write(pl031.MR, 4, rtc.read(pl031.DR, 4) + 1000)
    rtc.close()
    rtc.close()


def test_identification(bench: Bench) -> None:
    found = [bench.read(0xFE0 + 4 * n) for n in range(8)]
    assert sum(byte << 8 * n for n, byte in enumerate(found[:4])) & 0xF_FFFF == 0x41031
    assert found[4:] == [0x0D, 0xF0, 0x05, 0xB1]


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.one_of(st.sampled_from(range(0, 0x24, 4)), st.integers(0, 0xFFF)),
            st.sampled_from((1, 2, 4, 8)),
            st.integers(0, 2**64 - 1),
            st.integers(0, 10 * SECOND),
        )
    )
)
def test_every_access_is_defined(log: list[tuple[bool, int, int, int, int]]) -> None:
    bench = Bench()
    for is_write, offset, size, value, ns in log:
        bench.pass_time(ns)
        if is_write:
            bench.rtc.write(offset, size, value)
        else:
            assert 0 <= bench.rtc.read(offset, size) < 1 << 8 * size
        assert len(bench.timers) <= 1
        assert bench.level == bool(bench.read(pl031.MIS))
