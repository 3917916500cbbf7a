# SPDX-License-Identifier: GPL-2.0-or-later
"""The default recorder: counts events by kind and by what they were about.

It stands on the path of every hypercall, so an event costs two dictionary
look-ups and a lock. The lock is needed: system calls of several threads are
announced at the same time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from pkvm.events import (
    KINDS,
    DmaFault,
    Event,
    GuestExit,
    GuestHypercall,
    GuestTrap,
    HostAbort,
    HostHypercall,
    Ioctl,
    Message,
    Refusal,
    Tlbi,
    Transition,
    VmLife,
)

KEPT_REFUSALS = 32
KEPT_MESSAGES = 256

Counts = dict[str | int | bool, int]

COUNTED_BY: dict[type[Event], str] = {
    Transition: "op",
    Refusal: "check",
    GuestExit: "reason",
    GuestTrap: "reason",
    GuestHypercall: "function",
    HostHypercall: "name",
    HostAbort: "mapped",
    DmaFault: "device",
    Tlbi: "vmid",
    VmLife: "what",
    Ioctl: "request",
    Message: "source",
}
"""The field by whose value each kind of event is counted."""


class RefusalCount(NamedTuple):
    """Refusals of one operation by one check: how many, and the last one."""

    times: int
    last: Refusal


class CountingRecorder:
    """Counts, and keeps the last 32 refusals and the last 256 kernel messages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refusals: deque[Refusal] = deque(maxlen=KEPT_REFUSALS)
        self._refused: dict[tuple[str, str], RefusalCount] = {}
        self._messages: deque[Message] = deque(maxlen=KEPT_MESSAGES)
        self._by_type: dict[type[Event], tuple[int, Counts, Callable[[Event], None] | None]] = {
            kind: (
                kind._fields.index(field),
                {},
                self._keep if kind in (Refusal, Message) else None,
            )
            for kind, field in COUNTED_BY.items()
        }

    def record(self, event: Event, /) -> None:
        """Count `event`."""
        index, counts, keep = self._by_type[type(event)]
        key = event[index]
        with self._lock:
            counts[key] = counts.get(key, 0) + 1
            if keep is not None:
                keep(event)

    def counts(self, kind: type[Event]) -> Counts:
        """How often each value of the field COUNTED_BY was seen, in the order of first sight."""
        with self._lock:
            return dict(self._by_type[kind][1])

    def totals(self) -> dict[str, int]:
        """Events by kind, under the names that JSON has for them; those that happened."""
        with self._lock:
            sums = {KINDS[kind]: sum(entry[1].values()) for kind, entry in self._by_type.items()}
        return {kind: count for kind, count in sums.items() if count}

    def refusals(self) -> list[Refusal]:
        """The last refusals, oldest first."""
        with self._lock:
            return list(self._refusals)

    def refusal_counts(self) -> dict[tuple[str, str], RefusalCount]:
        """All refusals, by operation and check."""
        with self._lock:
            return dict(self._refused)

    def messages(self) -> list[Message]:
        """What kernels printed, oldest first."""
        with self._lock:
            return list(self._messages)

    def _keep(self, event: Event) -> None:
        if isinstance(event, Refusal):
            self._refusals.append(event)
            key = (event.op, event.check)
            before = self._refused.get(key)
            self._refused[key] = RefusalCount(1 if before is None else before.times + 1, event)
        elif isinstance(event, Message):
            self._messages.append(event)
