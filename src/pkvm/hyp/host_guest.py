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
    SW_STATE_MASK,
    SW_STATE_SHIFT,
    TABLE_ENTRIES,
    TABLE_OR_PAGE,
    XN_NONE,
    PageState,
    guest_annotation,
    level_shift,
)
from pkvm.events import Transition
from pkvm.hyp.abi import PROT_R, PROT_RWX, PROT_W, PROT_X
from pkvm.hyp.bulk import Frames, index_of, leaves, missing_tables, regions_of, write_pages
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.ownership import GuestMemory, Ownership
from pkvm.hyp.vmemmap import (
    GUEST_OWNED,
    HOST_OWNED,
    HOST_SHARED_WITH_GUEST,
    MAX_SHARE_COUNT,
)

GUEST_PAGE = ATTR_NORMAL_RWX | TABLE_OR_PAGE
_GFN_SHIFT = np.uint64(ANNOTATION_GFN_SHIFT)
_SW_BORROWED = PageState.SHARED_BORROWED << SW_STATE_SHIFT
_LEVEL_OF_PAGES = {1: LAST_LEVEL, TABLE_ENTRIES: LAST_LEVEL - 1}


class _Runs(NamedTuple):
    """Donations by rising gfn, adjacent ones merged: PFNs, gfns, pages of each."""

    pfns: Frames
    gfns: Frames
    npages: Frames


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
                self._donate("host_donate_guest", vm, _run(pfn, gfn, nr))
            return
        with self.lock:
            page = self._ram_pages(pfn, 1)
            self._check_gfns(vm, gfn, 1)
            self._check_states(page, 1, HOST_OWNED)
            ipa = gfn << PAGE_SHIFT
            stage2 = vm.stage2
            _, entry, level = stage2.find(ipa)
            if entry:
                raise self._gfn_taken(vm, gfn)
            self._check_tables(vm, LAST_LEVEL - level)
            pa = pfn << PAGE_SHIFT
            self.host.take_page(pa, guest_annotation(vm.handle, gfn))
            self._state[page] = GUEST_OWNED
            stage2.put(ipa, pa | GUEST_PAGE)
            self._record(Transition("host_donate_guest", pa, 1, vm.handle, ipa))

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
        level = self._level_of(nr, pfn | gfn)
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
            lent = (states == HOST_SHARED_WITH_GUEST) & (counts > 0)
            wrong = (states != HOST_OWNED) & ~lent
            if wrong.any():
                raise self._wrong_state(page + int(np.argmax(wrong)), HOST_OWNED)
            pa = pfn << PAGE_SHIFT
            if (counts == MAX_SHARE_COUNT).any():
                raise Refused(Errno.EBUSY, "share_count", "a page is lent too often", pa=pa)
            self._check_tables(vm, level - at)
            states[:] = HOST_SHARED_WITH_GUEST
            counts += np.uint32(1)
            vm.stage2.put(ipa, pa | _lent_attributes(prot, level), level)
            self._record(Transition("host_share_guest", pa, nr, vm.handle, ipa))

    def host_unshare_guest(self, vm: GuestMemory, gfn: int, nr: int) -> None:
        """The host takes one lent page or block back.

        Raises Refused: EINVAL for other sizes, ENOENT where nothing is mapped, E2BIG if the leaf
        is of another size, EPERM if it is not borrowed.
        """
        level = self._level_of(nr, gfn)
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
            state = PageState((entry & SW_STATE_MASK) >> SW_STATE_SHIFT)
            if state != PageState.SHARED_BORROWED:
                raise self._guest_state_refusal(vm, ipa, state, PageState.SHARED_BORROWED)
            pa = entry & ADDRESS_MASK
            page = self._page_of(pa >> PAGE_SHIFT)
            states = self.vmemmap.states[page : page + nr]
            counts = self.vmemmap.share_counts[page : page + nr]
            if (states != HOST_SHARED_WITH_GUEST).any() or not counts.all():
                raise HypBug(f"the guest borrows PA {pa:#x}, but the host does not lend it")
            stage2.put(ipa, 0, level)
            stage2.invalidate(ipa)
            counts -= np.uint32(1)
            states[counts == 0] = HOST_OWNED
            self._record(Transition("host_unshare_guest", pa, nr, vm.handle, ipa))

    def _donate(self, op: str, vm: GuestMemory, runs: _Runs) -> None:
        """Donate runs whose numbers are good: check the states and the tables, then do it."""
        self._check_apart(vm, runs)
        pfns, gfns = _single_pages(runs)
        order = slice(None) if len(runs.pfns) == 1 else np.argsort(pfns)
        rising = pfns[order]
        pages = index_of(rising - self._first_pfn)
        wrong = self.vmemmap.states[pages] != HOST_OWNED
        if wrong.any():
            raise self._wrong_state(int(rising[np.argmax(wrong)]) - self._first_pfn, HOST_OWNED)
        self._check_unmapped(vm, runs)
        blocks, single = _plan(runs)
        regions = [region.number for region in regions_of(gfns[single])]
        at_levels = [(gfn, level) for gfn, _, level in blocks]
        self._check_tables(vm, missing_tables(vm.stage2, regions, at_levels))

        annotations = gfns.astype(np.uint64)
        annotations <<= _GFN_SHIFT
        annotations += np.uint64(guest_annotation(vm.handle, 0))
        self.host.take_pages(rising, annotations[order])
        self.vmemmap.states[pages] = GUEST_OWNED
        for gfn, pfn, level in blocks:
            vm.stage2.put(gfn << PAGE_SHIFT, pfn << PAGE_SHIFT | ATTR_NORMAL_RWX, level)
        addresses = pfns[single].astype(np.uint64) << np.uint64(PAGE_SHIFT)
        write_pages(vm.stage2, gfns[single], addresses | np.uint64(GUEST_PAGE))
        for pfn, gfn, nr in zip(*(column.tolist() for column in runs), strict=True):
            self._record(Transition(op, pfn << PAGE_SHIFT, nr, vm.handle, gfn << PAGE_SHIFT))

    def _check_apart(self, vm: GuestMemory, runs: _Runs) -> None:
        """Refuse (EPERM) runs of which two share a page: the second would find it given away."""
        for starts, check in ((runs.pfns, "host_state"), (runs.gfns, "guest_state")):
            order = np.argsort(starts)
            ends = (starts + runs.npages)[order]
            meets = ends[:-1] > starts[order][1:]
            if meets.any():
                frame = int(starts[order][1:][np.argmax(meets)])
                why = f"frame {frame:#x} is in the list twice"
                raise Refused(Errno.EPERM, check, why, vm=vm.handle)

    def _check_unmapped(self, vm: GuestMemory, runs: _Runs) -> None:
        """Refuse (EPERM) runs, which are apart, if the guest has anything mapped in them."""
        ends = runs.gfns + runs.npages
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

    @staticmethod
    def _level_of(nr: int, numbers: int) -> int:
        """The level of a leaf of `nr` pages. Refused (EINVAL) if there is none, or if `numbers`
        are not aligned to it."""
        level = _LEVEL_OF_PAGES.get(nr)
        if level is None or numbers % nr:
            raise Refused(Errno.EINVAL, "size", "neither one page nor one aligned block of 512")
        return level


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


