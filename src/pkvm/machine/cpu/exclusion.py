# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may be inside libunicorn: the guest, or somebody who changes what it runs on.

TLB flushes and the like come from any thread and must not meet running guest
code. A lock for every entry into the guest would cost a third of a hypercall,
so the one thread that runs the guest only writes and reads flags (the
interpreter lock puts their order beyond doubt):

* the guest's thread says that it goes INSIDE, then looks whether anybody waits;
* somebody else says that he waits, then looks whether the guest is inside.

Whatever the order, one of them sees the other: the guest's thread then gives
way, and the other one asks libunicorn to stop, again and again until the guest
is out, for a stop that comes just before emulation starts is forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

INSIDE, WAITING, INTERRUPTED = range(3)
"""Indices of `CpuOwnership.flags`. INTERRUPTED is the engine's: an interrupt is pending."""
FIRST_WAIT_S = 20e-6
LONGEST_WAIT_S = 1e-3
"""Between two requests to stop."""


class CpuOwnership:
    """As a context manager: the CPU while no guest code runs on it, for any thread that is not
    inside itself. `stop` asks the engine to leave guest code."""

    def __init__(self, stop: Callable[[], object]) -> None:
        self.flags = [False, False, False]
        """For the guest's thread. To enter: set INSIDE, and call `give_way` if WAITING. To leave:
        clear INSIDE."""
        self._stop = stop
        self._turnstile = threading.Lock()
        self._left = threading.Lock()
        """Released by `give_way` to wake the one who waits."""
        self._left.acquire()

    def give_way(self) -> None:
        """Let those go first who wait. Called by the guest's thread, which is inside before and
        after, but not meanwhile."""
        flags = self.flags
        while flags[WAITING]:
            flags[INSIDE] = False
            if self._left.locked():
                self._left.release()
            with self._turnstile:
                flags[INSIDE] = True

    def __enter__(self) -> None:
        self._turnstile.acquire()
        flags = self.flags
        flags[WAITING] = True
        wait = FIRST_WAIT_S
        while flags[INSIDE]:
            self._left.acquire(blocking=False)
            self._stop()
            self._left.acquire(timeout=wait)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flags[WAITING] = False
        self._turnstile.release()
