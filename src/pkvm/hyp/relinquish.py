# SPDX-License-Identifier: GPL-2.0-or-later
"""A page that a protected guest gives back for good, as a balloon does (facts §3.4)."""

from __future__ import annotations

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    LAST_LEVEL,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    PageState,
    level_size,
)
from pkvm.events import Transition
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.ownership import GuestMemory, Ownership
from pkvm.hyp.vmemmap import GUEST_OWNED, HOST_OWNED


class Relinquish(Ownership):
    """From the guest to the host, for nothing."""

    def guest_relinquish_host(self, vm: GuestMemory, ipa: int) -> int | None:
        """The guest gives up the private page at byte `ipa`, which the host gets zeroed. Returns
        its PA, or None if there was nothing: that is no error.

        Raises Refused: EINVAL (not aligned), ERANGE (beyond the IPA space), EPERM (shared),
        EHWPOISON (the host took it), EBUSY (mapped for DMA), ENOMEM with `pages_needed` (no table
        page to split a block).
        """
        if ipa & PAGE_MASK:
            why = "the address is not that of a page"
            raise Refused(Errno.EINVAL, "alignment", why, ipa=ipa, vm=vm.handle)
        with self.lock:
            stage2 = vm.stage2
            index, entry, level = stage2.find(ipa)
            state = self._guest_state(entry)
            if state == PageState.NOPAGE:
                return None
            if state != PageState.OWNED:
                raise self._guest_state_refusal(vm, ipa, state, PageState.OWNED)
            pa = (entry & ADDRESS_MASK) + (ipa & level_size(level) - 1)
            page = self._page_of(pa >> PAGE_SHIFT)
            if self.vmemmap.refcount[page]:
                why = "the page is mapped for DMA"
                raise Refused(Errno.EBUSY, "refcount", why, ipa=ipa, vm=vm.handle)
            if level < LAST_LEVEL:
                index, entry = self._split_to_page(vm, ipa, level)
            if self._state[page] != GUEST_OWNED:
                raise HypBug(f"VM {vm.handle:#x} maps PA {pa:#x} that it does not own")
            stage2.store(ipa, index, entry, 0)
            stage2.invalidate(ipa)
            self.zero(pa, PAGE_SIZE)
            self.host.give_page(pa)
            self._state[page] = HOST_OWNED
            self._record(Transition("guest_relinquish_host", pa, 1, vm.handle, ipa))
            return pa
