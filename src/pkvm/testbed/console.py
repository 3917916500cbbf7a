# SPDX-License-Identifier: GPL-2.0-or-later
"""A process with a guest's console at its standard streams: wait for words, type, time both."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

_CHUNK = 1 << 16
_SHOWN_LINES = 15


class ConsoleError(Exception):
    """The guest did not say what was expected; the text ends with the last that it said."""


class Console:
    """Runs `command` in a process group of its own, which ends with the `with` block.

    Standard output and standard error are read together. `limit` is the time in seconds after
    which every wait ends in an error, counted from the start. Raises OSError if the command cannot
    be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        limit: float = 120,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.started = time.perf_counter()
        self.deadline = self.started + limit
        self.output = bytearray()
        """All that was read so far."""
        self._seen = 0
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
            env=None if environment is None else {**os.environ, **environment},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        self._pipe = self._process.stdout

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._pipe.close()
        try:
            self._input.close()
        except BrokenPipeError:
            pass

    @property
    def text(self) -> str:
        """All that was read so far, as text with plain line ends."""
        return self.output.decode("utf-8", "replace").replace("\r", "")

    @property
    def pid(self) -> int:
        """The process, also its group."""
        return self._process.pid

    def expect(self, words: str) -> float:
        """Wait for `words` after what was expected last; the seconds from the start till then.

        Raises ConsoleError if the output or the time ends before.
        """
        wanted = words.encode()
        arrived = time.perf_counter()
        while (at := self.output.find(wanted, self._seen)) < 0:
            if not self._read():
                raise self._error(f"the output ended before {words!r}")
            arrived = time.perf_counter()
        self._seen = at + len(wanted)
        return arrived - self.started

    def send(self, text: str) -> None:
        """Type `text`. Raises ConsoleError if nobody listens."""
        try:
            self._input.write(text.encode())
        except BrokenPipeError:
            raise self._error(f"nobody took {text!r}") from None

    def finish(self) -> int:
        """Read to the end; the process's exit status, negative for a signal.

        Raises ConsoleError if the time ends before.
        """
        while self._read():
            pass
        try:
            return self._process.wait(max(0.0, self.deadline - time.perf_counter()))
        except subprocess.TimeoutExpired:
            raise self._error("the process did not end in time") from None

    def kill(self) -> None:
        """End the process and all of its group at once, if it has not ended by itself."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self) -> bool:
        """Read what comes next; False at the end of the output."""
        left = self.deadline - time.perf_counter()
        if left <= 0 or not select.select((self._pipe,), (), (), left)[0]:
            raise self._error("the time was up")
        data = os.read(self._pipe.fileno(), _CHUNK)
        self.output += data
        return bool(data)

    def _error(self, what: str) -> ConsoleError:
        last = "\n".join(self.text.splitlines()[-_SHOWN_LINES:])
        return ConsoleError(f"{what}; the last lines:\n{last}")
