# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2 as the host calls it: hypercalls that raise, and pages that EL2 takes and gives back."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from functools import partial

from pkvm.events import Message, Recorder
from pkvm.host.pages import PageAllocator
from pkvm.host.ports import PAGE_SIZE, Bus, Door
from pkvm.hyp.abi import HOST_CALL_BASE, HostCall

_SIGN = 1 << 63
_WRAP = 1 << 64
DONE = (0, 0)
"""X0 and X1 of a hypercall that was served and has no more to say."""


class El2:
    """The host's hypercalls (facts §9). The kernel lock covers every call."""

    def __init__(self, door: Door, bus: Bus, pages: PageAllocator, recorder: Recorder) -> None:
        self.door = door
        self.run: Callable[[int, int, int], tuple[int, ...]] = partial(
            door, int(HOST_CALL_BASE + HostCall.VCPU_RUN)
        )
        """VCPU_RUN: (flags, X0, list registers) -> registers, `hyp.abi.RunResult`."""
        self.donate: Callable[[int, int, int], tuple[int, ...]] = partial(
            door, int(HOST_CALL_BASE + HostCall.HOST_DONATE_GUEST)
        )
        """HOST_DONATE_GUEST: (pfn, gfn, pages) -> registers, see `value_of`."""
        self._bus = bus
        self._pages = pages
        self._recorder = recorder

    def call(self, call: HostCall, *args: int) -> int:
        """Make a hypercall and return its value. Raises OSError with the errno that EL2 answered,
        ENOSYS if it does not know the call."""
        result = self.try_call(call, *args)
        if result < 0:
            name = errno.errorcode.get(-result, str(-result))
            words = ", ".join(f"{arg:#x}" for arg in args)
            raise OSError(-result, f"EL2 answered {name} to {call.name}({words})")
        return result

    def try_call(self, call: HostCall, *args: int) -> int:
        """Make a hypercall and return its value or a negative errno."""
        return value_of(self.door(HOST_CALL_BASE + call, *args))

    def topup(self, handle: int, nr: int) -> set[int]:
        """Donate `nr` pages to a VM's table-page cache; the PAs that EL2 took.

        Raises ENOMEM if the host has not so many, and EL2's errno; what was not taken is freed.
        """
        pages: list[int] = []
        try:
            while len(pages) < nr:
                pages.append(self._pages.alloc(1))
        except OSError:
            self.free_all(pages)
            raise
        for pa, following in zip(pages, [*pages[1:], 0], strict=True):
            self._bus.write_u64(pa, following)
        taken = self.try_call(HostCall.TOPUP_MEMCACHE, handle, pages[0] if pages else 0, nr)
        if taken < 0:
            self.free_all(pages)
            raise OSError(-taken, f"EL2 took no page of {nr} for the table-page cache")
        self.free_all(pages[taken:])
        return set(pages[:taken])

    def collect(self, head: int, nr: int, donated: set[int]) -> None:
        """Free the pages that EL2 returned as a list of `nr` linked from PA `head`; each must be
        one of `donated`, which shrinks. A list that says otherwise ends the walk."""
        for _ in range(nr):
            if head not in donated:
                break
            following = self._bus.read_u64(head)
            donated.discard(head)
            self._pages.free(head)
            head = following
        if donated:
            self.say(f"EL2 kept {len(donated)} of the pages that the host gave: leaked")

    def free_all(self, pages: Iterable[int]) -> None:
        """Free single pages."""
        for pa in pages:
            self._pages.free(pa)

    def alloc_area(self, length: int) -> list[int]:
        """PAs of the contiguous pages of a new area of `length` bytes, aligned to its size rounded
        up to a power of two, to be donated. Raises ENOMEM."""
        npages = -(-length // PAGE_SIZE)
        base = self._pages.alloc(npages, align=1 << (npages - 1).bit_length())
        return [base + index * PAGE_SIZE for index in range(npages)]

    def say(self, text: str) -> None:
        """printk."""
        self._recorder.record(Message("host", text))


def value_of(registers: tuple[int, ...]) -> int:
    """What a hypercall returned, X0 and X1: its value or a negative errno."""
    result = registers[1]
    if registers[0] & _SIGN:
        return -errno.ENOSYS
    return result - _WRAP if result & _SIGN and result > 0 else result
