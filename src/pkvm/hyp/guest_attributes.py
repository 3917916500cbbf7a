# SPDX-License-Identifier: GPL-2.0-or-later
"""Attributes of what a non-protected guest borrows: permissions, young, size (facts §3.3).

No owner changes here. A host that logs dirty pages takes write permission away
and gives it back at the fault; one that looks for cold memory clears the access
flag and sets it at the fault; one that wants to do either page by page splits
blocks. A protected guest's mappings are not the host's to change.
"""

from __future__ import annotations

import numpy as np

from pkvm.arm64.stage2 import (
    AF,
    LAST_LEVEL,
    PAGE_SHIFT,
    S2AP_R,
    S2AP_W,
    VALID,
    XN_MASK,
    PageState,
)
from pkvm.events import NO_ADDRESS
from pkvm.hyp.abi import PROT_R, PROT_RWX, PROT_W, PROT_X
from pkvm.hyp.bulk import Leaves, leaves
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.ownership import GuestMemory, Ownership, leaf_level


class GuestAttributes(Ownership):
    """What the host may do with mappings that it lends. Numbers are gfns and pages.

    All raise Refused: EINVAL for numbers, EPERM for a mapping that is not borrowed.
    """

    def host_relax_perms_guest(self, vm: GuestMemory, gfn: int, prot: int) -> None:
        """Add `prot` (PROT_R, PROT_W, PROT_X) to what the guest may do at `gfn`; nothing is taken
        away. Raises Refused(EAGAIN) if nothing is mapped there."""
        if prot & ~PROT_RWX:
            raise Refused(Errno.EINVAL, "prot", f"permissions {prot:#x} are not of R, W, X")
        with self.lock:
            index, entry = self._lent_page(vm, gfn)
            relaxed = entry
            if prot & PROT_R:
                relaxed |= S2AP_R
            if prot & PROT_W:
                relaxed |= S2AP_W
            if prot & PROT_X:
                relaxed &= ~XN_MASK
            vm.stage2.set_attributes(index, entry, relaxed)
            vm.stage2.invalidate(gfn << PAGE_SHIFT)

    def host_mkyoung_guest(self, vm: GuestMemory, gfn: int) -> None:
        """Set the access flag at `gfn`. Raises Refused(EAGAIN) if nothing is mapped there."""
        with self.lock:
            index, entry = self._lent_page(vm, gfn)
            vm.stage2.set_attributes(index, entry, entry | AF)

    def host_wrprotect_guest(self, vm: GuestMemory, gfn: int, nr: int) -> None:
        """Take write permission from every mapping in one page or one aligned block of 512; a
        block mapping loses it whole. Frames with nothing mapped are passed over."""
        with self.lock:
            self._clear(vm, self._lent(vm, gfn, nr), S2AP_W)

    def host_test_clear_young_guest(
        self, vm: GuestMemory, gfn: int, nr: int, *, make_old: bool
    ) -> bool:
        """Whether any mapping in one page or one aligned block of 512 has the access flag; with
        `make_old` it is cleared."""
        with self.lock:
            found = self._lent(vm, gfn, nr)
            young = bool((found.entries & np.uint64(AF)).any())
            if young and make_old:
                self._clear(vm, found, AF)
            return young

    def host_split_guest(self, vm: GuestMemory, gfn: int, nr: int) -> None:
        """Have pages in place of the guest's block of 512 pages at `gfn`, each with the block's
        attributes and state.

        Raises Refused: EINVAL for another size or alignment, ENOENT if nothing is mapped there,
        E2BIG if pages or a larger block are, ENOMEM with `pages_needed`.
        """
        level = leaf_level(nr, gfn)
        if level == LAST_LEVEL:
            raise Refused(Errno.EINVAL, "size", "a page is not to be split")
        with self.lock:
            self._check_gfns(vm, gfn, nr)
            ipa = gfn << PAGE_SHIFT
            entry, at = vm.stage2.leaf(ipa)
            if at == level and not entry & VALID:
                why = "nothing is mapped there"
                raise Refused(Errno.ENOENT, "guest_state", why, ipa=ipa, vm=vm.handle)
            if at != level:
                why = "the mapping is of another size"
                raise Refused(Errno.E2BIG, "leaf_size", why, ipa=ipa, vm=vm.handle)
            self._check_tables(vm, 1)
            vm.stage2.split(ipa)

    def host_flush_guest(self, vm: GuestMemory) -> None:
        """TLBI for everything of the guest's."""
        vm.stage2.invalidate(NO_ADDRESS)

    def _lent_page(self, vm: GuestMemory, gfn: int) -> tuple[int, int]:
        """The leaf that maps frame `gfn`, its index first."""
        self._check_gfns(vm, gfn, 1)
        ipa = gfn << PAGE_SHIFT
        index, entry, _ = vm.stage2.find(ipa)
        if not entry & VALID:
            why = "nothing is mapped there"
            raise Refused(Errno.EAGAIN, "guest_state", why, ipa=ipa, vm=vm.handle)
        self._check_borrowed(vm, ipa, entry)
        return index, entry

    def _lent(self, vm: GuestMemory, gfn: int, nr: int) -> Leaves:
        """The leaves that map anything of `nr` frames from `gfn`, all of them borrowed."""
        leaf_level(nr, gfn)
        self._check_gfns(vm, gfn, nr)
        found = leaves(vm.stage2, gfn, nr)
        for frame, entry in zip(found.frames.tolist(), found.entries.tolist(), strict=True):
            self._check_borrowed(vm, frame << PAGE_SHIFT, entry)
        return found

    def _check_borrowed(self, vm: GuestMemory, ipa: int, entry: int) -> None:
        state = self._guest_state(entry)
        if state != PageState.SHARED_BORROWED:
            why = f"to the guest the page is {state.name}: not lent"
            raise Refused(Errno.EPERM, "guest_state", why, ipa=ipa, vm=vm.handle)

    def _clear(self, vm: GuestMemory, found: Leaves, bit: int) -> None:
        """Clear an attribute of these leaves, and flush."""
        stage2 = vm.stage2
        for frame in found.frames[found.entries & np.uint64(bit) != 0].tolist():
            index, entry, _ = stage2.find(frame << PAGE_SHIFT)
            stage2.set_attributes(index, entry, entry & ~bit)
        stage2.invalidate(NO_ADDRESS)
