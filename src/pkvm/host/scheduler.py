# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose vCPU has the CPU.

There is one physical CPU. Threads of the VMM enter the kernel one at a time
(`lock`), and guest code runs with that lock held, because it runs on that CPU.
Which vCPU runs is a matter of *turns*, round robin among the vCPUs that are in
KVM_RUN:

* A turn ends when the vCPU waits (WFI, powered off), when its slice is over and
  another vCPU waits for the CPU, or when KVM_RUN returns. A return for MMIO
  keeps the turn (the *baton*): the VMM answers and comes back at once.
* With the real clock a thread that wants the kernel interrupts the guest at
  once, and a vCPU that wants a turn interrupts it when the slice is over. A
  baton is good until the slice ends.
* With the virtual clock nothing but a kick interrupts a guest; a slice ends
  after a number of translated blocks, fewer where the guest exits often, so
  that the order of turns depends on what guests do alone. A baton is good
  until its vCPU is run again, is closed, ends with another exit, or its thread
  runs another vCPU or dies. A vCPU that is woken takes its place in the queue
  there and then; if its thread is not in KVM_RUN yet, the queue waits for it
  for `grace_s` seconds of real time. When all sleep, `idle` lets time jump.

Consequence, with the virtual clock: a VMM thread that answers an MMIO exit must
not wait for another vCPU to make progress.

Two locks: `_mutex` for the fields below, held for moments; the kernel lock,
which is handed from thread to thread and taken before `_mutex`, never inside it.
`begin` and `end` do without `_mutex` for the vCPU that has the turn, the path of
every MMIO exit: should another thread take the turn from it in that moment, it
runs at most one more time out of turn, with the kernel lock all the same.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Protocol

from pkvm.host.lock import KernelLock
from pkvm.host.ports import Clock

REAL_SLICE_NS = 5_000_000
"""How long a vCPU keeps the CPU when others wait for it, with the real clock."""
SLICE_BLOCKS = 1 << 18
"""The same with the virtual clock, in translated blocks."""
EXIT_BLOCKS = 1 << 10
"""What an exit to the host takes from a slice with the virtual clock: a vCPU that polls its
hypervisor does few blocks and much work."""
GRACE_S = 2.0
_POLL_S = 0.05
"""How often a thread that waits for an absent vCPU looks whether it may stop waiting."""


Run = Callable[[int, int, int], tuple[int, ...]]
"""Runs the loaded vCPU until an exit for the host: (flags, X0, number of list registers) -> the
registers that VCPU_RUN returns."""


class BlockCounter(Protocol):
    """A CPU that counts the translated blocks of guest code it executes."""

    @property
    def blocks(self) -> int:
        """So many so far."""
        ...

    def set_slice(self, blocks: int | None, /) -> None:
        """End the next run after so many more."""
        ...


class KickedError(Exception):
    """The wait or the run was ended by a kick."""


class Runner:
    """A vCPU as the scheduler knows it."""

    __slots__ = (
        "asleep", "awaited_until", "bell", "carrier", "in_run", "kicked", "queued_at", "thread",
        "waited_ns",
    )  # fmt: skip

    def __init__(self) -> None:
        self.bell: threading.Condition | None = None
        """Where its thread waits, once it has."""
        self.in_run = False
        """Whether a KVM_RUN is under way."""
        self.kicked = False
        self.asleep = False
        """Waits for `wake`."""
        self.carrier = 0
        """The thread (`get_ident`) that brought the baton to user space, 0 for none."""
        self.thread: threading.Thread | None = None
        """The same, with the virtual clock: there it matters whether it lives."""
        self.awaited_until = 0.0
        """Until when an absent vCPU without a thread is awaited (time.monotonic)."""
        self.queued_at = 0
        """Since when it waits for its turn, while it does: nanoseconds of the clock."""
        self.waited_ns = 0
        """How long it has waited for its turn, in all: Linux's run_delay."""


