# SPDX-License-Identifier: GPL-2.0-or-later
"""Sleeping vCPUs: who is woken, when time may jump, and the order in which kicked ones leave."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fakes.host_fakes import FakeClock, FakeCpu
from pkvm.host.scheduler import KickedError, Runner, Scheduler

TIMEOUT_S = 20


def scheduler(*, virtual: bool) -> Scheduler:
    return Scheduler(FakeClock(virtual), lambda: None, FakeCpu() if virtual else None, 0.2)


class Sleeper:
    """A vCPU in a KVM_RUN of its own thread, which sleeps at once; `ended` says how it left."""

    def __init__(self, sched: Scheduler, log: list[str], name: str) -> None:
        self.sched = sched
        self.log = log
        self.name = name
        self.runner = Runner()
        self.thread = threading.Thread(target=self._body, daemon=True)
        self.thread.start()

    def _body(self) -> None:
        sched, runner = self.sched, self.runner
        sched.lock.enter()
        sched.begin(runner)
        try:
            sched.take_turn(runner)
            sched.sleep(runner)
            sched.take_turn(runner)
            self.log.append(f"{self.name} woke")
        except KickedError:
            self.log.append(f"{self.name} kicked")
        finally:
            sched.end(runner, keep_turn=False)
            sched.lock.leave()

    def asleep(self) -> Sleeper:
        """Once it sleeps."""
        wait_for(lambda: self.runner.asleep and not self.sched.lock.held)
        return self

    def join(self) -> None:
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive(), f"{self.name} hangs"


def wait_for(condition: Callable[[], bool]) -> None:
    spin = threading.Event()
    for _ in range(TIMEOUT_S * 1000):
        if condition():
            return
        spin.wait(0.001)
    raise AssertionError("it does not come about")


@pytest.mark.parametrize("virtual", [False, True])
def test_only_the_one_that_is_woken_wakes(virtual: bool) -> None:
    sched = scheduler(virtual=virtual)
    log: list[str] = []
    first, second = (Sleeper(sched, log, name).asleep() for name in "ab")
    sched.lock.enter()
    sched.wake(second.runner)
    sched.lock.leave()
    second.join()
    assert log == ["b woke"]
    assert first.thread.is_alive()
    sched.kick(first.runner)
    first.join()
    assert log == ["b woke", "a kicked"]


def test_kicked_vcpus_leave_in_the_order_of_the_kicks_in_virtual_time() -> None:
    for _ in range(20):
        sched = scheduler(virtual=True)
        log: list[str] = []
        sleepers = [Sleeper(sched, log, name).asleep() for name in "abcd"]
        for index in (2, 0, 3, 1):
            sched.kick(sleepers[index].runner)
        for sleeper in sleepers:
            sleeper.join()
        assert log == ["c kicked", "a kicked", "d kicked", "b kicked"]


def test_time_jumps_until_somebody_is_awake() -> None:
    sched = scheduler(virtual=True)
    log: list[str] = []
    holder = Runner()
    sched.lock.enter()
    sched.begin(holder)
    sched.take_turn(holder)
    sched.lock.leave()
    sleeper = Sleeper(sched, log, "a")
    wait_for(lambda: sched.lock.held is False and sleeper.runner.in_run)
    jumps = 0

    def idle() -> bool:
        nonlocal jumps
        jumps += 1
        log.append(f"jump {jumps}")
        if jumps == 3:
            sched.wake(sleeper.runner)
        return True

    sched.idle = idle
    # The CPU's vCPU leaves; the other one gets its turn, sleeps, and then all do.
    sched.lock.enter()
    sched.end(holder, keep_turn=False)
    sched.lock.leave()
    sleeper.join()
    assert log == ["jump 1", "jump 2", "jump 3", "a woke"]


def test_no_jump_while_a_vcpu_has_the_baton() -> None:
    sched = scheduler(virtual=True)
    log: list[str] = []
    jumped = threading.Event()

    def idle() -> bool:
        jumped.set()
        return False

    sched.idle = idle
    holder, sleeping = Runner(), Runner()
    sched.lock.enter()
    sched.begin(holder)
    sched.take_turn(holder)
    sched.end(holder, keep_turn=True)
    sched.begin(holder)
    # `sleeping` has no turn; to sleep changes nothing for the others.
    sleeper = threading.Thread(target=_sleep, args=(sched, sleeping, log), daemon=True)
    sched.lock.leave()
    sleeper.start()
    wait_for(lambda: sleeping.asleep)
    assert not jumped.wait(0.02)
    sched.lock.enter()
    sched.end(holder, keep_turn=False)
    sched.lock.leave()
    assert jumped.wait(TIMEOUT_S)
    sched.kick(sleeping)
    sleeper.join(TIMEOUT_S)
    assert log == ["kicked"]


def _sleep(sched: Scheduler, runner: Runner, log: list[str]) -> None:
    sched.lock.enter()
    sched.begin(runner)
    try:
        sched.sleep(runner)
    except KickedError:
        log.append("kicked")
    finally:
        sched.end(runner, keep_turn=False)
        sched.lock.leave()
