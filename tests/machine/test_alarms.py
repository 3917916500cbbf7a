# SPDX-License-Identifier: GPL-2.0-or-later
"""Alarms: on the real clock by a thread, on the virtual clock at an exact block."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkvm.machine.alarms import FAR_NS, Alarms
from pkvm.machine.clock import NS_PER_BLOCK, RealClock, VirtualClock

TIMEOUT_S = 20
MS = 1_000_000
FAR = 3600 * 1000 * MS


class Cpu:
    """Counts interrupts; knows at which block it would stop."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.blocks = 0
        self.stop: int | None = None

    def interrupt(self) -> None:
        self.interrupts += 1

    def set_alarm(self, blocks: int | None) -> None:
        assert blocks is None or blocks >= 0
        self.stop = None if blocks is None else self.blocks + blocks


@pytest.fixture
def real() -> Iterator[tuple[Alarms, Cpu]]:
    cpu = Cpu()
    alarms = Alarms(RealClock(), cpu)
    yield alarms, cpu
    alarms.close()
    assert not any(thread.name == "alarms" for thread in threading.enumerate())


class Calls:
    """A callback that notes when it is called."""

    def __init__(self) -> None:
        self.times: list[int] = []
        self._called = threading.Semaphore(0)

    def __call__(self) -> None:
        self.times.append(time.monotonic_ns())
        self._called.release()

    def wait(self) -> int:
        assert self._called.acquire(timeout=TIMEOUT_S), "the alarm never came"
        return self.times[-1]


def test_no_thread_before_the_first_alarm_is_set(real: tuple[Alarms, Cpu]) -> None:
    alarm = real[0].new(Calls())
    alarm.cancel()
    assert not any(thread.name == "alarms" for thread in threading.enumerate())


def test_alarm_comes_once_and_not_early(real: tuple[Alarms, Cpu]) -> None:
    alarms, cpu = real
    calls, barrier = Calls(), Calls()
    alarm = alarms.new(calls)
    deadline = time.monotonic_ns() + 2 * MS
    alarm.set(deadline)
    assert calls.wait() >= deadline
    alarms.new(barrier).set(0)
    barrier.wait()
    assert len(calls.times) == 1
    assert alarm.deadline is None
    assert cpu.interrupts >= 1


def test_an_earlier_deadline_overtakes(real: tuple[Alarms, Cpu]) -> None:
    alarms, _ = real
    late, early = Calls(), Calls()
    alarms.new(late).set(time.monotonic_ns() + FAR)
    alarms.new(early).set(time.monotonic_ns() + MS)
    early.wait()
    assert not late.times


def test_cancelled_and_closed_alarms_do_not_come(real: tuple[Alarms, Cpu]) -> None:
    alarms, _ = real
    never, barrier = Calls(), Calls()
    soon = time.monotonic_ns() + 50 * MS
    one, two = alarms.new(never), alarms.new(never)
    one.set(soon)
    two.set(soon)
    one.cancel()
    two.close()
    alarms.new(barrier).set(soon + 1)
    barrier.wait()
    assert not never.times


def test_a_deadline_that_passed_is_not_lost(real: tuple[Alarms, Cpu]) -> None:
    """The thread may be late; whoever sets the alarm anew cannot know."""
    alarms, _ = real
    calls = Calls()
    alarm = alarms.new(calls)
    gate = threading.Event()

    def hold() -> None:
        gate.wait(TIMEOUT_S)

    alarms.new(hold).set(0)
    alarm.set(time.monotonic_ns())
    alarm.set(time.monotonic_ns() + FAR)
    alarm.set(time.monotonic_ns())
    alarm.cancel()
    gate.set()
    calls.wait()


