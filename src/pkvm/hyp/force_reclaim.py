# SPDX-License-Identifier: GPL-2.0-or-later
"""A private page of a guest's that the host takes back by force, and poison (facts §3.3, §3.7).

A host kernel that touches a page it has lost could only die of it. Instead it
may destroy the page: the guest loses it for ever, the page is zeroed, the host
goes on. What stood there is gone for everybody; the guest's frame keeps a mark,
so that nobody can put another page in its place unseen.
"""

from __future__ import annotations

from collections.abc import Callable

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION,
    ANNOTATION_POISONED,
    LAST_LEVEL,
    PAGE_SHIFT,
    PAGE_SIZE,
    VALID,
    InvalidType,
    Owner,
    PageState,
)
from pkvm.events import Transition
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.ownership import GuestMemory, Ownership
from pkvm.hyp.vmemmap import GUEST_OWNED, HOST_OWNED, host_state


class ForceReclaim(Ownership):
    """Poison: how it comes, and whether it is there."""

    def host_force_reclaim_page_guest(
        self, pa: int, find_vm: Callable[[int], GuestMemory | None]
    ) -> None:
        """Destroy the guest's private page that byte `pa` is in, and give it to the host, zero.
        `find_vm` knows the VMs by handle.

        Raises Refused: EFAULT (no RAM); EAGAIN (the host has access, or the VM is gone: try
        again); EPERM (EL2's page, or not private any more); EINVAL (nobody's page); ENOENT,
        EHWPOISON (the guest has it not); EBUSY (mapped for DMA); ENOMEM with `pages_needed` (no
        table page to split a block).
        """
        with self.lock:
            pfn = pa >> PAGE_SHIFT
            page = pfn - self._first_pfn
            if not 0 <= page < self._npages:
                raise Refused(Errno.EFAULT, "ram_range", "that is no RAM", pa=pa)
            if host_state(self._state[page]) != PageState.NOPAGE:
                raise Refused(Errno.EAGAIN, "host_state", "the host has access", pa=pa)
            vm, gfn = self._owner_of(pa, find_vm)
            ipa = gfn << PAGE_SHIFT
            stage2 = vm.stage2
            index, entry, level = stage2.find(ipa)
            state = self._guest_state(entry)
            if state == PageState.NOPAGE:
                why = "the guest has nothing mapped there"
                raise Refused(Errno.ENOENT, "guest_state", why, ipa=ipa, vm=vm.handle)
            if state != PageState.OWNED:
                raise self._guest_state_refusal(vm, ipa, state, PageState.OWNED)
            if self.vmemmap.refcount[page]:
                raise Refused(Errno.EBUSY, "refcount", "the guest's devices use the page", pa=pa)
            if level < LAST_LEVEL:
                index, entry = self._split_to_page(vm, ipa, level)
            if entry & ADDRESS_MASK != pfn << PAGE_SHIFT or self._state[page] != GUEST_OWNED:
                raise HypBug(f"PA {pa:#x} is annotated as a page that VM {vm.handle:#x} has not")
            pa = pfn << PAGE_SHIFT
            stage2.store(ipa, index, entry, ANNOTATION_POISONED)
            stage2.invalidate(ipa)
            self.zero(pa, PAGE_SIZE)
            self.host.give_page(pa)
            self._state[page] = HOST_OWNED
            self._record(Transition("host_force_reclaim", pa, 1, vm.handle, ipa))

    def is_poisoned(self, vm: GuestMemory, ipa: int) -> bool:
        """Whether the guest's page at byte `ipa` was taken back by force.

        Raises Refused(EINVAL) if the walk does not end at a page's entry: then the question is
        not about one.
        """
        with self.lock:
            entry, level = vm.stage2.leaf(ipa)
            if level < LAST_LEVEL:
                why = "the guest has no page-sized entry there"
                raise Refused(Errno.EINVAL, "leaf_size", why, ipa=ipa, vm=vm.handle)
            return self._guest_state(entry) == PageState.POISON

    def _owner_of(
        self, pa: int, find_vm: Callable[[int], GuestMemory | None]
    ) -> tuple[GuestMemory, int]:
        """The VM, and its frame, that the host's stage-2 names as owner of a page it has lost."""
        entry, _ = self.host.stage2.leaf(pa)
        if entry & VALID or ANNOTATION["type"].get(entry) != InvalidType.DONATION:
            raise Refused(Errno.EINVAL, "annotation", "no owner is named", pa=pa)
        if ANNOTATION["owner"].get(entry) != Owner.GUEST:
            raise Refused(Errno.EPERM, "owner", "the page is EL2's", pa=pa)
        handle = ANNOTATION["vm"].get(entry)
        vm = find_vm(handle)
        if vm is None:
            raise Refused(Errno.EAGAIN, "handle", f"VM {handle:#x} is gone", pa=pa)
        return vm, ANNOTATION["gfn"].get(entry)
