# SPDX-License-Identifier: GPL-2.0-or-later
"""One 8-byte record a page of RAM: who may do what with it (facts §3.1).

A record, little-endian: u16 refcount; u8 order (a buddy allocator's, always 0
here); u8 with the host's state in its low half and the complement of EL2's
state in its high half; u32 number of mappings in non-protected VMs. So a record
of zeroes means: the host owns the page and EL2 has no access.

The two states of a page change together, hence the ready-made pairs below.
Guests' states are not here but in their stage-2 leaves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import PAGE_SHIFT, PageState
from pkvm.machine.memory import PhysicalMemory

RECORD_BYTES = 8
MAX_REFCOUNT = 0xFFFF
MAX_SHARE_COUNT = 0xFFFF_FFFF
_STATE_BITS = 3
"""Only OWNED to NOPAGE are stored: the complement is taken of two bits."""


def pair(host: PageState, hyp: PageState) -> int:
    """The state byte for what the host and EL2 are to the page. POISON is a guest's state only."""
    return host | (hyp ^ _STATE_BITS) << 4


def host_state(states: int) -> PageState:
    """The host's half of a state byte, whether it is pinned or not."""
    return PageState(states & 0x7)


def hyp_state(states: int) -> PageState:
    """EL2's half of a state byte."""
    return PageState(states >> 4 ^ _STATE_BITS)


HOST_OWNED = pair(PageState.OWNED, PageState.NOPAGE)
HOST_PINNED = HOST_OWNED | 8
"""The host's own, and mapped for DMA as often as the refcount says (facts §3.8, §10): to nobody
else it can be anything, so each transition that wants HOST_OWNED refuses it."""
HYP_OWNED = pair(PageState.NOPAGE, PageState.OWNED)
HOST_SHARED_WITH_HYP = pair(PageState.SHARED_OWNED, PageState.SHARED_BORROWED)
HOST_SHARED = pair(PageState.SHARED_OWNED, PageState.NOPAGE)
"""Lent to non-protected VMs, the record's count says to how many; or, with a count of 0, to the
secure world."""
GUEST_OWNED = pair(PageState.NOPAGE, PageState.NOPAGE)
"""A protected guest's private page: neither the host nor EL2 has a state for it."""
SECURE_OWNED = GUEST_OWNED | 8
"""Lent to the secure world, which has it for itself."""
GUEST_SHARED_WITH_HOST = pair(PageState.SHARED_BORROWED, PageState.NOPAGE)


def vmemmap_bytes(ram_bytes: int) -> int:
    """Bytes of the records for `ram_bytes` of RAM."""
    return (ram_bytes >> PAGE_SHIFT) * RECORD_BYTES


class Vmemmap:
    """The records of all RAM, at PA `base` in EL2's carve-out (8-byte aligned).

    Everything is indexed by page number within RAM, (PA - ram_base) >> 12; whoever has a number
    from outside checks it first. Items of the memoryviews are for single pages, the numpy views
    for many. Raises BusError if the records do not fit in RAM.
    """

    def __init__(self, memory: PhysicalMemory, base: int) -> None:
        size = vmemmap_bytes(memory.ram_bytes)
        records = memory.span(base, size)
        start = (base - memory.ram_base) >> 3
        octets = memory.words[start : start + (size >> 3)].cast("B")
        self.base = base
        self.npages = memory.ram_bytes >> PAGE_SHIFT
        self.state: memoryview[int] = octets[3::RECORD_BYTES]
        """State byte of a page: see `pair`."""
        self.refcount: memoryview[int] = octets.cast("H")[::4]
        self.share_count: memoryview[int] = octets.cast("I")[1::2]
        self.records: npt.NDArray[np.uint64] = records
        self.states: npt.NDArray[np.uint8] = records.view(np.uint8)[3::RECORD_BYTES]
        self.refcounts: npt.NDArray[np.uint16] = records.view(np.uint16)[::4]
        self.share_counts: npt.NDArray[np.uint32] = records.view(np.uint32)[1::2]
