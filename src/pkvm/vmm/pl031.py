# SPDX-License-Identifier: GPL-2.0-or-later
"""PL031, Arm's real-time clock (DDI 0224): seconds since the Epoch, and one alarm.

It runs from the start (CR reads 1, and cannot stop it). Loading another time
changes the guest's clock and nobody else's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pkvm.vmm.irq import Line
from pkvm.vmm.primecell import PrimeCell

DR, MR, LR, CR, IMSC, RIS, MIS, ICR = (0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x1C)
SECOND = 1_000_000_000
"""Nanoseconds."""
_RANGE = 1 << 32

After = Callable[[int, Callable[[], None]], Callable[[], None]]
"""`after(ns, call)` calls `call` once when so many nanoseconds have passed, in any thread; it
returns what cancels that, once or more often, also too late."""


def after(ns: int, call: Callable[[], None]) -> Callable[[], None]:
    """`After` by a thread of its own, in real time."""
    timer = threading.Timer(min(ns / SECOND, threading.TIMEOUT_MAX), call)
    timer.daemon = True
    timer.start()
    return timer.cancel


class Pl031(PrimeCell):
    """The device. `now_ns` is the time since the Epoch; `after` lets the alarm ring on its own,
    without it the alarm is noticed when the guest looks at the device. `close` ends the timer."""

    def __init__(
        self,
        line: Line,
        now_ns: Callable[[], int] = time.time_ns,
        after: After | None = after,
    ) -> None:
        super().__init__((0x31, 0x10, 0x04, 0x00))
        self._line = line
        self._now_ns = now_ns
        self._after = after
        self._lock = threading.RLock()
        """Covers all that follows: the alarm comes from any thread."""
        self._offset_ns = 0
        """What the guest's clock is ahead of `now_ns`."""
        self._loaded = 0
        self._match: int | None = None
        """None until the guest writes it: nothing rings before."""
        self._enabled = 0
        self._raised = 0
        self._rings_at_ns: int | None = None
        """When, by the guest's clock, the counter comes to equal the match register."""
        self._cancel: Callable[[], None] | None = None

    def close(self) -> None:
        """End the alarm's timer. Idempotent."""
        with self._lock:
            self._rings_at_ns = None
            self._stop()

    def _load(self, offset: int) -> int:
        with self._lock:
            self._look()
            if offset == DR:
                return self._guest_ns() // SECOND % _RANGE
            if offset == MR:
                return self._match or 0
            if offset == LR:
                return self._loaded
            if offset == CR:
                return 1
            if offset == IMSC:
                return self._enabled
            if offset == RIS:
                return self._raised
            if offset == MIS:
                return self._raised & self._enabled
        return super()._load(offset)

    def _store(self, offset: int, value: int) -> None:
        with self._lock:
            self._look()
            if offset == MR:
                self._match = value
                self._set_alarm()
            elif offset == LR:
                self._loaded = value
                self._offset_ns = value * SECOND - self._now_ns()
                self._set_alarm()
            elif offset == IMSC:
                self._enabled = value & 1
            elif offset == ICR:
                self._raised &= ~value
            self._drive()

    def _guest_ns(self) -> int:
        return self._now_ns() + self._offset_ns

    def _set_alarm(self) -> None:
        if self._match is None:
            return
        now = self._guest_ns()
        seconds = (self._match - now // SECOND) % _RANGE
        self._rings_at_ns = (now // SECOND + seconds) * SECOND if seconds else now
        self._look()
        self._schedule()

    def _look(self) -> None:
        """Raise the interrupt if it is time."""
        if self._rings_at_ns is not None and self._guest_ns() >= self._rings_at_ns:
            self._rings_at_ns = None
            self._raised = 1

    def _schedule(self) -> None:
        """See to it that somebody looks when it is time."""
        self._stop()
        if self._rings_at_ns is not None and self._after is not None:
            left = max(self._rings_at_ns - self._guest_ns(), 0)
            self._cancel = self._after(left, self._ring)

    def _ring(self) -> None:
        with self._lock:
            self._look()
            self._schedule()  # for a clock that was set back, or a timer that was early
            self._drive()

    def _stop(self) -> None:
        if self._cancel is not None:
            self._cancel()
            self._cancel = None

    def _drive(self) -> None:
        self._line.set(bool(self._raised & self._enabled))
