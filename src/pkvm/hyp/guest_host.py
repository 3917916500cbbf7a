# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that a protected guest shares with the host, and takes back (facts §3.3, §3.4).

Ranges, at most 256 pages a call: the guest gets the number done and calls again
for the rest. What a call looks at it does whole or not at all. A block is split
first, all 512 pages keeping their state, so that sharing one page gives away no
other. Content is neither wiped nor copied in either direction.
"""

from __future__ import annotations

import numpy as np

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION_GFN_SHIFT,
    LAST_LEVEL,
    PAGE_MASK,
    PAGE_SHIFT,
    SW_STATE_MASK,
    SW_STATE_SHIFT,
    TABLE_ENTRIES,
    VALID,
    PageState,
    level_shift,
)
from pkvm.events import Transition
from pkvm.hyp.bulk import (
    Frames,
    Leaves,
    Runs,
    leaves,
    page_entries,
    runs_in,
    runs_of,
    splits_to_pages,
)
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.ownership import GuestMemory, Ownership, make_event
from pkvm.hyp.vmemmap import GUEST_OWNED, GUEST_SHARED_WITH_HOST

MAX_PAGES_A_CALL = 256
_LIMIT = 1 << 64
_REGION_SHIFT = level_shift(LAST_LEVEL - 1)
_INDEX_MASK = TABLE_ENTRIES - 1
_SHARED = PageState.SHARED_OWNED << SW_STATE_SHIFT
_LEAF_MASK = VALID | SW_STATE_MASK


class GuestHost(Ownership):
    """What a guest does with its own pages. `ipa` is a byte address, `nr` counts pages; both are
    the guest's numbers. Both calls return the pages done, min(nr, 256).

    They raise Refused: EINVAL (not aligned, none, wrapping), ERANGE (beyond the IPA space), EFAULT
    (upstream: ENOENT; a page is not mapped, and the refusal's `ipa` says which), EHWPOISON (the
    host took it by force), EPERM (a page is in another state), EBUSY (mapped for DMA), ENOMEM with
    `pages_needed` (no table page to split a block).
    """

    def guest_share_host(self, vm: GuestMemory, ipa: int, nr: int) -> int:
        """Let the host, and its devices, into pages that the guest owns."""
        # One page is what nearly every call is about. Its way is spelt out, in as few calls as
        # possible: the table that its leaf is in is known, and so is nothing to be split.
        self._take()
        try:
            first = vm.stage2.walks.get(ipa >> _REGION_SHIFT)
            if nr == 1 and first is not None and not ipa & PAGE_MASK:
                index = first + (ipa >> PAGE_SHIFT & _INDEX_MASK)
                entry = self._words[index]
                if entry & _LEAF_MASK == VALID:
                    pa = entry & ADDRESS_MASK
                    page = (pa >> PAGE_SHIFT) - self._first_pfn
                    if self._state[page] != GUEST_OWNED:
                        raise self._wrong_state(page, GUEST_OWNED)
                    if self._refcount[page]:
                        raise self._pinned(vm, ipa)
                    self.host.give_page(pa)
                    self._state[page] = GUEST_SHARED_WITH_HOST
                    self._words[index] = entry | _SHARED
                    event = ("guest_share_host", pa, 1, vm.handle, ipa)
                    self._record(make_event(Transition, event))
                    return 1
            return self._share_range(vm, ipa, nr)
        finally:
            self._drop()

    def guest_unshare_host(self, vm: GuestMemory, ipa: int, nr: int) -> int:
        """Take shared pages back: neither the host nor a device reaches them any more."""
        self._take()
        try:
            first = vm.stage2.walks.get(ipa >> _REGION_SHIFT)
            if nr == 1 and first is not None and not ipa & PAGE_MASK:
                index = first + (ipa >> PAGE_SHIFT & _INDEX_MASK)
                entry = self._words[index]
                if entry & _LEAF_MASK == VALID | _SHARED:
                    pa = entry & ADDRESS_MASK
                    page = (pa >> PAGE_SHIFT) - self._first_pfn
                    if self._state[page] != GUEST_SHARED_WITH_HOST:
                        raise self._wrong_state(page, GUEST_SHARED_WITH_HOST)
                    gfn = ipa >> PAGE_SHIFT
                    self.host.take_page(pa, vm.annotation | gfn << ANNOTATION_GFN_SHIFT)
                    self._state[page] = GUEST_OWNED
                    self._words[index] = entry ^ _SHARED
                    event = ("guest_unshare_host", pa, 1, vm.handle, ipa)
                    self._record(make_event(Transition, event))
                    return 1
            return self._unshare_range(vm, ipa, nr)
        finally:
            self._drop()

    def _share_range(self, vm: GuestMemory, ipa: int, nr: int) -> int:
        gfn, nr = self._guest_range(vm, ipa, nr)
        pfns = self._guest_pages(vm, gfn, nr, PageState.OWNED, GUEST_OWNED)
        self.host.give_runs(runs_in(np.sort(pfns)))
        self.vmemmap.states[pfns - self._first_pfn] = GUEST_SHARED_WITH_HOST
        self._set_states("guest_share_host", vm, gfn, pfns, _SHARED)
        return nr

    def _unshare_range(self, vm: GuestMemory, ipa: int, nr: int) -> int:
        gfn, nr = self._guest_range(vm, ipa, nr)
        pfns = self._guest_pages(vm, gfn, nr, PageState.SHARED_OWNED, GUEST_SHARED_WITH_HOST)
        first = np.uint64(vm.annotation | gfn << ANNOTATION_GFN_SHIFT)
        steps = np.arange(nr, dtype=np.uint64) << np.uint64(ANNOTATION_GFN_SHIFT)
        order = np.argsort(pfns)
        single = Runs(pfns[order], np.ones(nr, np.int64))
        self.host.take_runs(single, (first + steps)[order], 0)
        self.vmemmap.states[pfns - self._first_pfn] = GUEST_OWNED
        self._set_states("guest_unshare_host", vm, gfn, pfns, 0)
        return nr

    def _guest_range(self, vm: GuestMemory, ipa: int, nr: int) -> tuple[int, int]:
        """(gfn, pages to look at now) of the guest's numbers."""
        if ipa & PAGE_MASK:
            why = "the address is not that of a page"
            raise Refused(Errno.EINVAL, "alignment", why, ipa=ipa, vm=vm.handle)
        if nr <= 0 or nr > _LIMIT >> PAGE_SHIFT or ipa + (nr << PAGE_SHIFT) > _LIMIT:
            why = f"no {nr} pages can start there"
            raise Refused(Errno.EINVAL, "gfn_range", why, ipa=ipa, vm=vm.handle)
        if ipa + (nr << PAGE_SHIFT) > self._frame_limit << PAGE_SHIFT:
            why = "the range is beyond the VM's space"
            raise Refused(Errno.ERANGE, "ipa_range", why, ipa=ipa, vm=vm.handle)
        return ipa >> PAGE_SHIFT, min(nr, MAX_PAGES_A_CALL)

    def _guest_pages(
        self, vm: GuestMemory, gfn: int, nr: int, state: PageState, host_states: int
    ) -> Frames:
        """PFNs of `nr` pages from `gfn`, all of them in `state` to the guest and `host_states`
        to the others, in last-level leaves: blocks are split here, after everything is checked."""
        stage2 = vm.stage2
        found = leaves(stage2, gfn, nr)
        self._check_guest_states(vm, gfn, nr, found, state)
        frames, pfns = page_entries(found)
        inside = (frames >= gfn) & (frames < gfn + nr)
        pfns = pfns[inside]
        pages = self._pages_of(pfns)
        wrong = self.vmemmap.states[pages] != host_states
        if wrong.any():
            raise self._wrong_state(int(pages[np.argmax(wrong)]), host_states)
        pinned = self.vmemmap.refcounts[pages] != 0
        if pinned.any():
            raise self._pinned(vm, gfn + int(np.argmax(pinned)) << PAGE_SHIFT)
        splits = splits_to_pages(stage2, gfn, nr)
        self._check_tables(vm, len(splits))
        for ipa in splits:
            stage2.split(ipa)
        return pfns

    def _pinned(self, vm: GuestMemory, ipa: int) -> Refused:
        why = "the page is mapped for DMA"
        return Refused(Errno.EBUSY, "refcount", why, ipa=ipa, vm=vm.handle)

    def _check_guest_states(
        self, vm: GuestMemory, gfn: int, nr: int, found: Leaves, wanted: PageState
    ) -> None:
        """Refuse unless the leaves cover the range and are all in the state `wanted`."""
        at = gfn
        for frame, entry, npages in zip(
            found.frames.tolist(), found.entries.tolist(), found.npages.tolist(), strict=True
        ):
            if frame > at:
                break
            state = self._guest_state(entry)
            if state != wanted:
                raise self._guest_state_refusal(vm, at << PAGE_SHIFT, state, wanted)
            at = frame + npages
        if at < gfn + nr:
            raise self._guest_state_refusal(vm, at << PAGE_SHIFT, PageState.NOPAGE, wanted)

    def _set_states(self, op: str, vm: GuestMemory, gfn: int, pfns: Frames, state: int) -> None:
        """Set the software bits of last-level leaves, and announce `op` for each run of pages."""
        stage2 = vm.stage2
        for frame in range(gfn, gfn + pfns.size):
            index, entry, _ = stage2.find(frame << PAGE_SHIFT)
            stage2.set_state(index, entry, state)
        for offset, pfn, nr in runs_of(pfns):
            ipa = gfn + offset << PAGE_SHIFT
            self._record(Transition(op, pfn << PAGE_SHIFT, nr, vm.handle, ipa))