def test_callback_sets_its_own_alarm_again(real: tuple[Alarms, Cpu]) -> None:
    alarms, _ = real
    calls = Calls()

    def tick() -> None:
        calls()
        if len(calls.times) < 5:
            alarm.set(time.monotonic_ns() + MS // 2)

    alarm = alarms.new(tick)
    alarm.set(0)
    for _ in range(5):
        calls.wait()
    assert calls.times == sorted(calls.times)


def test_close_from_a_callback_and_twice() -> None:
    alarms = Alarms(RealClock(), Cpu())
    calls = Calls()

    def end() -> None:
        alarms.close()
        calls()

    alarms.new(end).set(0)
    calls.wait()
    alarms.close()
    alarms.new(calls).set(0)
    assert len(calls.times) == 1


def test_many_threads_set_alarms(real: tuple[Alarms, Cpu]) -> None:
    alarms, _ = real
    calls = [Calls() for _ in range(4)]

    def work(mine: Calls) -> None:
        alarm = alarms.new(mine)
        for round_ in range(50):
            alarm.set(time.monotonic_ns() + FAR)
            alarm.cancel()
            alarm.set(time.monotonic_ns() + round_)
            mine.wait()

    threads = [threading.Thread(target=work, args=(mine,)) for mine in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


# Virtual clock


class VirtualRig:
    """A CPU that executes blocks until an alarm stops it."""

    def __init__(self) -> None:
        self.cpu = Cpu()
        self.clock = VirtualClock(lambda: self.cpu.blocks)
        self.alarms = Alarms(self.clock, self.cpu)
        self.seen: list[tuple[str, int]] = []

    def note(self, name: str) -> Callable[[], None]:
        return lambda: self.seen.append((name, self.clock.now_ns()))

    def run(self, blocks: int) -> None:
        end = self.cpu.blocks + blocks
        while self.cpu.blocks < end:
            stop = self.cpu.stop
            if stop is None or stop > end:
                self.cpu.blocks = end
            else:
                self.cpu.blocks = stop
                self.cpu.set_alarm(None)
                self.alarms.fire()


def test_engine_stops_at_the_block_of_the_deadline() -> None:
    rig = VirtualRig()
    for name, block in (("b", 20), ("a", 10), ("c", 20)):
        rig.alarms.new(rig.note(name)).set(block * NS_PER_BLOCK)
    rig.alarms.new(rig.note("between")).set(15 * NS_PER_BLOCK + 1)
    assert rig.cpu.stop == 10
    rig.run(100)
    assert rig.seen == [("a", 160), ("between", 256), ("b", 320), ("c", 320)]
    assert rig.cpu.interrupts == 3


def test_jump_goes_to_the_next_deadline_and_no_further() -> None:
    rig = VirtualRig()
    rig.alarms.new(rig.note("late")).set(5_000_000)
    early = rig.alarms.new(rig.note("early"))
    early.set(1_000_000)
    assert rig.alarms.jump()
    assert rig.seen == [("early", 1_000_000)]
    assert rig.alarms.jump()
    assert not rig.alarms.jump()
    assert rig.seen[1:] == [("late", 5_000_000)]
    assert rig.cpu.interrupts == 0
    early.set(0)
    assert rig.alarms.jump()
    assert rig.clock.now_ns() == 5_000_000


def test_jumps_keep_later_deadlines_right() -> None:
    rig = VirtualRig()
    first, second = rig.alarms.new(rig.note("first")), rig.alarms.new(rig.note("second"))
    first.set(1_000_000)
    second.set(1_000_000 + 7 * NS_PER_BLOCK)
    rig.alarms.jump()
    assert rig.cpu.stop == 7


def test_time_does_not_jump_to_its_end() -> None:
    rig = VirtualRig()
    alarm = rig.alarms.new(rig.note("never"))
    alarm.set(5)
    alarm.set(FAR_NS)
    assert not rig.alarms.jump()
    alarm.set(FAR_NS - 1)
    assert rig.alarms.jump()


def test_real_clock_does_not_jump(real: tuple[Alarms, Cpu]) -> None:
    real[0].new(Calls()).set(time.monotonic_ns() + FAR)
    assert not real[0].jump()


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(-5, 60), st.sampled_from(["set", "cancel", "run"]))
    )
)
def test_every_deadline_is_met_at_its_time(steps: list[tuple[int, int, str]]) -> None:
    """Each alarm comes at its deadline, or when it was set if that was past; none is lost."""
    rig = VirtualRig()
    alarms = [rig.alarms.new(rig.note(str(number))) for number in range(4)]
    wanted: dict[int, int] = {}
    expected: list[tuple[str, int]] = []
    for number, blocks, what in steps:
        now = rig.clock.now_ns()
        if what == "set":
            alarms[number].set(now + blocks * NS_PER_BLOCK)
            if wanted.get(number, now + 1) <= now:
                continue
            wanted[number] = max(now, now + blocks * NS_PER_BLOCK)
        elif what == "cancel":
            if wanted.get(number, now + 1) > now:
                wanted.pop(number, None)
            alarms[number].cancel()
        else:
            rig.run(max(0, blocks))
            now = rig.clock.now_ns()
            done = sorted((when, key) for key, when in wanted.items() if when <= now and blocks > 0)
            expected += [(str(key), when) for when, key in done]
            for _, key in done:
                del wanted[key]
            assert {name for name, _ in rig.seen} >= {name for name, _ in expected}
    assert all(entry in rig.seen for entry in expected)
