# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel lock is fair; turns go round; batons, sleeps and kicks do what the essay says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from fakes.host_fakes import FakeClock, FakeCpu
from pkvm.host.scheduler import (
    EXIT_BLOCKS,
    REAL_SLICE_NS,
    SLICE_BLOCKS,
    KickedError,
    Runner,
    Scheduler,
)

TIMEOUT_S = 20


class Harness:
    """A scheduler, and threads that are joined at the end."""

    def __init__(self, *, virtual: bool, grace_s: float = 0.2) -> None:
        self.clock = FakeClock(virtual)
        self.cpu = FakeCpu()
        self.interrupts = threading.Semaphore(0)
        self.sched = Scheduler(
            self.clock, self.interrupts.release, self.cpu if virtual else None, grace_s
        )
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def start(self, body: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                body()
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        for thread in self.threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "a thread hangs"
        if self.errors:
            raise self.errors[0]

    def waiters(self, count: int) -> None:
        """Until so many threads wait for the kernel lock."""
        wait_for(lambda: len(self.sched.lock.waiting) == count)


def wait_for(condition: Callable[[], bool]) -> None:
    """Spin until another thread has brought `condition` about."""
    spin = threading.Event()
    for _ in range(TIMEOUT_S * 1000):
        if condition():
            return
        spin.wait(0.001)
    raise AssertionError("it does not come about")


def execute(sched: Scheduler, runner: Runner, guest: Callable[[], None] | None = None) -> bool:
    """Run `guest` as the vCPU's code; whether it was run."""

    def run(flags: int, x0: int, nr_lrs: int) -> tuple[int, ...]:
        if guest is not None:
            guest()
        return flags, x0, nr_lrs

    results = sched.execute(runner, run, 1, 2, 3)
    assert results in (None, (1, 2, 3))
    return results is not None


def test_the_kernel_lock_goes_to_who_waits_longest() -> None:
    harness = Harness(virtual=False)
    sched = harness.sched
    order: list[int] = []
    sched.lock.enter()

    def body(number: int) -> None:
        sched.lock.enter()
        order.append(number)
        sched.lock.leave()

    for number in range(6):
        harness.start(partial(body, number))
        harness.waiters(number + 1)
    sched.lock.leave()
    harness.join()
    assert order == list(range(6))


def test_a_thread_that_wants_the_kernel_interrupts_a_guest_only_in_real_time() -> None:
    for virtual in (False, True):
        harness = Harness(virtual=virtual)
        sched = harness.sched
        runner = Runner()
        sched.lock.enter()
        sched.begin(runner)
        sched.take_turn(runner)

        def visit(sched: Scheduler = sched) -> None:
            sched.lock.enter()
            sched.lock.leave()

        def guest(harness: Harness = harness, virtual: bool = virtual) -> None:
            harness.start(visit)
            harness.waiters(1)
            if not virtual:
                assert harness.interrupts.acquire(timeout=TIMEOUT_S)

        assert execute(sched, runner, guest)
        assert not execute(sched, runner), "who waits comes first"
        sched.breathe(runner)
        harness.join()
        assert not harness.interrupts.acquire(blocking=False)
        assert sched.turn is runner
        sched.end(runner, keep_turn=False)
        sched.lock.leave()


def take_turns(harness: Harness, count: int, rounds: int, advance: Callable[[], None]) -> list[int]:
    """`count` vCPUs on threads that use up their slices; who ran when."""
    sched = harness.sched
    order: list[int] = []
    sched.lock.enter()

    def body(number: int) -> None:
        runner = Runner()
        sched.lock.enter()
        sched.begin(runner)
        for _ in range(rounds):
            if sched.turn is not runner:
                sched.take_turn(runner)
            order.append(number)
            advance()
            sched.breathe(runner)
        sched.end(runner, keep_turn=False)
        sched.lock.leave()

    for number in range(count):
        harness.start(partial(body, number))
        harness.waiters(number + 1)
    first = Runner()
    sched.begin(first)
    sched.take_turn(first)
    sched.lock.leave()
    wait_for(lambda: len(sched._queue) == count)
    sched.lock.enter()
    sched.end(first, keep_turn=False)
    sched.lock.leave()
    harness.join()
    return order


@pytest.mark.parametrize("virtual", [False, True])
def test_vcpus_go_round(virtual: bool) -> None:
    harness = Harness(virtual=virtual)

    def advance() -> None:
        harness.clock.ns += REAL_SLICE_NS
        harness.cpu.blocks += SLICE_BLOCKS

    assert take_turns(harness, 3, 4, advance) == [0, 1, 2] * 4


def test_without_using_up_its_slice_a_vcpu_keeps_its_turn() -> None:
    harness = Harness(virtual=True)

    def advance() -> None:
        harness.cpu.blocks += SLICE_BLOCKS // 4

    order = take_turns(harness, 2, 8, advance)
    assert order == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


def test_the_slice_goes_on_across_exits_and_each_takes_its_share() -> None:
    harness = Harness(virtual=True)
    sched, runner = harness.sched, Runner()
    sched.lock.enter()
    sched.begin(runner)
    sched.take_turn(runner)
    for exits, used in enumerate((0, 1000, 2000)):
        harness.cpu.blocks = used
        assert execute(sched, runner)
        assert harness.cpu.slice == SLICE_BLOCKS - used - exits * EXIT_BLOCKS
        sched.end(runner, keep_turn=True)
        sched.begin(runner)
        assert sched.turn is runner


def other_gets_turn(harness: Harness, runner: Runner) -> threading.Event:
    """Start a thread in which `runner` wants a turn; set when it has it."""
    got = threading.Event()
    sched = harness.sched

    def body() -> None:
        sched.lock.enter()
        sched.begin(runner)
        sched.take_turn(runner)
        got.set()
        sched.end(runner, keep_turn=False)
        sched.lock.leave()

    harness.start(body)
    wait_for(lambda: runner in sched._queue or got.is_set())
    return got


def leave_with_baton(sched: Scheduler, runner: Runner) -> None:
    sched.lock.enter()
    sched.begin(runner)
    sched.take_turn(runner)
    sched.end(runner, keep_turn=True)
    sched.lock.leave()


def test_virtual_a_baton_holds_until_its_thread_is_back_and_done() -> None:
    harness = Harness(virtual=True, grace_s=0.0)
    sched, runner = harness.sched, Runner()
    leave_with_baton(sched, runner)
    got = other_gets_turn(harness, Runner())
    assert not got.wait(0.2)
    sched.lock.enter()
    sched.begin(runner)
    assert sched.turn is runner
    sched.end(runner, keep_turn=False)
    sched.lock.leave()
    harness.join()


def test_virtual_a_baton_is_lost_with_the_vcpu() -> None:
    harness = Harness(virtual=True)
    sched, runner = harness.sched, Runner()
    leave_with_baton(sched, runner)
    other_gets_turn(harness, Runner())
    sched.forget(runner)
    harness.join()


def test_virtual_a_baton_is_lost_with_its_thread() -> None:
    harness = Harness(virtual=True)
    runner = Runner()
    harness.start(lambda: leave_with_baton(harness.sched, runner)).join(TIMEOUT_S)
    other_gets_turn(harness, Runner())
    harness.join()


def test_virtual_a_baton_is_lost_when_its_thread_runs_another_vcpu() -> None:
    harness = Harness(virtual=True)
    sched, first, second = harness.sched, Runner(), Runner()
    leave_with_baton(sched, first)
    leave_with_baton(sched, second)
    assert sched.turn is second


def test_real_a_baton_is_good_until_the_slice_ends() -> None:
    harness = Harness(virtual=False)
    sched, runner = harness.sched, Runner()
    leave_with_baton(sched, runner)
    got = other_gets_turn(harness, Runner())
    assert not got.wait(0.05)
    harness.clock.ns += REAL_SLICE_NS
    harness.join()
    assert got.is_set()


def test_real_a_waiting_vcpu_interrupts_when_the_slice_is_over() -> None:
    harness = Harness(virtual=False)
    sched, runner = harness.sched, Runner()
    sched.lock.enter()
    sched.begin(runner)
    sched.take_turn(runner)
    harness.clock.ns += REAL_SLICE_NS

    def body() -> None:
        other = Runner()
        sched.lock.enter()
        sched.begin(other)
        sched.take_turn(other)
        sched.end(other, keep_turn=False)
        sched.lock.leave()

    harness.start(body)
    harness.waiters(1)
    sched.lock.leave()
    sched.lock.enter()

    def guest() -> None:
        assert harness.interrupts.acquire(timeout=TIMEOUT_S)

    assert execute(sched, runner, guest)
    sched.breathe(runner)
    assert sched.turn is not runner
    sched.end(runner, keep_turn=False)
    sched.lock.leave()
    harness.join()


def sleeper(harness: Harness, runner: Runner, log: list[str]) -> None:
    sched = harness.sched

    def body() -> None:
        sched.lock.enter()
        sched.begin(runner)
        try:
            sched.sleep(runner)
            log.append("woken")
            sched.take_turn(runner)
            log.append("turn")
        except KickedError:
            log.append("kicked")
        finally:
            sched.end(runner, keep_turn=False)
            sched.lock.leave()

    harness.start(body)
    wait_for(lambda: runner.asleep and not sched.lock.held)


def test_a_sleeper_is_woken_and_takes_its_place_at_once() -> None:
    harness = Harness(virtual=True)
    sched, runner = harness.sched, Runner()
    log: list[str] = []
    sleeper(harness, runner, log)
    sched.lock.enter()
    me = Runner()
    sched.begin(me)
    sched.take_turn(me)
    sched.wake(runner)
    assert list(sched._queue) == [runner]
    sched.end(me, keep_turn=False)
    sched.lock.leave()
    harness.join()
    assert log == ["woken", "turn"]


def test_a_sleeper_is_kicked_out() -> None:
    harness = Harness(virtual=False)
    runner = Runner()
    log: list[str] = []
    sleeper(harness, runner, log)
    harness.sched.kick(runner)
    harness.join()
    assert log == ["kicked"]


def test_a_vcpu_that_waits_for_its_turn_is_kicked_out() -> None:
    harness = Harness(virtual=True)
    sched, holder, runner = harness.sched, Runner(), Runner()
    log: list[str] = []
    leave_with_baton(sched, holder)

    def body() -> None:
        sched.lock.enter()
        sched.begin(runner)
        try:
            sched.take_turn(runner)
        except KickedError:
            log.append("kicked")
        sched.end(runner, keep_turn=False)
        sched.lock.leave()

    harness.start(body)
    wait_for(lambda: runner in sched._queue)
    sched.kick(runner)
    harness.join()
    assert log == ["kicked"]
    assert sched.turn is holder
    assert runner not in sched._queue


def test_a_kick_before_the_guest_is_seen_and_one_during_it_interrupts() -> None:
    harness = Harness(virtual=True)
    sched, runner = harness.sched, Runner()
    sched.kick(runner)
    sched.lock.enter()
    sched.begin(runner)
    sched.take_turn(runner)

    def guest() -> None:
        sched.kick(runner)
        assert harness.interrupts.acquire(timeout=TIMEOUT_S)

    assert execute(sched, runner, guest), "a kick that came too early is nobody's"
    assert not execute(sched, runner)
    sched.end(runner, keep_turn=False)
    sched.lock.leave()


def test_virtual_a_woken_vcpu_without_a_thread_is_awaited_for_the_grace_only() -> None:
    harness = Harness(virtual=True, grace_s=0.1)
    sched, runner, absent = harness.sched, Runner(), Runner()
    sched.lock.enter()
    sched.begin(runner)
    sched.take_turn(runner)
    sched.wake(absent)
    harness.cpu.blocks += SLICE_BLOCKS
    sched.breathe(runner)
    assert sched.turn is absent, "its turn has come"
    sched.take_turn(runner)
    assert sched.turn is runner, "nobody came for it"
    sched.end(runner, keep_turn=False)
    sched.lock.leave()


def test_virtual_a_woken_vcpus_thread_that_comes_in_time_has_its_turn() -> None:
    harness = Harness(virtual=True, grace_s=TIMEOUT_S)
    sched, runner, late = harness.sched, Runner(), Runner()
    order: list[str] = []
    sched.lock.enter()
    sched.begin(runner)
    sched.take_turn(runner)
    sched.wake(late)
    harness.cpu.blocks += SLICE_BLOCKS
    sched.breathe(runner)

    def body() -> None:
        sched.lock.enter()
        sched.begin(late)
        assert sched.turn is late
        order.append("late")
        sched.end(late, keep_turn=False)
        sched.lock.leave()

    harness.start(body)
    harness.waiters(1)
    sched.take_turn(runner)
    order.append("runner")
    sched.end(runner, keep_turn=False)
    sched.lock.leave()
    harness.join()
    assert order == ["late", "runner"]


def test_the_virtual_clock_needs_a_cpu_that_counts() -> None:
    with pytest.raises(ValueError, match="counts blocks"):
        Scheduler(FakeClock(virtual=True), lambda: None)
