# SPDX-License-Identifier: GPL-2.0-or-later
"""KVM_IRQFD (KVM API 4.75): a signal of an eventfd is an interrupt.

The eventfds are the computer's own, so they are there where Linux is. One thread
of the host kernel's waits for all of them; it is started with the first and
ended by `close`.
"""

from __future__ import annotations

import errno
import os
import selectors
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pkvm.host.lock import KernelLock

AVAILABLE = hasattr(os, "eventfd")
_COUNTER_BYTES = 8
_INT_MAX = (1 << 31) - 1


class Binding(NamedTuple):
    """An eventfd that is bound to an interrupt."""

    owner: object
    eventfd: int
    """`identity` of the eventfd."""
    gsi: int
    fd: int
    """The host's own descriptor of it."""
    signal: Callable[[], None]
    """Inject; called with the kernel lock."""
    dropped: Callable[[], None] | None
    """Called when the binding ends."""


class Irqfds:
    """Every irqfd of the host. The kernel lock covers everything but the thread's waiting."""

    def __init__(self, lock: KernelLock) -> None:
        self._lock = lock
        self._bindings: list[Binding] = []
        self._selector: selectors.BaseSelector | None = None
        self._thread: threading.Thread | None = None
        self._wake = -1
        """An eventfd that makes the thread look again."""
        self._closed = False

    def assign(
        self,
        owner: object,
        fd: int,
        gsi: int,
        signal: Callable[[], None],
        dropped: Callable[[], None] | None = None,
    ) -> None:
        """Bind. A signal that is there already counts. Raises EBADF, EINVAL for a descriptor that
        is no eventfd, EBUSY if it is bound."""
        eventfd = identity(fd)
        if any(binding.eventfd == eventfd for binding in self._bindings):
            raise OSError(errno.EBUSY, f"eventfd {fd} is bound already")
        if self._closed:
            raise OSError(errno.ENODEV, "the host kernel is shut down")
        binding = Binding(owner, eventfd, gsi, duplicate(fd), signal, dropped)
        self._bindings.append(binding)
        self._start().register(binding.fd, selectors.EVENT_READ, binding)
        os.eventfd_write(self._wake, 1)

    def deassign(self, owner: object, fd: int, gsi: int) -> None:
        """Undo `assign`; nothing happens if there was none. Raises EBADF, EINVAL."""
        eventfd = identity(fd)
        for binding in list(self._bindings):
            if (binding.owner, binding.eventfd, binding.gsi) == (owner, eventfd, gsi):
                self._drop(binding)

    def release(self, owner: object) -> None:
        """Undo every `assign` of an owner."""
        for binding in list(self._bindings):
            if binding.owner is owner:
                self._drop(binding)

    def close(self) -> None:
        """End the thread. Without the kernel lock. Idempotent."""
        self._closed = True
        thread, self._thread = self._thread, None
        if thread is not None and self._selector is not None:
            os.eventfd_write(self._wake, 1)
            thread.join()
            self._selector.close()
            self._selector = None
            os.close(self._wake)

    def _drop(self, binding: Binding) -> None:
        self._bindings.remove(binding)
        if self._selector is not None:
            self._selector.unregister(binding.fd)
        os.close(binding.fd)
        if binding.dropped is not None:
            binding.dropped()

    def _start(self) -> selectors.BaseSelector:
        if self._selector is None:
            self._selector = selectors.DefaultSelector()
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._selector.register(self._wake, selectors.EVENT_READ, None)
            self._thread = threading.Thread(
                target=self._serve, args=(self._selector,), name="irqfds", daemon=True
            )
            self._thread.start()
        return self._selector

    def _serve(self, selector: selectors.BaseSelector) -> None:
        while not self._closed:
            ready = selector.select()
            self._lock.enter()
            try:
                for key, _ in ready:
                    self._take(key.data)
            finally:
                self._lock.leave()

    def _take(self, binding: Binding | None) -> None:
        """Take an eventfd's signal, if it is still bound and nobody else was faster."""
        if binding is not None and binding not in self._bindings:
            return
        with suppress(BlockingIOError):
            os.read(self._wake if binding is None else binding.fd, _COUNTER_BYTES)
            if binding is not None:
                binding.signal()


def duplicate(fd: int) -> int:
    """A descriptor of its own for an eventfd, which does not block. Raises EBADF, EINVAL."""
    identity(fd)
    own = os.dup(fd)
    os.set_blocking(own, False)
    return own


def signal(fd: int) -> None:
    """Signal an eventfd; one that is full is signalled enough."""
    with suppress(BlockingIOError):
        os.eventfd_write(fd, 1)


def identity(fd: int) -> int:
    """A number that all descriptors of one eventfd have in common. Raises EBADF for a descriptor
    that is not open, EINVAL if it is no eventfd."""
    if fd > _INT_MAX:
        raise OSError(errno.EBADF, "no descriptor has such a number")
    os.fstat(fd)
    if not AVAILABLE:
        raise OSError(errno.EINVAL, "this system has no eventfds")
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError as error:
        raise OSError(errno.EBADF, f"descriptor {fd} is not open") from error
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "eventfd-count" not in fields:
        raise OSError(errno.EINVAL, f"descriptor {fd} is no eventfd")
    return int(fields.get("eventfd-id", fd))
