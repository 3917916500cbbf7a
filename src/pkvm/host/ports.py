# SPDX-License-Identifier: GPL-2.0-or-later
"""What the host kernel is handed: its bus, EL2's door, the clock.

The host is untrusted, so it holds nothing of the machine or of EL2 but these
narrow things: loads and stores that stage-2 checks, one hypercall instruction,
and time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_SIZE - 1


class Bus(Protocol):
    """The host CPU's loads and stores, behind the host's stage-2.

    Addresses are the host's physical addresses, in bytes. An access that is refused raises one of
    the exception types that the host is handed beside the bus (`bus_faults`).
    """

    def read(self, ipa: int, length: int, /) -> bytes:
        """Load `length` bytes."""
        ...

    def write(self, ipa: int, data: bytes | bytearray | memoryview, /) -> None:
        """Store `data`; pages before a refused one have been written."""
        ...

    def read_u64(self, ipa: int, /) -> int:
        """Load a little-endian 64-bit word."""
        ...

    def write_u64(self, ipa: int, value: int, /) -> None:
        """Store a little-endian 64-bit word."""
        ...


class Door(Protocol):
    """HVC #0 from the host: (function id, arguments) -> (X0, X1, ...), facts §9.1."""

    def __call__(self, function: int, /, *args: int) -> tuple[int, ...]:
        """Make the hypercall."""
        ...


class Clock(Protocol):
    """The machine's time."""

    @property
    def virtual(self) -> bool:
        """Whether time counts blocks of guest code and stands still while none runs."""
        ...

    def now_ns(self) -> int:
        """Nanoseconds; never goes back."""
        ...


NS_PER_TICK = 16
"""Nanoseconds that the system counter (CNTPCT_EL0) takes for a tick: CNTFRQ_EL0 is 62.5 MHz."""


class Alarm(Protocol):
    """A timer of the host's own."""

    def set(self, deadline_ns: int, /) -> None:
        """Interrupt at this time of the clock, and not at the one set before."""
        ...

    def cancel(self) -> None:
        """Do not interrupt."""
        ...

    def close(self) -> None:
        """Never interrupt again."""
        ...


class Alarms(Protocol):
    """The machine's timers, as far as the host may have them."""

    def new(self, callback: Callable[[], bool], /) -> Alarm:
        """A timer, not set, that interrupts by calling `callback`: with the real clock in a thread
        of its own, with the virtual clock in the thread that runs the guest or calls `jump`. The
        CPU leaves its guest then, unless the callback returns True."""
        ...

    def jump(self) -> bool:
        """Nobody runs: let the virtual clock jump to the next alarm, and that interrupt. False if
        none is set."""
        ...


BusFaults = tuple[type[Exception], ...]
"""What `Bus` raises when the host's stage-2, or the bus itself, refuses an access. A stage-2 fault
has the address of the first byte refused as `ipa`, as FAR and HPFAR would tell it."""
