# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest says it shares, and the talk through it.

The guest's word is all that a VMM has: nothing here is taken as true before it
is checked, and what does not hold becomes a note for the report.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

from pkvm.kvm import Memory
from pkvm.uapi.errors import ProtectedPageError
from pkvm.vmm.board import PAGE_SIZE

MAX_NOTES = 16


class SharedRange(NamedTuple):
    """Memory that the guest announced: it may be shared, and should hold this."""

    ipa: int
    length: int
    crc: int
    """CRC-32 of the content at the moment of the announcement."""
    by_hypercall: bool
    """Whether the guest shared it by MEM_SHARE; False where sharing is not offered."""

    def holds(self, ipa: int) -> bool:
        """Whether the byte at `ipa` is in it."""
        return self.ipa <= ipa < self.ipa + self.length


class Sharing:
    """The announced ranges of a guest whose RAM is `ram`, at IPA `ram_base`."""

    def __init__(self, ram: Memory, ram_base: int) -> None:
        self._ram = ram
        self._ram_base = ram_base
        self.ranges: dict[int, SharedRange] = {}
        """Announced and not taken back, by IPA."""
        self.latest: SharedRange | None = None
        """The last one announced, until it is taken back."""
        self.taken_back: SharedRange | None = None
        """The last one that the guest took back."""
        self.notes: list[str] = []
        """What did not hold, in words; the first 16."""

    def announce(self, args: tuple[int, ...]) -> SharedRange | None:
        """Take the guest's ARG0-ARG3 for memory that it shares; None if that cannot be."""
        ipa, length, crc, by_hypercall = args[:4]
        start = ipa - self._ram_base
        if ipa % PAGE_SIZE or start < 0 or not 0 < length <= self._ram.length - start:
            self._note(f"the guest announced {length:#x} bytes at {ipa:#x}: not pages of its RAM")
            return None
        shared = SharedRange(ipa, length, crc & 0xFFFF_FFFF, bool(by_hypercall))
        self.ranges[ipa] = self.latest = shared
        return shared

    def withdraw(self, args: tuple[int, ...]) -> None:
        """Take the guest's ARG0 for memory that it took back."""
        self.taken_back = self.ranges.pop(args[0], None)
        if self.taken_back is None:
            self._note(f"the guest took back {args[0]:#x}, which it had not announced")
        elif self.taken_back == self.latest:
            self.latest = None

    def reply(self, shared: SharedRange) -> None:
        """Read the greeting in the first half of the page and put a reply into the second."""
        start = shared.ipa - self._ram_base
        half = min(shared.length, PAGE_SIZE) // 2
        try:
            content = self._ram.read(start, shared.length)
            if zlib.crc32(content) != shared.crc:
                self._note(f"the page at {shared.ipa:#x} does not have the CRC that the guest gave")
            greeting = content[:half].partition(b"\0")[0]
            text = f"the VMM read {len(greeting)} bytes and greets the guest"
            self._ram.write(start + half, text.encode()[: half - 1] + b"\0")
        except ProtectedPageError as error:
            self._note(f"the guest announced a page that the VMM cannot use: {error.strerror}")

    def _note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text)
