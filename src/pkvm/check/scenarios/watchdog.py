# SPDX-License-Identifier: GPL-2.0-or-later
"""Ends what takes too long: one thread for all scenarios of a run.

A thread of its own for each would cost as much as the scenario.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

AGAIN_SECONDS = 0.1
"""What did not end is told again after so long."""
_NEVER = float("inf")


class Watchdog:
    """Calls a function when a time is over, and again until `stop`. For the length of a `with`
    block; one scenario at a time."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._deadline = _NEVER
        self._wakes = _NEVER
        """When the thread looks again by itself."""
        self._bark: Callable[[], object] = list
        self._closed = False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self, seconds: float, bark: Callable[[], object]) -> None:
        """Call `bark` in so many seconds, from the watchdog's thread."""
        with self._condition:
            self._bark = bark
            self._deadline = time.monotonic() + seconds
            # The thread sleeps on to the deadline of the scenario before, if that comes first.
            if self._deadline < self._wakes:
                self._condition.notify()

    def stop(self) -> None:
        """It is done: there will be no call any more."""
        with self._condition:
            self._deadline = _NEVER

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _watch(self) -> None:
        with self._condition:
            while not self._closed:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self._bark()
                    self._deadline = time.monotonic() + AGAIN_SECONDS
                    continue
                self._wakes = self._deadline
                self._condition.wait(None if left == _NEVER else left)
