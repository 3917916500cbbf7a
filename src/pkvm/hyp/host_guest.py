# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages from the host to guests: donated to protected VMs, shared with non-protected ones.

Which kind of VM a call is for, the door has checked; here the states decide.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION_GFN_SHIFT,
    ATTR_NORMAL_RWX,
    BLOCK_LEVELS,
    LAST_LEVEL,
    PAGE_SHIFT,
    PERMISSION_MASK,
    S2AP_R,
    S2AP_W,
    SW_STATE_SHIFT,
    TABLE_ENTRIES,
    TABLE_OR_PAGE,
    XN_NONE,
    PageState,
    level_shift,
    level_size,
)
from pkvm.events import Transition
from pkvm.hyp.abi import PROT_R, PROT_RWX, PROT_W, PROT_X
from pkvm.hyp.bulk import Frames, Runs, joined, joints, leaves, missing_tables, write
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.ownership import GuestMemory, Ownership, leaf_level, make_event
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    HOST_OWNED,
    HOST_SHARED,
    MAX_SHARE_COUNT,
)

GUEST_PAGE = ATTR_NORMAL_RWX | TABLE_OR_PAGE
_TABLE_SHIFT = level_shift(LAST_LEVEL - 1) - PAGE_SHIFT
_INDEX_MASK = TABLE_ENTRIES - 1
_SW_BORROWED = PageState.SHARED_BORROWED << SW_STATE_SHIFT


class _Donation(NamedTuple):
    """What goes from the host to a guest, by rising gfn: PFN, gfn and pages of each run."""

    pfns: Frames
    gfns: Frames
    npages: Frames

    @property
    def ends(self) -> Frames:
        """The gfn after each run."""
        return self.gfns + self.npages

    def part(self, starts: Frames, ends: Frames) -> _Donation:
        """Of each run the gfns [start, end), which are in it or none."""
        some = starts < ends
        pfns = self.pfns + starts - self.gfns
        return _Donation(pfns[some], starts[some], (ends - starts)[some])

    def at_level(self, level: int) -> Runs:
        """The guest's entries at `level` that the runs, all aligned to it, are."""
        shift = level_shift(level) - PAGE_SHIFT
        return Runs(self.gfns >> shift, self.npages >> shift)


