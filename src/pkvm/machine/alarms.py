# SPDX-License-Identifier: GPL-2.0-or-later
"""Alarms: what happens at a moment of the machine's time.

An alarm that is due is a physical interrupt: its callback is called, once, and
the CPU leaves its guest, unless the callback returned True: dealt with.

With the real clock one thread of the machine waits for the nearest deadline. To
set an alarm wakes it only if it would sleep too long. With the virtual clock no
thread is needed: while a guest runs, the engine stops at the block at which the
next alarm is due, and `jump` is for when nothing runs.

A deadline that has passed is never lost: it counts even if the alarm is set or
cancelled before the callback could be called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from pkvm.machine.clock import NS_PER_BLOCK, RealClock, VirtualClock

FAR_NS = 1 << 62
"""Deadlines from here on (146 years) never come: time shall not jump there for a guest that sets
its timer to the end of all counts."""
_LONGEST_WAIT_S = 3600.0


Callback = Callable[[], bool | None]
"""What an alarm calls. True: the CPU need not leave its guest for it."""


class AlarmedCpu(Protocol):
    """What an alarm interrupts; `CpuEngine` is one."""

    def interrupt(self) -> None:
        """A physical interrupt, from any thread."""
        ...

    def set_alarm(self, blocks: int | None) -> None:
        """Call `on_alarm` after so many more blocks of guest code."""
        ...


class Alarm:
    """One alarm of an `Alarms`; `Alarms.new` makes it."""

    __slots__ = ("_alarms", "callback", "deadline", "overdue")

    def __init__(self, alarms: Alarms, callback: Callback) -> None:
        self._alarms = alarms
        self.callback = callback
        self.deadline: int | None = None
        """Nanoseconds of the clock; None: not set. Read only."""
        self.overdue = False
        """A deadline has passed, and the callback has not been called yet. Read only."""

    def set(self, deadline_ns: int) -> None:
        """Be due at `deadline_ns`, in place of any deadline before; at once if that is past."""
        self._alarms.change(self, deadline_ns)

    def cancel(self) -> None:
        """Be due no more."""
        self._alarms.change(self, None)

    def close(self) -> None:
        """Never be due again."""
        self._alarms.remove(self)


class Alarms:
    """The alarms of one machine. Callbacks come from the alarm thread, or with the virtual clock
    from the thread that runs the guest or calls `jump`; they must not raise."""

    def __init__(self, clock: RealClock | VirtualClock, cpu: AlarmedCpu) -> None:
        self._clock = clock
        self._virtual = clock if isinstance(clock, VirtualClock) else None
        self._cpu = cpu
        self._alarms: list[Alarm] = []
        self._lock = threading.Lock()
        self._armed: int | None = None
        """Until when the thread sleeps, or at which deadline the engine stops; None: for ever."""
        self._bell = threading.Lock()
        """Released to wake the thread."""
        self._bell.acquire()
        self._thread: threading.Thread | None = None
        self._closed = False

    def new(self, callback: Callback) -> Alarm:
        """An alarm that is not set."""
        alarm = Alarm(self, callback)
        with self._lock:
            self._alarms.append(alarm)
        return alarm

    def change(self, alarm: Alarm, deadline_ns: int | None) -> None:
        """`Alarm.set` and `Alarm.cancel`."""
        if deadline_ns is not None and deadline_ns >= FAR_NS:
            deadline_ns = None
        with self._lock:
            old = alarm.deadline
            if old is not None and old <= self._clock.now_ns():
                alarm.overdue = True
                self._arm(old)
            alarm.deadline = deadline_ns
            if self._virtual is not None:
                if deadline_ns is not None or old is not None:
                    self._program(self._nearest())
            elif deadline_ns is not None:
                self._arm(deadline_ns)

    def remove(self, alarm: Alarm) -> None:
        """`Alarm.close`."""
        with self._lock:
            alarm.deadline, alarm.overdue = None, False
            if alarm in self._alarms:
                self._alarms.remove(alarm)

    def fire(self) -> None:
        """Call the callbacks of what is due, and interrupt the CPU if anything is and is not dealt
        with."""
        if self._call_due()[1]:
            self._cpu.interrupt()

    def jump(self) -> bool:
        """Nothing runs, with the virtual clock: advance it to the next deadline and call what is
        due then. False if no alarm is set, or the clock is real."""
        if self._virtual is None:
            return False
        with self._lock:
            nearest = self._nearest()
        if nearest is None:
            return False
        self._virtual.advance_to(nearest)
        return self._call_due()[0]

    def close(self) -> None:
        """No callback comes once this returns, unless it is called from one. Idempotent."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._ring()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _call_due(self) -> tuple[bool, bool]:
        """Whether anything was due, and whether the CPU must leave its guest for it."""
        with self._lock:
            now = self._clock.now_ns()
            due: list[tuple[int, Alarm]] = []
            for alarm in self._alarms:
                deadline = alarm.deadline
                if alarm.overdue or (deadline is not None and deadline <= now):
                    due.append((now if deadline is None else deadline, alarm))
                    alarm.overdue = False
                    if deadline is not None and deadline <= now:
                        alarm.deadline = None
            if self._virtual is not None:
                self._program(self._nearest())
        due.sort(key=lambda entry: entry[0])
        dealt_with = [alarm.callback() for _, alarm in due]
        return bool(due), not all(dealt_with)

    def _nearest(self) -> int | None:
        """The next deadline; with the lock held."""
        nearest = None
        for alarm in self._alarms:
            deadline = self._clock.now_ns() if alarm.overdue else alarm.deadline
            if deadline is not None and (nearest is None or deadline < nearest):
                nearest = deadline
        return nearest

    # Virtual clock, with the lock held

    def _program(self, nearest: int | None) -> None:
        """Let the engine stop at the block at which `nearest` is reached."""
        if nearest is None:
            self._cpu.set_alarm(None)
            return
        ahead = max(0, nearest - self._clock.now_ns())
        self._cpu.set_alarm(-(-ahead // NS_PER_BLOCK))

    # Real clock, with the lock held

    def _arm(self, deadline: int) -> None:
        """See to it that the thread is awake at `deadline`."""
        if self._virtual is not None or self._closed:
            return
        if self._thread is None:
            self._armed = deadline
            self._thread = threading.Thread(target=self._serve, name="alarms", daemon=True)
            self._thread.start()
        elif self._armed is None or deadline < self._armed:
            self._armed = deadline
            self._ring()

    def _ring(self) -> None:
        if self._bell.locked():
            self._bell.release()

    # The thread

    def _serve(self) -> None:
        while not self._closed:
            self.fire()
            with self._lock:
                self._armed = nearest = self._nearest()
            if nearest is None:
                self._bell.acquire()
                continue
            wait = (nearest - self._clock.now_ns()) / 1e9
            if wait > 0:
                self._bell.acquire(timeout=min(wait, _LONGEST_WAIT_S))
