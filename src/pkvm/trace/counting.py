# SPDX-License-Identifier: GPL-2.0-or-later
"""The default recorder: counts events by kind and by what they were about.

It stands on the path of every hypercall, and system calls of several threads
are announced at the same time. A lock would cost more than all else, so it uses
what the interpreter does in one step: `next` of an `itertools.count`, an item
of a dict, `append` to a deque. A count is read by taking one more and setting
that off against the reads so far.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Generic, NamedTuple, TypeVar

from pkvm.events import (
    KINDS,
    CpuPower,
    DmaFault,
    Event,
    GuestExit,
    GuestHypercall,
    GuestTrap,
    HostAbort,
    HostHypercall,
    HostSmc,
    Ioctl,
    Message,
    Refusal,
    SecureMemory,
    SmmuEvent,
    Tlbi,
    Transition,
    VmLife,
)

KEPT_REFUSALS = 32
KEPT_MESSAGES = 256

Value = str | int | bool
Counts = dict[Value, int]
Key = TypeVar("Key")

COUNTED_BY: dict[type[Event], str] = {
    Transition: "op",
    Refusal: "check",
    GuestExit: "reason",
    GuestTrap: "reason",
    GuestHypercall: "function",
    HostHypercall: "name",
    HostAbort: "mapped",
    DmaFault: "device",
    SmmuEvent: "event",
    Tlbi: "vmid",
    VmLife: "what",
    HostSmc: "function",
    CpuPower: "what",
    SecureMemory: "what",
    Ioctl: "request",
    Message: "source",
}
"""The field by whose value each kind of event is counted."""


class RefusalCount(NamedTuple):
    """Refusals of one operation by one check: how many, and the last one."""

    times: int
    last: Refusal


class _Tally(Generic[Key]):
    """Counts by key, without a lock for those who count."""

    def __init__(self) -> None:
        self.ticks: dict[Key, count[int]] = {}
        """By key; `next` counts one more."""
        self._reads: dict[Key, int] = {}
        self._reading = threading.Lock()

    def read(self, key: Key) -> int:
        """How often `key` was counted."""
        with self._reading:
            reads = self._reads.get(key, 0)
            self._reads[key] = reads + 1
            return next(self.ticks[key]) - reads


class CountingRecorder:
    """Counts, and keeps the last 32 refusals and the last 256 kernel messages."""

    def __init__(self) -> None:
        self._refusals: deque[Refusal] = deque(maxlen=KEPT_REFUSALS)
        self._refused: _Tally[tuple[str, str]] = _Tally()
        self._last: dict[tuple[str, str], Refusal] = {}
        self._messages: deque[Message] = deque(maxlen=KEPT_MESSAGES)
        self._tallies: dict[type[Event], _Tally[Value]] = {kind: _Tally() for kind in COUNTED_BY}
        self._by_type: dict[
            type[Event],
            tuple[int, dict[Value, count[int]], Callable[[Event], None] | None],
        ] = {
            kind: (
                kind._fields.index(field),
                self._tallies[kind].ticks,
                self._keep if kind in (Refusal, Message) else None,
            )
            for kind, field in COUNTED_BY.items()
        }

    def record(self, event: Event, /) -> None:
        """Count `event`."""
        index, ticks, keep = self._by_type[type(event)]
        try:
            next(ticks[event[index]])
        except KeyError:
            next(ticks.setdefault(event[index], count()))
        if keep is not None:
            keep(event)

    def counts(self, kind: type[Event]) -> Counts:
        """How often each value of the field COUNTED_BY was seen, in the order of first sight."""
        tally = self._tallies[kind]
        return {key: tally.read(key) for key in list(tally.ticks)}

    def totals(self) -> dict[str, int]:
        """Events by kind, under the names that JSON has for them; those that happened."""
        sums = {KINDS[kind]: sum(self.counts(kind).values()) for kind in COUNTED_BY}
        return {kind: total for kind, total in sums.items() if total}

    def refusals(self) -> list[Refusal]:
        """The last refusals, oldest first."""
        return list(self._refusals)

    def refusal_counts(self) -> dict[tuple[str, str], RefusalCount]:
        """All refusals, by operation and check."""
        return {
            key: RefusalCount(self._refused.read(key), last)
            for key, last in list(self._last.items())
        }

    def messages(self) -> list[Message]:
        """What kernels printed, oldest first."""
        return list(self._messages)

    def _keep(self, event: Event) -> None:
        if isinstance(event, Refusal):
            self._refusals.append(event)
            key = (event.op, event.check)
            next(self._refused.ticks.setdefault(key, count()))
            self._last[key] = event
        elif isinstance(event, Message):
            self._messages.append(event)
