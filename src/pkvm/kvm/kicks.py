# SPDX-License-Identifier: GPL-2.0-or-later
"""Kicks on a real kernel: a signal to the thread that is in KVM_RUN (KVM API, `immediate_exit`).

The signal is SIGURG, which is ignored where nobody handles it: one that comes
late harms nobody. While there are vCPUs it interrupts, and does nothing else.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

from pkvm.kvm import libc

SIGNAL = signal.SIGURG


class Interrupter:
    """Has SIGNAL interrupt system calls for as long as there are users, in all of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: Any = None

    def take(self) -> None:
        """One user more. Raises OSError."""
        with self._lock:
            if not self._users:
                self._before = libc.interrupt_on(SIGNAL)
            self._users += 1

    def drop(self) -> None:
        """One user less; after the last one the signal does what it did before."""
        with self._lock:
            self._users -= 1
            if not self._users:
                libc.restore(SIGNAL, self._before)


INTERRUPTER = Interrupter()
"""The process has one."""


class Runners:
    """Which thread is in KVM_RUN of which descriptor."""

    def __init__(self) -> None:
        # Python's own signal handlers may kick in the thread that holds it.
        self._lock = threading.RLock()
        self._threads: dict[int, int] = {}

    def enter(self, fd: int) -> None:
        """This thread goes into KVM_RUN."""
        with self._lock:
            self._threads[fd] = threading.get_ident()

    def leave(self, fd: int) -> None:
        """This thread is out of it."""
        with self._lock:
            if self._threads.get(fd) == threading.get_ident():
                del self._threads[fd]

    def kick(self, fd: int) -> None:
        """Interrupt whoever is in KVM_RUN of `fd`. The lock keeps the thread from ending first."""
        with self._lock:
            thread = self._threads.get(fd)
            if thread is not None:
                signal.pthread_kill(thread, SIGNAL)
