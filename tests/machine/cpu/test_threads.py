# SPDX-License-Identifier: GPL-2.0-or-later
"""What other threads may do while a guest runs: interrupt it, flush, invalidate, close."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from fakes.cpu_guest import BACKING, CODE, DATA, WFE, WFI, Guest, add, b, hvc, ldr, mov, movz, str_
from pkvm.arm64 import registers as reg
from pkvm.machine.cpu.engine import StopReason
from pkvm.machine.cpu.errors import EngineError
from pkvm.machine.cpu.exclusion import INSIDE, INTERRUPTED, WAITING, CpuOwnership

SECONDS = 20
"""After so long a test has failed."""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0)


class Runner(threading.Thread):
    """Runs the engine in a thread of its own until `run` returns; keeps what came out."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(daemon=True)
        self.guest = guest
        self.outcome: StopReason | BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.guest.engine.run()
        except BaseException as error:
            self.outcome = error

    def result(self) -> StopReason | BaseException | None:
        self.join(SECONDS)
        assert not self.is_alive()
        return self.outcome


def changed(guest: Guest, before: int) -> bool:
    return guest.read(DATA) != before


def loop_that_counts(guest: Guest) -> None:
    """X0 counts, and DATA shows it."""
    guest.write(CODE, *mov(1, DATA), add(0, 0, 1), str_(0, 1), b(-2))
    guest.engine.pc = CODE


@pytest.mark.parametrize("loop", [[b(0)], [WFE, b(-1)], [WFI, b(-1)]])
def test_interrupt_stops_a_tight_loop(guest: Guest, loop: list[int]) -> None:
    guest.write(CODE, movz(0, 1), *mov(1, DATA), str_(0, 1), *loop)
    guest.engine.write_sysreg(reg.HCR_EL2, reg.hcr("VM", "RW"))
    guest.engine.pc = CODE
    runner = Runner(guest)
    until(lambda: guest.read(DATA) == 1)
    guest.engine.interrupt()
    assert runner.result() is StopReason.INTERRUPT
    assert CODE + 6 * 4 <= guest.engine.pc <= CODE + 8 * 4


def test_interrupt_before_the_run_is_kept_and_seen_once(guest: Guest) -> None:
    guest.write(CODE, hvc(1))
    guest.engine.pc = CODE
    guest.engine.vector = lambda: False
    guest.engine.interrupt()
    guest.engine.interrupt()
    assert guest.engine.run() is StopReason.INTERRUPT
    assert guest.engine.pc == CODE
    assert guest.engine.run() is StopReason.VECTOR


def test_no_interrupt_is_lost_and_none_is_counted_twice(guest: Guest) -> None:
    """Interrupts at all phases of a run, above all just before it starts."""
    loop_that_counts(guest)
    rounds = 400
    taken = threading.Semaphore(0)
    outcomes: list[StopReason] = []

    def runs() -> None:
        for _ in range(rounds):
            outcomes.append(guest.engine.run())
            taken.release()

    thread = threading.Thread(target=runs, daemon=True)
    thread.start()
    for _ in range(rounds):
        guest.engine.interrupt()
        assert taken.acquire(timeout=SECONDS)
    thread.join(SECONDS)
    assert outcomes == [StopReason.INTERRUPT] * rounds
    guest.run_known_program()


def test_interrupts_never_replay_an_instruction(guest: Guest) -> None:
    """LDR X0, [X0] along a ring: a replayed load would be one step too far."""
    ring = [DATA, DATA + 0x100, DATA + 0x200]
    for here, following in zip(ring, ring[1:] + ring[:1], strict=True):
        guest.write_bytes(here, following.to_bytes(8, "little"))
    guest.write(CODE, *mov(0, DATA), ldr(0, 0), add(1, 1, 1), b(-2))
    guest.engine.pc = CODE
    for _ in range(100):
        before = guest.engine.x[1]
        runner = Runner(guest)
        guest.engine.interrupt()
        assert runner.result() is StopReason.INTERRUPT
        steps = guest.engine.x[1]
        assert steps >= before
        if guest.engine.pc == CODE + 16 and steps:
            assert guest.engine.x[0] == ring[steps % 3]


def test_interrupt_inside_the_vector(guest: Guest) -> None:
    guest.write(CODE, hvc(1), movz(0, 5), hvc(2))
    guest.engine.pc = CODE

    def vector() -> bool:
        guest.engine.interrupt()
        return guest.note() < 2

    guest.engine.vector = vector
    assert guest.engine.run() is StopReason.INTERRUPT
    assert (guest.engine.pc, guest.engine.x[0]) == (CODE + 4, 0)
    assert guest.engine.run() is StopReason.VECTOR
    assert guest.engine.run() is StopReason.INTERRUPT
    assert guest.engine.pc == CODE + 12


