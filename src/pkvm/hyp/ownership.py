# SPDX-License-Identifier: GPL-2.0-or-later
"""What every transition of ownership stands on: the state it works on, and its checks.

The order of checks is facts §3.2: numbers (EINVAL), memory map (EINVAL for a
range that straddles its end, EPERM for what is not RAM), states (EPERM),
refcounts (EBUSY), table pages (ENOMEM). Only then does anything change.

One lock covers the host's, EL2's and all guests' memory. Upstream has one for
each, always taken in that order; with one, a transition cannot see another half
done. Whoever also locks the table of VMs takes that one first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import (
    ANNOTATION_POISONED,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    SW_STATE_MASK,
    SW_STATE_SHIFT,
    TABLE_ENTRIES,
    VALID,
    PageState,
)
from pkvm.events import Recorder
from pkvm.hyp.bulk import Runs
from pkvm.hyp.devices import DeviceTable
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.host_memory import HostMemory
from pkvm.hyp.memcache import Memcache
from pkvm.hyp.memory_policy import MemoryPolicy
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.pool import ZERO_PAGE
from pkvm.hyp.vmemmap import HOST_OWNED, HOST_PINNED, Vmemmap, host_state, hyp_state
from pkvm.machine.memory import PhysicalMemory

_LEVEL_OF_PAGES = {1: LAST_LEVEL, TABLE_ENTRIES: LAST_LEVEL - 1}


def leaf_level(nr: int, numbers: int) -> int:
    """The level of a leaf of `nr` pages. Raises Refused(EINVAL) if there is none, or if `numbers`
    (frames, or'ed) are not aligned to it."""
    level = _LEVEL_OF_PAGES.get(nr)
    if level is None or numbers % nr:
        raise Refused(Errno.EINVAL, "size", "neither one page nor one aligned block of 512")
    return level


class GuestMemory(Protocol):
    """What a VM must have so that memory can change hands with it; the VM object implements it."""

    @property
    def handle(self) -> int:
        """EL2's handle, 0x1000 + index."""
        ...

    @property
    def annotation(self) -> int:
        """What stands in the host's stage-2 for its page at frame 0: `guest_annotation`."""
        ...

    @property
    def stage2(self) -> Stage2:
        """The guest's stage-2, made by `MemProtect.new_guest_stage2`."""
        ...

    @property
    def memcache(self) -> Memcache:
        """The source of its tables, made by `MemProtect.new_memcache`."""
        ...


make_event = tuple.__new__
"""An event, as its class makes it, but without another Python call: for what is done page by page.
"""


class Ownership:
    """The state of all memory, and the checks that the transitions share."""

    def __init__(
        self,
        memory: PhysicalMemory,
        vmemmap: Vmemmap,
        host: HostMemory,
        *,
        ipa_bits: int,
        parange: int,
        invalidate_code: Callable[[int, int], None],
        recorder: Recorder,
        policy: MemoryPolicy,
        devices: DeviceTable,
    ) -> None:
        self.memory = memory
        self.vmemmap = vmemmap
        self.host = host
        self.devices = devices
        self.parange = parange
        self.lock = threading.RLock()
        self._take, self._drop = self.lock.acquire, self.lock.release
        self.policy = policy
        self._record = recorder.record
        self._invalidate_code = invalidate_code
        self._state = vmemmap.state
        self._refcount = vmemmap.refcount
        self._words = memory.words
        self._first_pfn = memory.ram_base >> PAGE_SHIFT
        self._npages = vmemmap.npages
        self._frame_limit = 1 << ipa_bits - PAGE_SHIFT
        """Frames of the PA space, and of every IPA space: a guest's is as large."""

    def zero(self, pa: int, nbytes: int) -> None:
        """Zero RAM [pa, pa+nbytes) (multiples of 8), and forget code translated from it."""
        if nbytes == PAGE_SIZE:
            first = (pa - self.memory.ram_base) >> 3
            self._words[first : first + TABLE_ENTRIES] = ZERO_PAGE
        else:
            self.memory.zero(pa, nbytes)
        self._invalidate_code(pa, nbytes)

    def _ram_pages(self, pfn: int, nr: int) -> int:
        """Page number within RAM of `pfn`, the first of `nr`, numbers from outside.

        Raises Refused: EINVAL for numbers beyond the PA space and for a range that is RAM only
        in part, EPERM (Android: EINVAL) for what is not RAM.
        """
        if not (0 <= pfn < self._frame_limit and 0 < nr <= self._frame_limit - pfn):
            raise Refused(Errno.EINVAL, "pfn_range", f"no {nr} pages can start at frame {pfn:#x}")
        page = pfn - self._first_pfn
        if page < 0 or page + nr > self._npages:
            pa = pfn << PAGE_SHIFT
            if page + nr <= 0 or page >= self._npages:
                raise Refused(self.policy.not_ram, "ram_range", "only RAM can change owner", pa=pa)
            raise Refused(Errno.EINVAL, "ram_range", "the range is RAM only in part", pa=pa)
        return page

    def _check_gfns(self, vm: GuestMemory, gfn: int, nr: int) -> None:
        """Refuse (EINVAL) `nr` frames from `gfn` that are not in the IPA space."""
        if not (0 <= gfn < self._frame_limit and 0 < nr <= self._frame_limit - gfn):
            why = f"no {nr} pages can start at guest frame {gfn:#x}"
            raise Refused(Errno.EINVAL, "gfn_range", why, vm=vm.handle)

    def _check_states(self, page: int, nr: int, expected: int) -> None:
        """Refuse (EPERM) unless each of `nr` pages has the state byte `expected`."""
        if nr == 1:
            if self._state[page] != expected:
                raise self._wrong_state(page, expected)
            return
        states = self.vmemmap.states[page : page + nr]
        wrong = states != expected
        if wrong.any():
            raise self._wrong_state(page + int(np.argmax(wrong)), expected)

    def _states_of(self, pages: Runs) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """The state bytes from the first of these pages to the last, and which are theirs."""
        bounds = np.column_stack((pages.starts, pages.ends)).ravel()
        is_run = np.arange(bounds.size - 1) % 2 == 0
        states = self.vmemmap.states[bounds[0] : bounds[-1]]
        return states, np.repeat(is_run, np.diff(bounds))

    def _first_wrong(self, pages: Runs, expected: int) -> int | None:
        """The lowest of these pages whose state byte is not `expected`, if any."""
        states, inside = self._states_of(pages)
        wrong = inside & (states != expected)
        return int(pages.starts[0]) + int(np.argmax(wrong)) if wrong.any() else None

    def _mark(self, pages: Runs, new: int) -> None:
        """Give each of these pages the state byte `new`."""
        states, inside = self._states_of(pages)
        np.copyto(states, np.uint8(new), where=inside)

    def _wrong_state(self, page: int, expected: int) -> Refused:
        """The refusal for a page whose state byte is not `expected`."""
        states = self._state[page]
        pa = page + self._first_pfn << PAGE_SHIFT
        if states == HOST_PINNED and expected == HOST_OWNED:
            errno = self.policy.pinned
            return Refused(errno, "refcount", "the page is mapped for DMA", pa=pa)
        check, is_state, must_be = "host_state", host_state(states), host_state(expected)
        if is_state == must_be:
            check, is_state, must_be = "hyp_state", hyp_state(states), hyp_state(expected)
        side = "the host" if check == "host_state" else "EL2"
        why = f"to {side} the page is {is_state.name}, not {must_be.name}"
        return Refused(Errno.EPERM, check, why, pa=pa)

    def _check_tables(self, vm: GuestMemory, needed: int) -> None:
        """Refuse (ENOMEM) unless the VM's memcache has `needed` pages."""
        missing = needed - vm.memcache.available
        if missing > 0:
            raise Refused(
                Errno.ENOMEM,
                "memcache",
                f"{missing} more table pages are needed",
                vm=vm.handle,
                pages_needed=missing,
            )

    def _guest_state_refusal(
        self, vm: GuestMemory, ipa: int, state: PageState, wanted: PageState
    ) -> Refused:
        """EFAULT (upstream: ENOENT) for a guest page that is not mapped, EHWPOISON for a poisoned
        one, EPERM for one in another state."""
        errno = Errno.EPERM
        if state == PageState.NOPAGE:
            errno = self.policy.unmapped
        elif state == PageState.POISON:
            errno = Errno.EHWPOISON
        why = f"to the guest the page is {state.name}, not {wanted.name}"
        return Refused(errno, "guest_state", why, ipa=ipa, vm=vm.handle)

    @staticmethod
    def _guest_state(entry: int) -> PageState:
        """What the guest's stage-2 says of a page by the entry where its walk ends."""
        if entry & VALID:
            return PageState((entry & SW_STATE_MASK) >> SW_STATE_SHIFT)
        return PageState.POISON if entry == ANNOTATION_POISONED else PageState.NOPAGE

    def _split_to_page(self, vm: GuestMemory, ipa: int, level: int) -> tuple[int, int]:
        """Have the guest's leaf at `ipa`, of `level` and valid, be one of a page: its index and
        itself. Raises Refused(ENOMEM) with `pages_needed`; the last check before anything changes.
        """
        stage2 = vm.stage2
        self._check_tables(vm, LAST_LEVEL - level)
        for _ in range(level, LAST_LEVEL):
            stage2.split(ipa)
        index, entry, _ = stage2.find(ipa)
        return index, entry

    def _page_of(self, pfn: int) -> int:
        """Page number within RAM of a PFN that EL2 itself wrote into a table."""
        page = pfn - self._first_pfn
        if not 0 <= page < self._npages:
            raise HypBug(f"frame {pfn:#x} in a stage-2 table is not RAM")
        return page

    def _pages_of(self, pfns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """As `_page_of`, for many."""
        pages = pfns - self._first_pfn
        if pages.min() < 0 or pages.max() >= self._npages:
            raise HypBug("a frame in a stage-2 table is not RAM")
        return pages
