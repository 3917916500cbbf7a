# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a protected VM: its pages go back to the host (facts §3.3, §3.6).

A private page is unmapped from the guest, the guest's TLB flushed, the page
zeroed, and only then can the host reach it. A page that the guest shared goes
back as it is: the host has seen it.
"""

from __future__ import annotations

import numpy as np

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    SW_STATE_MASK,
    SW_STATE_SHIFT,
    VALID,
    PageState,
)
from pkvm.events import NO_ADDRESS, Transition
from pkvm.hyp.bulk import Leaves, Runs, clear_leaves, joined, joints, leaves, splits_at_ends
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.ownership import GuestMemory, Ownership, make_event
from pkvm.hyp.vmemmap import GUEST_OWNED, GUEST_SHARED_WITH_HOST, HOST_OWNED

_OP = "reclaim_dying_guest_range"
_SHARED = PageState.SHARED_OWNED << SW_STATE_SHIFT
_PFN_AND_STATE = np.uint64(ADDRESS_MASK | SW_STATE_MASK)
_LEAF_MASK = VALID | SW_STATE_MASK


class Reclaim(Ownership):
    """Taking a dying VM apart; that it is dying, the caller has checked."""

    def reclaim_dying_guest_range(self, vm: GuestMemory, gfn: int, nr: int) -> int:
        """Give the host every page that the protected VM has mapped in `nr` frames from `gfn`;
        frames with nothing mapped, poisoned ones among them, are passed over. Returns the number
        of pages.

        Raises Refused: EINVAL (numbers), EPERM (a borrowed page, which is no protected VM's; see
        host_unshare_guest), ENOMEM with `pages_needed` (the range cuts a block).
        """
        with self.lock:
            self._check_gfns(vm, gfn, nr)
            stage2 = vm.stage2
            if nr == 1:
                ipa = gfn << PAGE_SHIFT
                index, entry, level = stage2.find(ipa)
                if level == LAST_LEVEL and entry & _LEAF_MASK == VALID:
                    self._reclaim_private_page(vm, ipa, index, entry)
                    return 1
            found = self._mapped(vm, gfn, nr)
            if not found.frames.size:
                return 0
            self._check_owned(vm, found)
            cut = splits_at_ends(stage2, gfn, nr)
            if cut:
                self._check_tables(vm, len(cut))
                for ipa in cut:
                    stage2.split(ipa)
                found = self._mapped(vm, gfn, nr)
            return self._reclaim(vm, found)

    def reclaim_dying_guest_page(self, vm: GuestMemory, gfn: int) -> None:
        """As `reclaim_dying_guest_range` for one page, which must be there or be poisoned: the
        host has such a page back already. Raises Refused(ENOENT) if neither."""
        with self.lock:
            if self.reclaim_dying_guest_range(vm, gfn, 1):
                return
            ipa = gfn << PAGE_SHIFT
            if self._guest_state(vm.stage2.leaf(ipa)[0]) != PageState.POISON:
                why = "nothing is mapped there"
                raise Refused(Errno.ENOENT, "guest_state", why, ipa=ipa, vm=vm.handle)

    def has_pages(self, vm: GuestMemory) -> bool:
        """Whether the VM has anything mapped."""
        with self.lock:
            return self._mapped(vm, 0, self._frame_limit).frames.size > 0

    def _mapped(self, vm: GuestMemory, gfn: int, nr: int) -> Leaves:
        """The valid leaves in `nr` frames from `gfn`."""
        found = leaves(vm.stage2, gfn, nr)
        is_valid = found.entries & np.uint64(VALID) != 0
        return Leaves(*(column[is_valid] for column in found))

    def _reclaim_private_page(self, vm: GuestMemory, ipa: int, index: int, entry: int) -> None:
        """Reclaim the page that the word of this index, which holds `entry`, maps at `ipa`."""
        pa = entry & ADDRESS_MASK
        page = (pa >> PAGE_SHIFT) - self._first_pfn
        if self._state[page] != GUEST_OWNED:
            raise HypBug(f"VM {vm.handle:#x} maps PA {pa:#x} that it does not own")
        stage2 = vm.stage2
        stage2.store(ipa, index, entry, 0)
        stage2.invalidate(ipa)
        self.zero(pa, PAGE_SIZE)
        self.host.give_page(pa)
        self._state[page] = HOST_OWNED
        self._record(make_event(Transition, (_OP, pa, 1, vm.handle, ipa)))

    def _check_owned(self, vm: GuestMemory, found: Leaves) -> None:
        """Refuse (EPERM) a leaf that is neither OWNED nor SHARED_OWNED."""
        states = found.entries & np.uint64(SW_STATE_MASK)
        wrong = (states != 0) & (states != np.uint64(_SHARED))
        if wrong.any():
            at = int(np.argmax(wrong))
            ipa = int(found.frames[at]) << PAGE_SHIFT
            state = PageState(int(states[at]) >> SW_STATE_SHIFT)
            why = f"to the guest the page is {state.name}: not its own"
            raise Refused(Errno.EPERM, "guest_state", why, ipa=ipa, vm=vm.handle)

    def _reclaim(self, vm: GuestMemory, found: Leaves) -> int:
        """Reclaim these leaves, all of them owned."""
        pfns = ((found.entries & _PFN_AND_STATE) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        starts = joints(found.npages, found.frames, pfns)
        npages = np.add.reduceat(found.npages, starts)
        gfns, pfns = found.frames[starts], pfns[starts] & ADDRESS_MASK >> PAGE_SHIFT
        is_private = found.entries[starts] & np.uint64(SW_STATE_MASK) == 0
        order = np.argsort(pfns)
        runs, is_private = Runs(pfns[order], npages[order]), is_private[order]
        pages = Runs(self._pages_of(runs.starts), runs.sizes)
        private = runs.where(is_private)
        for some, expected in (
            (is_private, GUEST_OWNED),
            (~is_private, GUEST_SHARED_WITH_HOST),
        ):
            if some.any() and self._first_wrong(pages.where(some), expected) is not None:
                raise HypBug(f"VM {vm.handle:#x} maps a page that it does not own")
        clear_leaves(vm.stage2, found)
        vm.stage2.invalidate(NO_ADDRESS)
        if private.starts.size:
            private = joined(private)
            for pfn, nr in zip(private.starts.tolist(), private.sizes.tolist(), strict=True):
                self.zero(pfn << PAGE_SHIFT, nr << PAGE_SHIFT)
            self.host.give_runs(private)
        self._mark(joined(pages), HOST_OWNED)
        for pfn, gfn, nr in zip(pfns.tolist(), gfns.tolist(), npages.tolist(), strict=True):
            self._record(Transition(_OP, pfn << PAGE_SHIFT, nr, vm.handle, gfn << PAGE_SHIFT))
        return int(npages.sum())