class HostGuest(Ownership):
    """Transitions between host and guests (facts §3.3). Numbers are PFNs, gfns and pages.

    All raise Refused: EINVAL or EPERM by the memory map, EPERM for a wrong state on either
    side, ENOMEM with `pages_needed` when the VM's memcache cannot pay for the tables.
    """

    def host_donate_guest(self, vm: GuestMemory, pfn: int, gfn: int, nr: int) -> None:
        """The host gives `nr` pages to a protected guest, mapped from frame `gfn`, RWX; in
        blocks where both numbers allow. Content stays."""
        if nr != 1:
            with self.lock:
                self._ram_pages(pfn, nr)
                self._check_gfns(vm, gfn, nr)
                run = _Donation(*np.array([[pfn], [gfn], [nr]], np.int64))
                self._donate("host_donate_guest", vm, run)
            return
        # A guest's first touch of a page comes here: in as few steps as possible, if the table
        # that its leaf goes to is known.
        self._take()
        try:
            page = pfn - self._first_pfn
            if not 0 <= page < self._npages:
                self._ram_pages(pfn, 1)
            stage2, words = vm.stage2, self._words
            table = stage2.walks.get(gfn >> _TABLE_SHIFT)
            if table is None:
                self._donate_with_tables(vm, pfn, gfn)
                return
            if self._state[page] != HOST_OWNED:
                raise self._wrong_state(page, HOST_OWNED)
            index = table + (gfn & _INDEX_MASK)
            if words[index]:
                raise self._gfn_taken(vm, gfn)
            ipa, pa = gfn << PAGE_SHIFT, pfn << PAGE_SHIFT
            self.host.take_page(pa, vm.annotation | gfn << ANNOTATION_GFN_SHIFT)
            self._state[page] = GUEST_OWNED
            words[index] = pa | GUEST_PAGE
            stage2.refcount[index >> _TABLE_SHIFT] += 1
            self._record(make_event(Transition, ("host_donate_guest", pa, 1, vm.handle, ipa)))
        finally:
            self._drop()

    def host_donate_guest_list(self, vm: GuestMemory, entries: npt.NDArray[np.uint64]) -> None:
        """Many donations, all or none. `entries` is (n, 3): pfn, gfn, number of pages; EL2's own
        copy of the host's list. Two entries that overlap on either side are refused (EPERM)."""
        if not len(entries):
            return
        with self.lock:
            pfns, gfns, npages = entries.T
            limit = np.uint64(self._frame_limit)
            room = limit - np.minimum(np.maximum(pfns, gfns), limit)
            bad = (npages == 0) | (npages > room) | (pfns < np.uint64(self._first_pfn))
            bad |= pfns + npages > np.uint64(self._first_pfn + self._npages)
            for pfn, gfn, nr in entries[bad].tolist():
                self._ram_pages(pfn, nr)
                self._check_gfns(vm, gfn, nr)
                raise HypBug("two checks of the same list entry disagree")
            self._donate("host_donate_guest_list", vm, _merge(entries.astype(np.int64)))

    def host_share_guest(self, vm: GuestMemory, pfn: int, gfn: int, nr: int, prot: int) -> None:
        """The host lends one page, or one block of 512 (both numbers aligned), to a
        non-protected guest with `prot` (PROT_R, PROT_W, PROT_X), and keeps its own access.

        Raises Refused: EINVAL for other sizes or bits, EBUSY if a page is lent too often.
        """
        level = leaf_level(nr, pfn | gfn)
        if prot & ~PROT_RWX:
            raise Refused(Errno.EINVAL, "prot", f"permissions {prot:#x} are not of R, W, X")
        with self.lock:
            page = self._ram_pages(pfn, nr)
            self._check_gfns(vm, gfn, nr)
            ipa = gfn << PAGE_SHIFT
            _, entry, at = vm.stage2.find(ipa)
            if entry or at > level:
                raise self._gfn_taken(vm, gfn)
            states = self.vmemmap.states[page : page + nr]
            counts = self.vmemmap.share_counts[page : page + nr]
            lent = (states == HOST_SHARED) & (counts > 0)
            wrong = (states != HOST_OWNED) & ~lent
            if wrong.any():
                refused = self._wrong_state(page + int(np.argmax(wrong)), HOST_OWNED)
                refused.errno = Errno.EPERM
                raise refused
            pa = pfn << PAGE_SHIFT
            if (counts == MAX_SHARE_COUNT).any():
                raise Refused(Errno.EBUSY, "share_count", "a page is lent too often", pa=pa)
            self._check_tables(vm, level - at)
            states[:] = HOST_SHARED
            counts += np.uint32(1)
            vm.stage2.put(ipa, pa | _lent_attributes(prot, level), level)
            self._record(Transition("host_share_guest", pa, nr, vm.handle, ipa))

    def host_unshare_guest(self, vm: GuestMemory, gfn: int, nr: int) -> None:
        """The host takes one lent page or block back.

        Raises Refused: EINVAL for other sizes, ENOENT where nothing is mapped, E2BIG if the leaf
        is of another size, EPERM if it is not borrowed.
        """
        level = leaf_level(nr, gfn)
        with self.lock:
            self._check_gfns(vm, gfn, nr)
            ipa = gfn << PAGE_SHIFT
            stage2 = vm.stage2
            _, entry, at = stage2.find(ipa)
            if not entry:
                raise Refused(
                    Errno.ENOENT, "guest_state", "nothing is mapped there", ipa=ipa, vm=vm.handle
                )
            if at != level:
                why = "the mapping is of another size"
                raise Refused(Errno.E2BIG, "leaf_size", why, ipa=ipa, vm=vm.handle)
            state = self._guest_state(entry)
            if state != PageState.SHARED_BORROWED:
                raise self._guest_state_refusal(vm, ipa, state, PageState.SHARED_BORROWED)
            pa = entry & ADDRESS_MASK
            page = self._page_of(pa >> PAGE_SHIFT)
            states = self.vmemmap.states[page : page + nr]
            counts = self.vmemmap.share_counts[page : page + nr]
            if (states != HOST_SHARED).any() or not counts.all():
                raise HypBug(f"the guest borrows PA {pa:#x}, but the host does not lend it")
            stage2.put(ipa, 0, level)
            stage2.invalidate(ipa)
            counts -= np.uint32(1)
            states[counts == 0] = HOST_OWNED
            self._record(Transition("host_unshare_guest", pa, nr, vm.handle, ipa))

    def _donate_with_tables(self, vm: GuestMemory, pfn: int, gfn: int) -> None:
        """`host_donate_guest` of a page in RAM, if tables may be missing on the way to it."""
        self._check_gfns(vm, gfn, 1)
        page = pfn - self._first_pfn
        self._check_states(page, 1, HOST_OWNED)
        ipa, pa = gfn << PAGE_SHIFT, pfn << PAGE_SHIFT
        entry, level = vm.stage2.leaf(ipa)
        if entry:
            raise self._gfn_taken(vm, gfn)
        self._check_tables(vm, LAST_LEVEL - level)
        self.host.take_page(pa, vm.annotation | gfn << ANNOTATION_GFN_SHIFT)
        self._state[page] = GUEST_OWNED
        vm.stage2.put(ipa, pa | GUEST_PAGE)
        self._record(Transition("host_donate_guest", pa, 1, vm.handle, ipa))

    def _donate(self, op: str, vm: GuestMemory, runs: _Donation) -> None:
        """Donate runs whose numbers are good: check the states and the tables, then do it."""
        order = np.argsort(runs.pfns)
        pfns = Runs(runs.pfns[order], runs.npages[order])
        self._check_apart(vm, pfns, "host_state")
        self._check_apart(vm, runs.at_level(LAST_LEVEL), "guest_state")
        pages = joined(Runs(pfns.starts - self._first_pfn, pfns.sizes))
        wrong = self._first_wrong(pages, HOST_OWNED)
        if wrong is not None:
            raise self._wrong_state(wrong, HOST_OWNED)
        self._check_unmapped(vm, runs)
        plan = _plan(runs)
        wanted = [(level, part.at_level(level)) for level, part in plan]
        self._check_tables(vm, missing_tables(vm.stage2, wanted))

        annotations = runs.gfns[order].astype(np.uint64) << np.uint64(ANNOTATION_GFN_SHIFT)
        annotations += np.uint64(vm.annotation)
        self.host.take_runs(pfns, annotations, 1 << ANNOTATION_GFN_SHIFT)
        self._mark(pages, GUEST_OWNED)
        for level, part in plan:
            attributes = GUEST_PAGE if level == LAST_LEVEL else ATTR_NORMAL_RWX
            firsts = (part.pfns << PAGE_SHIFT).astype(np.uint64) | np.uint64(attributes)
            write(vm.stage2, part.at_level(level), firsts, level_size(level), level)
        record, handle = self._record, vm.handle
        columns = (runs.pfns << PAGE_SHIFT, runs.npages, runs.gfns << PAGE_SHIFT)
        for pa, nr, ipa in zip(*(column.tolist() for column in columns), strict=True):
            record(Transition(op, pa, nr, handle, ipa))

    def _check_apart(self, vm: GuestMemory, runs: Runs, check: str) -> None:
        """Refuse (EPERM) runs, which rise, of which two share a page: the second would find it
        given away."""
        meets = runs.ends[:-1] > runs.starts[1:]
        if meets.any():
            why = f"frame {int(runs.starts[1:][np.argmax(meets)]):#x} is in the list twice"
            raise Refused(Errno.EPERM, check, why, vm=vm.handle)

    def _check_unmapped(self, vm: GuestMemory, runs: _Donation) -> None:
        """Refuse (EPERM) runs, which are apart, if the guest has anything mapped in them."""
        ends = runs.ends
        first = int(runs.gfns[0])
        found = leaves(vm.stage2, first, int(ends[-1]) - first)
        nearest = np.searchsorted(runs.gfns, found.frames + found.npages) - 1
        taken = (nearest >= 0) & (ends[nearest] > found.frames)
        if taken.any():
            at = int(np.argmax(taken))
            raise self._gfn_taken(vm, max(int(found.frames[at]), int(runs.gfns[nearest[at]])))

    def _gfn_taken(self, vm: GuestMemory, gfn: int) -> Refused:
        why = "something is mapped there already"
        ipa = gfn << PAGE_SHIFT
        return Refused(Errno.EPERM, "guest_state", why, ipa=ipa, vm=vm.handle)


