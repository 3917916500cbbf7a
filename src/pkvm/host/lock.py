# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel lock: one thread in the host kernel at a time, first come, first served.

Guest code runs with it held, since it runs on the one CPU. Taking a free lock
is one try at a `threading.Lock`. Who does not get it queues at a gate of his
own; whoever releases the lock then passes it to the first gate. Nobody
overtakes a queue: a newcomer that sees one joins it. Nothing is forgotten: one
who joins tries to pass the lock on after he has joined, one who leaves does so
after he has left, so that of two who meet one always sees the other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Gate:
    """Where one thread waits."""

    __slots__ = ("granted", "lock")

    def __init__(self) -> None:
        self.granted = False
        self.lock = threading.Lock()
        self.lock.acquire()


class KernelLock:
    """`want` is called by a thread that has to wait: to get the CPU out of the guest, maybe."""

    def __init__(self, want: Callable[[], None]) -> None:
        self._want = want
        self._lock = threading.Lock()
        self.take = self._lock.acquire
        """Take the lock with one try: allowed to who saw nobody in `waiting`."""
        self.drop = self._lock.release
        """Release the lock; `hand_over` comes next if somebody is in `waiting`."""
        self._handing = threading.RLock()
        self.waiting: deque[Gate] = deque()
        """Who waits, in order."""

    @property
    def held(self) -> bool:
        """Whether a thread has the lock."""
        return self._lock.locked()

    def enter(self) -> None:
        """Take the lock."""
        if not self.waiting and self._lock.acquire(False):
            return
        gate = Gate()
        try:
            self.waiting.append(gate)
            self.hand_over()
            if not gate.granted:
                self._want()
            gate.lock.acquire()
        except BaseException:
            self._give_up(gate)
            raise

    def leave(self) -> None:
        """Release the lock."""
        self._lock.release()
        if self.waiting:
            self.hand_over()

    def hand_over(self) -> None:
        """Take the lock, if it is free, for the thread that has waited longest."""
        with self._handing:
            if self.waiting and self._lock.acquire(False):
                gate = self.waiting.popleft()
                gate.granted = True
                gate.lock.release()

    def _give_up(self, gate: Gate) -> None:
        """A signal handler raised in `enter`: leave the queue, or pass on what was just given."""
        with self._handing:
            if gate in self.waiting:
                self.waiting.remove(gate)
                return
        if gate.granted:
            self.leave()