def test_interrupt_while_the_vector_waits_for_the_one_who_interrupts(guest: Guest) -> None:
    guest.write(CODE, hvc(1), hvc(2))
    guest.engine.pc = CODE
    in_vector, go_on = threading.Event(), threading.Event()

    def vector() -> bool:
        in_vector.set()
        return go_on.wait(SECONDS)

    guest.engine.vector = vector
    runner = Runner(guest)
    assert in_vector.wait(SECONDS)
    guest.engine.interrupt()
    guest.engine.flush_tlb()
    go_on.set()
    assert runner.result() is StopReason.INTERRUPT
    assert guest.engine.pc == CODE + 4


def test_interrupt_from_a_signal_handler(guest: Guest) -> None:
    """A handler runs between two instructions of `run` itself and must not wait for it."""
    guest.write(CODE, hvc(1), b(-1))
    guest.engine.pc = CODE
    seen = []

    def handler(_number: int, _frame: object) -> None:
        seen.append(guest.engine._ownership.flags[INSIDE])
        guest.engine.interrupt()

    guest.engine.vector = lambda: True
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            assert guest.engine.run() is StopReason.INTERRUPT
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(seen) == 20


def test_tlb_flush_while_the_guest_runs(guest: Guest) -> None:
    """When `flush_tlb` returns the guest sees the new tables."""
    loop_that_counts(guest)
    guest.engine.vector = lambda: False
    runner = Runner(guest)
    until(lambda: guest.read(DATA) > 0)
    guest.map(DATA, pa=0x8020_0000)
    guest.engine.flush_tlb()
    old = guest.read(DATA)
    until(lambda: guest.memory.read_u64(0x8020_0000) > old)
    assert guest.read(DATA) == old
    guest.unmap(DATA)
    guest.engine.flush_tlb()
    assert runner.result() is StopReason.VECTOR
    assert guest.engine.far_el2 == DATA


def test_code_invalidation_while_the_guest_runs(guest: Guest) -> None:
    loop_that_counts(guest)
    guest.engine.vector = lambda: False
    runner = Runner(guest)
    until(lambda: guest.read(DATA) > 0)
    for _ in range(50):
        guest.engine.invalidate_code(BACKING, 0x4_0000)
        until(partial(changed, guest, guest.read(DATA)))
    guest.write(CODE + 6 * 4, hvc(1))
    assert runner.result() is StopReason.VECTOR


def test_many_threads_flush_and_interrupt(guest: Guest) -> None:
    loop_that_counts(guest)
    done = threading.Event()

    def flushes() -> None:
        for _ in range(200):
            guest.engine.flush_tlb()
            guest.engine.invalidate_code(BACKING + CODE, 64)

    threads = [threading.Thread(target=flushes, daemon=True) for _ in range(3)]

    def runs() -> None:
        while not done.is_set():
            assert guest.engine.run() is StopReason.INTERRUPT

    thread = threading.Thread(target=runs, daemon=True)
    thread.start()
    for other in threads:
        other.start()
    for other in threads:
        other.join(SECONDS)
        assert not other.is_alive()
    done.set()
    guest.engine.interrupt()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert guest.engine.x[0] >= guest.read(DATA) > 0


def test_close_ends_a_run(guest: Guest) -> None:
    loop_that_counts(guest)
    runner = Runner(guest)
    until(lambda: guest.read(DATA) > 0)
    guest.engine.close()
    assert isinstance(runner.result(), EngineError)
    assert not guest.engine._finalizer.alive
    guest.engine.interrupt()


def test_close_while_another_thread_is_in_the_vector(guest: Guest) -> None:
    guest.write(CODE, hvc(1), hvc(2))
    guest.engine.pc = CODE
    in_vector, go_on = threading.Event(), threading.Event()

    def vector() -> bool:
        in_vector.set()
        assert go_on.wait(SECONDS)
        return guest.engine.x[0] == 0

    guest.engine.vector = vector
    runner = Runner(guest)
    assert in_vector.wait(SECONDS)
    guest.engine.close()
    go_on.set()
    assert isinstance(runner.result(), EngineError)
    assert guest.engine.pc == CODE + 4
    assert not guest.engine._finalizer.alive


def test_close_inside_the_vector(guest: Guest) -> None:
    guest.write(CODE, hvc(1), hvc(2))
    guest.engine.pc = CODE

    def vector() -> bool:
        guest.engine.close()
        return True

    guest.engine.vector = vector
    with pytest.raises(EngineError, match="closed"):
        guest.engine.run()
    assert not guest.engine._finalizer.alive


def test_second_run_from_another_thread_is_refused(guest: Guest) -> None:
    loop_that_counts(guest)
    runner = Runner(guest)
    until(lambda: guest.read(DATA) > 0)
    with pytest.raises(EngineError, match="running already"):
        guest.engine.run()
    guest.engine.interrupt()
    assert runner.result() is StopReason.INTERRUPT


def test_ownership_repeats_a_stop_that_was_forgotten() -> None:
    stops = []

    def stop() -> None:
        stops.append(1)
        if len(stops) == 3:
            ownership.flags[INSIDE] = False

    ownership = CpuOwnership(stop)
    ownership.flags[INSIDE] = True
    with ownership:
        assert ownership.flags == [False, True, False]
    assert len(stops) == 3
    assert not ownership.flags[WAITING]
    assert not ownership.flags[INTERRUPTED]