class Scheduler:
    """The kernel lock and whose turn it is; see the module's text.

    `interrupt` interrupts the CPU from any thread; `counter` is needed with the virtual clock.
    """

    def __init__(
        self,
        clock: Clock,
        interrupt: Callable[[], None],
        counter: BlockCounter | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._virtual = clock.virtual
        self._interrupt = interrupt
        if self._virtual and counter is None:
            raise ValueError("the virtual clock needs a CPU that counts blocks")
        self._counter = counter if self._virtual else None
        self._clock = clock
        self._now = self._blocks if self._virtual else clock.now_ns
        """The time in the unit of `_slice_end`."""
        self._slice = SLICE_BLOCKS if self._virtual else REAL_SLICE_NS
        self._grace_s = grace_s
        self.lock = KernelLock(self.want_kernel)
        self._mutex = threading.RLock()
        self._common_bell = threading.Condition(self._mutex)
        """With the virtual clock all wait together, and go on in the order in which they came."""
        self.turn: Runner | None = None
        """Whose turn it is; for others to read."""
        self._slice_end = 0
        """When the turn's slice is over: nanoseconds of the real clock, or blocks."""
        self._queue: deque[Runner] = deque()
        self._sleepers: set[Runner] = set()
        self._leaving: deque[Runner] = deque()
        """With the virtual clock: who was kicked and has not left KVM_RUN yet, in order."""
        self.idle: Callable[[], bool] | None = None
        """With the virtual clock: called with the kernel lock when every vCPU sleeps. True if it
        found something to do, after which somebody may be awake."""
        self._idle = False
        """Every vCPU sleeps, and `idle` has not been called since."""
        self._guest: Runner | None = None
        """The vCPU whose code the CPU executes now."""

    @property
    def in_guest(self) -> bool:
        """Whether the CPU executes a vCPU's code."""
        return self._guest is not None

    def want_kernel(self) -> None:
        """A thread waits for the kernel lock: a guest gives way at once, but for virtual time."""
        if self._guest is not None and not self._virtual:
            self._interrupt()

    # KVM_RUN

    def begin(self, runner: Runner) -> None:
        """A KVM_RUN of `runner` starts; the kernel lock is held."""
        runner.kicked = False
        runner.in_run = True
        if self.turn is runner:
            runner.carrier = 0
            return
        with self._mutex:
            if self.turn is not None and self.turn.carrier == get_ident():
                self._pass_turn()

    def end(self, runner: Runner, *, keep_turn: bool) -> None:
        """The KVM_RUN ends; `keep_turn` if the VMM will come back with an answer."""
        if keep_turn and self.turn is runner:
            if self._virtual:
                runner.thread = threading.current_thread()
                self._has_left(runner)
            runner.carrier = get_ident()
            runner.in_run = False
            return
        with self._mutex:
            runner.in_run = False
            runner.asleep = False
            self._has_left(runner)
            if self.turn is runner:
                self._pass_turn()
            else:
                self._drop(runner)

    def forget(self, runner: Runner) -> None:
        """The vCPU was closed: a KVM_RUN under way is kicked, a turn that it keeps is lost."""
        with self._mutex:
            if runner.in_run:
                self.kick(runner)
            elif self.turn is runner:
                self._pass_turn()
            else:
                self._drop(runner)

    def kick(self, runner: Runner) -> None:
        """End a KVM_RUN of `runner` that is under way. From any thread, without the kernel lock."""
        with self._mutex:
            if runner.in_run:
                if self._virtual and not runner.kicked:
                    self._leaving.append(runner)
                runner.kicked = True
                _ring(runner)
        if self._guest is runner:
            self._interrupt()

    def leave_kicked(self, runner: Runner) -> None:
        """`runner` was kicked and has nothing to wait for: come back when it may leave. Called and
        left with the kernel lock held, which is released meanwhile."""
        if not self._virtual or self._must_leave(runner):
            return
        self.lock.leave()
        try:
            with self._mutex:
                while not self._must_leave(runner):
                    self._wait(runner)
        finally:
            self.lock.enter()

    def execute(
        self, runner: Runner, run: Run, flags: int, x0: int, nr_lrs: int
    ) -> tuple[int, ...] | None:
        """Let the CPU run `runner`'s code: `run(flags, x0, nr_lrs)`, and what that returned. None
        if something is to be done first.

        Whoever wants something sets its flag and then looks at `_guest`; here it is the other way
        round, so that one of the two always sees the other.
        """
        self._guest = runner
        try:
            if runner.kicked or self.lock.waiting:
                return None
            if self._counter is None:
                return run(flags, x0, nr_lrs)
            self._counter.set_slice(max(1, self._slice_end - self._counter.blocks))
            try:
                return run(flags, x0, nr_lrs)
            finally:
                self._slice_end -= EXIT_BLOCKS
        finally:
            self._guest = None

    def take_turn(self, runner: Runner) -> None:
        """Wait until it is `runner`'s turn. Called and left with the kernel lock held, which is
        released meanwhile. Raises KickedError."""
        with self._mutex:
            if self.turn is None and not self._queue:
                self._start_turn(runner)
                return
            if runner is not self.turn and runner not in self._queue:
                self._enqueue(runner)
        self.lock.leave()
        try:
            with self._mutex:
                self._await_turn(runner)
        finally:
            self.lock.enter()

    def sleep(self, runner: Runner) -> None:
        """Give the turn away and wait for `wake`. Called and left with the kernel lock held, which
        is released meanwhile. Raises KickedError."""
        with self._mutex:
            runner.asleep = True
            self._sleepers.add(runner)
            if self.turn is runner:
                self._pass_turn()
            else:
                self._drop(runner)
        try:
            while runner.asleep:
                if self._idle and self.idle is not None and not runner.kicked:
                    self._idle = self.idle() and self.turn is None
                else:
                    self._sleep(runner)
        finally:
            with self._mutex:
                self._sleepers.discard(runner)

    def _sleep(self, runner: Runner) -> None:
        """Until `runner` is awake or everybody sleeps. Raises KickedError."""
        self.lock.leave()
        try:
            with self._mutex:
                while runner.asleep:
                    if self._must_leave(runner):
                        raise KickedError
                    if self._idle:
                        return
                    self._wait(runner)
        finally:
            self.lock.enter()

    def wake(self, runner: Runner) -> None:
        """End `runner`'s sleep; it waits for its turn from now on. Called with the kernel lock."""
        with self._mutex:
            runner.asleep = False
            known = self.turn is runner or runner in self._queue
            if not known and (runner.in_run or self._virtual):
                self._enqueue(runner)
                if self.turn is None:
                    self._pass_turn()
            _ring(runner)

    def yield_turn(self, runner: Runner) -> None:
        """End `runner`'s slice: `breathe` passes the turn on if another vCPU waits."""
        if self.turn is runner:
            self._slice_end = self._now()

    def breathe(self, runner: Runner) -> None:
        """Between two entries to the guest: let threads in that wait for the kernel, and pass the
        turn on if the slice is over. Called and left with the kernel lock held."""
        if self.lock.waiting:
            self.lock.leave()
            self.lock.enter()
        if self.turn is runner and self._now() >= self._slice_end:
            with self._mutex:
                if self._queue:
                    self._enqueue(runner)
                    self._pass_turn()
                else:
                    self._start_turn(runner)

    def _blocks(self) -> int:
        """The time with the virtual clock."""
        assert self._counter is not None
        return self._counter.blocks

    # Turns: everything below is called with `_mutex` held

    def _start_turn(self, runner: Runner) -> None:
        self.turn = runner
        self._idle = False
        self._slice_end = self._now() + self._slice
        runner.awaited_until = time.monotonic() + self._grace_s

    def _pass_turn(self) -> None:
        """End the turn; the longest-waiting vCPU is next."""
        if self.turn is not None:
            self.turn.carrier = 0
            self.turn = None
        if self._queue:
            following = self._queue[0]
            self._drop(following)
            self._start_turn(following)
            _ring(following)
        elif self._virtual and self.idle is not None:
            self._idle = True
            for runner in self._sleepers:
                _ring(runner)

    def _must_leave(self, runner: Runner) -> bool:
        """Whether a KVM_RUN that waits was kicked. With the virtual clock they leave in the order
        of the kicks, however their threads are scheduled."""
        return runner.kicked and not (self._leaving and self._leaving[0] is not runner)

    def _has_left(self, runner: Runner) -> None:
        if runner in self._leaving:
            with self._mutex:
                self._leaving.remove(runner)
                self._common_bell.notify_all()

    def _wait(self, runner: Runner, timeout: float | None = None) -> None:
        """In `runner`'s thread, until somebody rings."""
        if runner.bell is None:
            own = not self._virtual
            runner.bell = threading.Condition(self._mutex) if own else self._common_bell
        runner.bell.wait(timeout)

    def _enqueue(self, runner: Runner) -> None:
        """`runner` waits for its turn from now on."""
        self._queue.append(runner)
        runner.queued_at = self._clock.now_ns()

    def _drop(self, runner: Runner) -> None:
        """It waits no longer."""
        if runner in self._queue:
            self._queue.remove(runner)
            runner.waited_ns += self._clock.now_ns() - runner.queued_at

    def _await_turn(self, runner: Runner) -> None:
        while self.turn is not runner:
            if self._must_leave(runner):
                self._drop(runner)
                raise KickedError
            holder = self.turn
            if holder is None or self._may_lose_turn(holder):
                self._pass_turn()
                continue
            self._wait(runner, self._patience(holder))

    def _may_lose_turn(self, holder: Runner) -> bool:
        """Whether a vCPU that has the turn and is not in the kernel has had it long enough."""
        if holder.in_run:
            return False
        if not self._virtual:
            return self._now() >= self._slice_end
        if holder.carrier and holder.thread is not None:
            return not holder.thread.is_alive()
        return time.monotonic() >= holder.awaited_until

    def _patience(self, holder: Runner) -> float:
        """Seconds to wait for `holder` before looking again; interrupts its slice if it is over."""
        if self._virtual:
            return _POLL_S
        rest = self._slice_end - self._now()
        if rest > 0:
            return rest / 1e9
        if self._guest is holder:
            self._interrupt()
        return REAL_SLICE_NS / 1e9


def _ring(runner: Runner) -> None:
    """Something has changed for `runner`; called with the scheduler's mutex held."""
    if runner.bell is not None:
        runner.bell.notify_all()
