# SPDX-License-Identifier: GPL-2.0-or-later
"""A child process at a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

PATIENCE_S = 60.0
"""After this long without what it waits for, a test fails."""
_LAUNCHER = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)


class PtyChild:
    """`python ARGUMENTS` in a session of its own; stdin is its controlling terminal, and stdout and
    stderr are unless others are given."""

    def __init__(
        self, arguments: Sequence[str], *, stdout: int | None = None, controlling: bool = True
    ) -> None:
        self.master, self.slave = os.openpty()
        self.seen = b""
        """All that came out of the terminal."""
        self._matched = 0
        self.set_size(80, 24)
        self.before = self.attributes()
        launcher = [sys.executable, "-c", _LAUNCHER] if controlling else [sys.executable]
        self.process = subprocess.Popen(
            [*launcher, *arguments],
            stdin=self.slave,
            stdout=self.slave if stdout is None else stdout,
            stderr=self.slave,
            start_new_session=True,
        )

    def attributes(self) -> list[Any]:
        """The terminal's mode, as termios has it."""
        return termios.tcgetattr(self.slave)

    def is_raw(self) -> bool:
        """Whether the terminal gives keys at once, without a signal or an echo."""
        local: int = self.attributes()[3]
        return not local & (termios.ICANON | termios.ISIG | termios.ECHO)

    def set_size(self, columns: int, rows: int) -> None:
        """Resize the window; the kernel tells the foreground process."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("<4H", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        """Press these keys."""
        os.write(self.master, keys)

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read until `pattern` matches behind the last match. AssertionError at the end."""
        end = time.monotonic() + PATIENCE_S
        while True:
            match = re.compile(pattern, re.DOTALL).search(self.seen, self._matched)
            if match is not None:
                self._matched = match.end()
                return match
            assert select.select([self.master], [], [], max(0, end - time.monotonic()))[0], (
                pattern,
                self.seen,
            )
            self.seen += os.read(self.master, 65536)

    def wait(self) -> int:
        """The child's status, when it has ended; what it wrote until then is in `seen`."""
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.02)[0]:
                self.seen += os.read(self.master, 65536)
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536)
        return self.process.returncode

    def __enter__(self) -> PtyChild:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)
