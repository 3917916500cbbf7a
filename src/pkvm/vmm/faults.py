# SPDX-License-Identifier: GPL-2.0-or-later
"""What went wrong with a device, for the report: which device, where, and what to do.

A guest can make as many faults as it likes: like ones are counted, and only so
many different ones are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

MAX_FAULTS = 64
"""Different faults that are kept."""


class Fault(NamedTuple):
    """One fault."""

    device: str
    """Its name and slot, such as "virtio-blk (slot 0)"."""
    queue: str
    """The queue's name; "" where it is about none."""
    address: int | None
    """IPA that could not be used, if it was about one."""
    what: str
    """What happened, in words."""
    advice: str
    """What the guest (or the user) must do; "" if there is nothing to say."""

    @property
    def text(self) -> str:
        """The fault as one line."""
        where = f", queue {self.queue}" if self.queue else ""
        at = f" at {self.address:#x}" if self.address is not None else ""
        advice = f": {self.advice}" if self.advice else ""
        return f"{self.device}{where}{at}: {self.what}{advice}"


class Faults:
    """The faults of a run. Any thread may add. `on_new` is called with each new one, in the thread
    in which it happened, under the device's lock."""

    def __init__(self, on_new: Callable[[Fault], object] | None = None) -> None:
        self._lock = threading.Lock()
        self._times: dict[Fault, int] = {}
        self._on_new = on_new
        self.left_out = 0
        """Faults that came after `MAX_FAULTS` different ones, and are not kept."""

    def add(self, fault: Fault) -> None:
        """Count a fault; like ones (all but the address) are one."""
        key = fault._replace(address=None)
        with self._lock:
            for known in self._times:
                if known._replace(address=None) == key:
                    self._times[known] += 1
                    return
            if len(self._times) == MAX_FAULTS:
                self.left_out += 1
                return
            self._times[fault] = 1
        if self._on_new is not None:
            self._on_new(fault)

    def counts(self) -> dict[Fault, int]:
        """Each fault with its first address, and how often it happened, in order."""
        with self._lock:
            return dict(self._times)

    def lines(self) -> list[str]:
        """The report's lines."""
        lines = [
            fault.text + (f" ({times} times)" if times > 1 else "")
            for fault, times in self.counts().items()
        ]
        if self.left_out:
            lines.append(f"{self.left_out} more faults of devices are not listed")
        return lines
