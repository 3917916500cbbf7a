# SPDX-License-Identifier: GPL-2.0-or-later
"""Kicks on a real kernel: a signal to the thread that is in KVM_RUN (KVM API, `immediate_exit`).

The signal is SIGURG, which is ignored where nobody handles it: one that comes
late harms nobody. While there are vCPUs it interrupts, and does nothing else.
"""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
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


class Self(threading.local):
    """This thread, by the kernel's number for it. Asked once a thread: it is a system call."""

    def __init__(self) -> None:
        self.tid = threading.get_native_id()


class Runners(dict[int, int]):
    """Which thread is in KVM_RUN of which descriptor: its `Self.tid`, put in before and taken out
    after. One operation each, so that nobody needs a lock on the path of a device access."""

    def kick(self, fd: int) -> None:
        """Interrupt whoever is in KVM_RUN of `fd`. By tgkill(2), which does nothing where the
        thread ended meanwhile. Takes no lock: also out of a signal handler."""
        tid = self.get(fd)
        if tid is not None:
            with suppress(ProcessLookupError):
                libc.tgkill(tid, SIGNAL)
