# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests for the fake kernel."""

from __future__ import annotations

import zlib

from fakes.fake_kernel import PAGE, FakeKernel, Guest, Store, power_off
from pkvm.guests.protocol import MAILBOX_BASE, Event, Mailbox
from pkvm.vmm.board import RAM_BASE, UART_BASE

SHARED_OFFSET = 0x30_0000
SHARED_IPA = RAM_BASE + SHARED_OFFSET
GREETING = b"hello from the guest\0"


def say(text: str) -> Guest:
    for byte in text.encode():
        yield Store(UART_BASE, byte, 1)


def announce(event: int, *args: int) -> Guest:
    for n, value in enumerate(args):
        yield Store(MAILBOX_BASE + Mailbox.ARG + 8 * n, value, 8)
    yield Store(MAILBOX_BASE, event, 8)


class SharingGuest:
    """What the demonstration's payload does; `lie` changes what it says."""

    def __init__(self) -> None:
        self.kernel = FakeKernel(self.program)
        self.reply = b""
        self.lie: dict[str, int] = {}

    def program(self, _: int) -> Guest:
        ram = self.kernel.memories[0]
        protected = ram.protected
        yield from say("sharing\n")
        ram.bytes[SHARED_OFFSET : SHARED_OFFSET + len(GREETING)] = GREETING
        content = ram.bytes[SHARED_OFFSET : SHARED_OFFSET + PAGE]
        if self.lie.get("share", 1):
            ram.shared.add(SHARED_OFFSET)
        yield from announce(
            Event.SHARED,
            self.lie.get("ipa", SHARED_IPA),
            self.lie.get("length", PAGE),
            self.lie.get("crc", zlib.crc32(content)),
            self.lie.get("by_hypercall", int(protected)),
        )
        half = SHARED_OFFSET + PAGE // 2
        self.reply = bytes(ram.bytes[half : half + 128]).partition(b"\0")[0]
        ram.shared.discard(SHARED_OFFSET)
        yield from announce(Event.UNSHARED, self.lie.get("ipa", SHARED_IPA), PAGE)
        yield power_off()
