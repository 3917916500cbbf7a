# SPDX-License-Identifier: GPL-2.0-or-later
"""The way to an emulated machine and back: its console and virtio ports, read as they fill."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from math import inf

from pkvm.testbed.base import BedError, Listener
from pkvm.testbed.qemu import Process
from pkvm.testbed.root import LOST

CONSOLE = "console"
CONTROL = "control"

_CHUNK = 1 << 18
_LOG_BYTES = 1 << 20
_WORDS = ("Kernel panic", "Internal error", "Unable to handle", LOST)
"""What in a kernel's log says why it ended."""


class Output:
    """What one port brings for one command, up to the marker that ends it."""

    def __init__(self, marker: bytes, listener: Listener | None) -> None:
        self.data = bytearray()
        self.ended = False
        self._marker = marker
        self._listener = listener
        self._held = b""

    def feed(self, data: bytes) -> None:
        """Take what came."""
        data = self._held + data
        at = data.find(self._marker)
        self.ended = at >= 0
        if self.ended:
            self._held = b""
            data = data[:at]
        else:
            # The marker may come in pieces: hold back what may be its beginning.
            size = min(len(data), len(self._marker) - 1)
            while not self._marker.startswith(data[len(data) - size :]):
                size -= 1
            self._held = data[len(data) - size :]
            data = data[: len(data) - size]
        self.data += data
        if self._listener is not None and data:
            self._listener(data)


class Link:
    """The sockets of a QEMU process: what comes by them is read whenever this waits."""

    def __init__(self, process: Process, on_console: Listener | None) -> None:
        self.lines: list[str] = []
        """What came by `control` and was not taken."""
        self.outputs: dict[str, Output] = {}
        """Who takes what comes by other ports."""
        self.heard = time.monotonic()
        """When the machine was heard last."""
        self._process = process
        self.on_console = on_console
        """Who sees the console's bytes."""
        self._log = bytearray()
        self._control = b""
        self._unsent: dict[str, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        for name, end in process.sockets.items():
            self._selector.register(end, selectors.EVENT_READ, name)

    @property
    def log(self) -> str:
        """The last of the console."""
        return self._log.decode(errors="replace").replace("\r", "")

    def send(self, name: str, data: bytes) -> None:
        """Have `data` go out by a port while `wait` waits."""
        self._unsent.setdefault(name, bytearray()).extend(data)
        end = self._process.sockets[name]
        self._selector.modify(end, selectors.EVENT_READ | selectors.EVENT_WRITE, name)

    def wait(self, done: Callable[[], bool], deadline: float) -> bool:
        """Read and send until `done`, or False if time.monotonic() passes `deadline` before.

        Raises BedError if the machine ends.
        """
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for key, events in self._selector.select(None if left == inf else left):
                if callable(key.data):
                    key.data()
                    continue
                try:
                    if events & selectors.EVENT_WRITE:
                        self._write(key.data)
                    if events & selectors.EVENT_READ:
                        self._read(key.data)
                except (BrokenPipeError, ConnectionResetError):
                    self._ended()
        return True

    def watch(self, fd: int, ready: Callable[[], object]) -> None:
        """Have `ready` called while `wait` waits, whenever there is something to read at `fd`."""
        self._selector.register(fd, selectors.EVENT_READ, ready)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`."""
        self._selector.unregister(fd)

    def reason(self) -> str:
        """What the log says of why the machine ended: in words after a colon, or nothing."""
        lines = [line for line in self.log.splitlines() if line.strip()]
        telling = [line for line in lines if any(word in line for word in _WORDS)]
        chosen = telling[:1] or lines[-1:]
        return "".join(f": {line.strip()}" for line in chosen)

    def close(self) -> None:
        """Read no more. The sockets are the process's."""
        self._selector.close()

    def _write(self, name: str) -> None:
        end = self._process.sockets[name]
        waiting = self._unsent[name]
        if waiting:
            del waiting[: end.send(memoryview(waiting)[:_CHUNK].tobytes())]
        if not waiting:
            self._selector.modify(end, selectors.EVENT_READ, name)

    def _read(self, name: str) -> None:
        data = self._process.sockets[name].recv(_CHUNK)
        if not data:
            self._ended()
        self.heard = time.monotonic()
        if name == CONSOLE:
            self._log += data
            if len(self._log) > 2 * _LOG_BYTES:
                del self._log[:-_LOG_BYTES]
            if self.on_console is not None:
                self.on_console(data)
        elif name == CONTROL:
            *lines, self._control = (self._control + data).split(b"\n")
            self.lines += [line.decode(errors="replace") for line in lines]
        elif name in self.outputs:
            self.outputs[name].feed(data)

    def _ended(self) -> None:
        """Raise BedError: the machine is gone."""
        fate = self._process.fate()
        raise BedError(f"the emulated machine is gone: {fate}{self.reason()}")
