# SPDX-License-Identifier: GPL-2.0-or-later
"""The terminal: the guest's console goes out as it appears, what is typed goes in."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

COLOURS = {"good": "32", "bad": "31", "title": "1"}
TEXT_LIMIT = 16 << 20
"""Bytes of a guest's console that are kept for the report."""
FLUSH_S = 0.005
"""How long a part of a line may wait for the rest: less than a person or a script notices."""
_PART_LIMIT = 1 << 10


def painter(stream: TextIO) -> Callable[[str, str], str]:
    """`paint(text, style)`: `text` in a colour of COLOURS where `stream` is a terminal and nobody
    objects (NO_COLOR, TERM=dumb), else as it is."""
    wanted = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def paint(text: str, style: str) -> str:
        return f"\x1b[{COLOURS[style]}m{text}\x1b[0m" if wanted else text

    return paint


class OutputError(Exception):
    """Stdout takes nothing more; the text says why."""


class OutputClosed(OutputError):
    """Nobody reads stdout any more. No OSError: a device of the guest's must not take it for an
    error of its own."""


def write(data: bytes) -> None:
    """Write to stdout, at once. Raises OutputError."""
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise OutputClosed("nobody reads the output any more") from None
    except OSError as error:
        raise OutputError(f"the output cannot be written: {error.strerror}") from error


def write_line(text: str) -> None:
    """Write a line to stdout. Errors as `write`."""
    write(text.encode(errors="backslashreplace") + b"\n")


class Console:
    """Takes what the guest writes; with `show` it goes to stdout. The last TEXT_LIMIT bytes, or
    more, are kept.

    A guest sends one byte after another, and a system call for each would cost more than the guest
    itself: a line goes out when it is complete, what is not a line after FLUSH_S. An error of
    stdout comes with the guest's next bytes, and `on_error` is called if it sends none.
    """

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._bytes = bytearray()
        self._lock = threading.Lock()
        """Covers what is to go out, and its order."""
        self._waiting = bytearray()
        self._error: OutputError | None = None
        self.on_error: Callable[[], object] | None = None
        """Called in a thread of the console's own."""
        self._begun = threading.Event()
        """There is a part of a line."""
        self._closed = False
        self._thread: threading.Thread | None = None
        self.translate: Callable[[bytes], bytes] | None = None
        """What to make of bytes on their way to stdout; they are kept as they are."""

    def __call__(self, data: bytes) -> None:
        """Take some bytes. Errors as `write`."""
        self._bytes += data
        if len(self._bytes) > 2 * TEXT_LIMIT:
            del self._bytes[:-TEXT_LIMIT]
        if not self._show:
            return
        if self._error is not None:
            raise self._error
        with self._lock:
            self._waiting += data
        if b"\n" in data or len(self._waiting) >= _PART_LIMIT:
            self.flush()
        elif not self._begun.is_set():
            self._begun.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="stdout", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Write what waits. Errors as `write`."""
        if self._error is not None:
            raise self._error
        with self._lock:
            data = bytes(self._waiting)
            self._waiting.clear()
            if data:
                write(data if self.translate is None else self.translate(data))

    @property
    def at_line_start(self) -> bool:
        """Whether the guest's last line is complete."""
        return not self._bytes or self._bytes.endswith(b"\n")

    def close(self) -> None:
        """The guest writes no more. Write what waits; if it left its last line open, close it on
        stdout. Errors as `write`."""
        self._closed = True
        self._begun.set()
        if self._show:
            self.flush()
            if not self.at_line_start:
                write(b"\n")

    def _serve(self) -> None:
        """The thread for parts of lines."""
        while not self._closed:
            self._begun.wait()
            time.sleep(FLUSH_S)
            self._begun.clear()
            try:
                self.flush()
            except OutputError as error:
                self._error = error
                if self.on_error is not None:
                    self.on_error()
                return

    @property
    def text(self) -> str:
        """All that is kept; what is not UTF-8 shows as escapes."""
        return self._bytes.decode(errors="backslashreplace")


def read_input() -> bytes:
    """What stdin has now, without waiting; b"" if it has nothing or is closed."""
    try:
        if select.select([0], [], [], 0)[0]:
            return os.read(0, 4096)
    except OSError:
        return b""
    return b""
