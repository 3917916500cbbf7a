# SPDX-License-Identifier: GPL-2.0-or-later
"""Events as JSON lines (docs/events.md): one object a line, in the order in which they happened.

The order of keys and the spelling of numbers are fixed: two runs that do the
same write the same bytes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import TextIO

from pkvm.events import KINDS, SCHEMA_VERSION, Event, Recorder

HEADER_KIND = "header"


class TraceError(Exception):
    """A trace could not be written to its end; the text says which and why."""


class JsonLinesRecorder:
    """Writes every event to `file`, and passes it on to `tee` if there is one.

    `now_ns` gives the machine's time in nanoseconds; it may be set later than the recorder is
    made, when the machine exists. The file is the caller's to close, after `finish`.
    """

    def __init__(
        self,
        file: TextIO,
        now_ns: Callable[[], int] = lambda: 0,
        *,
        tee: Recorder | None = None,
    ) -> None:
        self.now_ns = now_ns
        self._file = file
        self._tee = tee
        self._lock = threading.Lock()
        self._encode = json.JSONEncoder(separators=(",", ":")).encode
        self._next = 0
        self._error: OSError | None = None
        self._write(0, HEADER_KIND, {"schema": "pkvm-events"})

    def record(self, event: Event, /) -> None:
        """Write `event`. What the file refuses is kept for `finish`: a recorder does not raise."""
        if self._tee is not None:
            self._tee.record(event)
        with self._lock:
            if self._error is None:
                self._write(self.now_ns(), KINDS[type(event)], event._asdict())

    def finish(self) -> None:
        """Flush, and raise the OSError that writing met, if any."""
        with self._lock:
            if self._error is None:
                self._file.flush()
            else:
                raise self._error

    def _write(self, now_ns: int, kind: str, fields: dict[str, object]) -> None:
        line = {"v": SCHEMA_VERSION, "seq": self._next, "t": now_ns, "kind": kind, **fields}
        try:
            self._file.write(self._encode(line) + "\n")
        except OSError as error:
            self._error = error
        self._next += 1
