# SPDX-License-Identifier: GPL-2.0-or-later
"""`Loop`: a device's own thread, which waits for files and calls back when they are ready."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

IN, OUT = select.POLLIN, select.POLLOUT
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL

Ready = Callable[[int], object]
"""Called in the loop's thread with what is ready: IN, OUT, or both. A file whose other end is gone
counts as both."""


class Loop:
    """Waits for the files that are watched. The thread begins with the first that is, and ends
    with `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[int, Ready]] = {}
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_out, False)
        os.set_blocking(self._wake_in, False)
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, fd: int, events: int, ready: Ready) -> None:
        """Call `ready` whenever `fd` is ready for one of `events`; for 0 no more. Any thread may;
        a call that is under way already is not taken back."""
        with self._lock:
            if self._closed or self._watched.get(fd, (0, None)) == (events, ready):
                return
            if events:
                self._watched[fd] = (events, ready)
            elif self._watched.pop(fd, None) is None:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._wake()

    def forget(self, fd: int) -> None:
        """Watch `fd` no more: when it is being closed. It stays open for those at its other end
        until the thread has left it."""
        with self._lock:
            if self._closed or self._watched.pop(fd, None) is None:
                return
        self._wake()

    def close(self) -> None:
        """End the thread, when the callback under way has returned. Idempotent; not from a
        callback, and without a lock that one takes."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._watched.clear()
        self._wake()
        if self._thread is not None:
            self._thread.join()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _wake(self) -> None:
        if threading.current_thread() is self._thread:
            return
        try:
            os.write(self._wake_in, b"\0")
        except BlockingIOError:
            return  # Full: the thread wakes up anyway.

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                watched = dict(self._watched)
            poll = select.poll()
            poll.register(self._wake_out, select.POLLIN)
            for fd, (events, _) in watched.items():
                poll.register(fd, events)
            for fd, happened in poll.poll():
                if fd == self._wake_out:
                    os.read(fd, 4096)
                    continue
                with self._lock:
                    events, ready = self._watched.get(fd, (0, None))
                if ready is None:
                    continue
                if happened & _GONE:
                    happened |= IN | OUT
                if happened & events:
                    ready(happened & events)