def _lent_attributes(prot: int, level: int) -> int:
    """Descriptor bits of a borrowed leaf with `prot`."""
    attr = ATTR_NORMAL_RWX & ~PERMISSION_MASK | _SW_BORROWED
    if level == LAST_LEVEL:
        attr |= TABLE_OR_PAGE
    if prot & PROT_R:
        attr |= S2AP_R
    if prot & PROT_W:
        attr |= S2AP_W
    if not prot & PROT_X:
        attr |= XN_NONE
    return attr


def _merge(entries: Frames) -> _Donation:
    """A list by rising gfn, entries that continue each other on both sides made one."""
    entries = entries[np.argsort(entries[:, 1], kind="stable")]
    pfns, gfns, npages = entries[:, 0], entries[:, 1], entries[:, 2]
    starts = joints(npages, pfns, gfns)
    return _Donation(pfns[starts], gfns[starts], np.add.reduceat(npages, starts))


def _plan(runs: _Donation) -> list[tuple[int, _Donation]]:
    """How a donation is mapped in the guest: at each level the runs that its leaves make. Blocks
    are where a run covers one with both numbers aligned alike."""
    plan = []
    for level in BLOCK_LEVELS:
        size = level_size(level) >> PAGE_SHIFT
        starts, ends = -(-runs.gfns // size) * size, runs.ends // size * size
        fits = ((runs.pfns - runs.gfns) % size == 0) & (starts < ends)
        if fits.any():
            plan.append((level, runs.part(starts, np.where(fits, ends, starts))))
            heads = runs.part(runs.gfns, np.where(fits, starts, runs.ends))
            tails = runs.part(np.where(fits, ends, runs.ends), runs.ends)
            rest = np.concatenate((heads, tails), axis=1)
            runs = _Donation(*rest[:, np.argsort(rest[1])])
    if runs.gfns.size:
        plan.append((LAST_LEVEL, runs))
    return plan