def _run(pfn: int, gfn: int, nr: int) -> _Runs:
    return _Runs(*(np.array([number], np.int64) for number in (pfn, gfn, nr)))


def _merge(entries: Frames) -> _Runs:
    """Runs by rising gfn, those that continue each other on both sides made one."""
    entries = entries[np.argsort(entries[:, 1], kind="stable")]
    pfns, gfns, npages = entries[:, 0], entries[:, 1], entries[:, 2]
    joins = (gfns[1:] == (gfns + npages)[:-1]) & (pfns[1:] == (pfns + npages)[:-1])
    starts = np.flatnonzero(np.concatenate(([True], ~joins)))
    return _Runs(pfns[starts], gfns[starts], np.add.reduceat(npages, starts))


def _single_pages(runs: _Runs) -> tuple[Frames, Frames]:
    """PFN and gfn of every page of the runs."""
    pfns, gfns, npages = runs
    if len(npages) == 1:
        nr = int(npages[0])
        return np.arange(pfns[0], pfns[0] + nr), np.arange(gfns[0], gfns[0] + nr)
    ends = np.cumsum(npages)
    offsets = np.arange(ends[-1])
    starts = ends - npages
    return offsets + np.repeat(pfns - starts, npages), offsets + np.repeat(gfns - starts, npages)


def _plan(runs: _Runs) -> tuple[list[tuple[int, int, int]], npt.NDArray[np.bool_]]:
    """How runs are mapped in the guest: (gfn, pfn, level) of each block, where a run covers one
    with both numbers aligned alike; and which pages of all the runs remain single."""
    single = np.ones(int(runs.npages.sum()), np.bool_)
    blocks = []
    starts = np.cumsum(runs.npages) - runs.npages
    aligned = (runs.npages >= TABLE_ENTRIES) & ((runs.pfns - runs.gfns) % TABLE_ENTRIES == 0)
    for at in np.flatnonzero(aligned).tolist():
        pfn, gfn, nr = int(runs.pfns[at]), int(runs.gfns[at]), int(runs.npages[at])
        done = -gfn % TABLE_ENTRIES
        while nr - done >= TABLE_ENTRIES:
            for level in BLOCK_LEVELS:
                size = 1 << level_shift(level) - PAGE_SHIFT
                if not (gfn + done | pfn + done) % size and nr - done >= size:
                    break
            blocks.append((gfn + done, pfn + done, level))
            offset = int(starts[at]) + done
            single[offset : offset + size] = False
            done += size
    return blocks, single
