# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that a protected guest maps for the DMA of a device that it was given (facts §10).

A guest's domain maps pages of that guest's own, and nothing else. A page's
refcount is the number of its mappings: while there is one the guest neither gives
the page back nor shares it, and the host does not take it by force. References go
only after the SMMU has forgotten the translations. Tables come from the VM's
memcache: the host pays.
"""

from __future__ import annotations

import numpy as np

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    ANNOTATION,
    LAST_LEVEL,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Geometry,
    PageState,
    level_size,
)
from pkvm.events import NO_ADDRESS, Transition
from pkvm.hyp.abi import DmaProt
from pkvm.hyp.bulk import Leaves, clear_leaves, leaves, missing_tables, one_run
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.host_dma import Domain, dma_attributes
from pkvm.hyp.ownership import GuestMemory, Ownership
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.vmemmap import GUEST_OWNED, MAX_REFCOUNT

MAX_PAGES_A_CALL = 256
IOVA_BITS = 39
"""Of a guest's domain: so its root is one page."""
_ACCESS = int(DmaProt.READ | DmaProt.WRITE)
_ALL = _ACCESS | int(DmaProt.CACHE | DmaProt.NOEXEC | DmaProt.PRIV)


class GuestDma(Ownership):
    """Domains of guests and their mappings. `iova`, `ipa` and `nbytes` are the guest's numbers, in
    bytes."""

    def new_guest_domain(self, vm: GuestMemory, number: int) -> Domain:
        """An empty domain of that number. Raises Refused(ENOMEM) with `pages_needed`."""
        with self.lock:
            self._check_tables(vm, 1)
            geometry = Geometry(IOVA_BITS)
            stage2 = Stage2(
                self.memory,
                self.vmemmap,
                vm.memcache,
                root=vm.memcache.alloc(),
                vmid=number,
                vtcr=geometry.vtcr(self.parange),
                invalidate=_no_blocks,
            )
            return Domain(number, stage2, vm.memcache, vm.handle)

    def end_guest_domain(self, vm: GuestMemory, domain: Domain) -> None:
        """Unmap everything, and give the tables back to the memcache. No stream follows it."""
        with self.lock:
            self._unmap(vm, domain, leaves(domain.stage2, 0, 1 << IOVA_BITS - PAGE_SHIFT))
            self._smmu_forgets(domain, NO_ADDRESS)
            domain.stage2.destroy()

    def guest_map_dma(
        self, vm: GuestMemory, domain: Domain, iova: int, ipa: int, nbytes: int, prot: int
    ) -> int:
        """Let the domain's devices at the guest's private pages from `ipa`, at most 256 of them,
        from `iova` on. Returns the bytes mapped.

        Raises Refused, and has then changed nothing: EINVAL (not pages, beyond the domain's space,
        bits of `prot`), ERANGE (beyond the IPA space), EFAULT (a page is not there: the refusal's
        `ipa` says which), EHWPOISON (the host took it by force), EPERM (a page is shared, or no
        memory), EEXIST (something is mapped at the IOVA), EBUSY (a page is mapped too often),
        ENOMEM with `pages_needed`.
        """
        if prot & ~_ALL or not prot & _ACCESS:
            raise Refused(Errno.EINVAL, "prot", f"{prot:#x} is no permission for DMA", vm=vm.handle)
        nr = min(_iova_pages(vm, iova, nbytes), MAX_PAGES_A_CALL)
        limit = self._frame_limit << PAGE_SHIFT
        if ipa & PAGE_MASK:
            why = "the address is not that of a page"
            raise Refused(Errno.EINVAL, "alignment", why, ipa=ipa, vm=vm.handle)
        if nbytes > limit or ipa > limit - nbytes:
            why = "the range is beyond the VM's space"
            raise Refused(Errno.ERANGE, "ipa_range", why, ipa=ipa, vm=vm.handle)
        with self.lock:
            pas = [self._own_page(vm, ipa + (at << PAGE_SHIFT)) for at in range(nr)]
            if leaves(domain.stage2, iova >> PAGE_SHIFT, nr).frames.size:
                why = f"something is mapped at IOVA {iova:#x}"
                raise Refused(Errno.EEXIST, "iova", why, vm=vm.handle)
            missing = missing_tables(domain.stage2, [(LAST_LEVEL, one_run(iova >> PAGE_SHIFT, nr))])
            self._check_tables(vm, missing)
            attributes = dma_attributes(prot)
            refcount = self.vmemmap.refcount
            for at, pa in enumerate(pas):
                refcount[self._page_of(pa >> PAGE_SHIFT)] += 1
                domain.stage2.put(iova + (at << PAGE_SHIFT), pa | attributes)
                self._record(Transition("guest_map_dma", pa, 1, vm.handle, ipa + at * PAGE_SIZE))
            return nr << PAGE_SHIFT

    def guest_unmap_dma(self, vm: GuestMemory, domain: Domain, iova: int, nbytes: int) -> int:
        """Take mappings away, at most 256; the devices reach nothing there when this returns.
        Returns the bytes that were mapped. Raises Refused(EINVAL) as `guest_map_dma`."""
        nr = _iova_pages(vm, iova, nbytes)
        with self.lock:
            found = leaves(domain.stage2, iova >> PAGE_SHIFT, nr)
            first = slice(MAX_PAGES_A_CALL)
            some = Leaves(found.frames[first], found.entries[first], found.levels[first])
            return self._unmap(vm, domain, some)

    def _own_page(self, vm: GuestMemory, ipa: int) -> int:
        """PA of the guest's private page at `ipa`, which may be mapped once more."""
        _, entry, level = vm.stage2.find(ipa)
        state = self._guest_state(entry)
        if state != PageState.OWNED:
            raise self._guest_state_refusal(vm, ipa, state, PageState.OWNED)
        pa = (entry & ADDRESS_MASK) + (ipa & level_size(level) - 1)
        page = self._page_of(pa >> PAGE_SHIFT)
        if self._state[page] != GUEST_OWNED:
            raise HypBug(f"VM {vm.handle:#x} maps PA {pa:#x} that it does not own")
        # A call maps a page at most as often as it has pages.
        if self.vmemmap.refcount[page] > MAX_REFCOUNT - MAX_PAGES_A_CALL:
            why = "the page is mapped for DMA too often"
            raise Refused(Errno.EBUSY, "refcount", why, ipa=ipa, vm=vm.handle)
        return pa

    def _unmap(self, vm: GuestMemory, domain: Domain, found: Leaves) -> int:
        """Remove these leaves of a domain, then their references."""
        if not found.frames.size:
            return 0
        clear_leaves(domain.stage2, found)
        single = found.frames.size == 1
        self._smmu_forgets(domain, int(found.frames[0]) << PAGE_SHIFT if single else NO_ADDRESS)
        refcount = self.vmemmap.refcount
        for pa in (found.entries & np.uint64(ADDRESS_MASK)).tolist():
            page = self._page_of(pa >> PAGE_SHIFT)
            if self._state[page] != GUEST_OWNED or not refcount[page]:
                raise HypBug(f"PA {pa:#x} was mapped for DMA, but has no reference")
            refcount[page] -= 1
            ipa = ANNOTATION["gfn"].get(self.host.stage2.leaf(pa)[0]) << PAGE_SHIFT
            self._record(Transition("guest_unmap_dma", pa, 1, vm.handle, ipa))
        return int(found.frames.size) << PAGE_SHIFT

    def _smmu_forgets(self, domain: Domain, iova: int) -> None:
        """TLBI of one page of a domain, or of all of it."""
        smmu = self.host.smmu
        if smmu is None:
            raise HypBug("a domain exists without an SMMU")
        if iova == NO_ADDRESS:
            smmu.invalidate_all(domain.number)
        else:
            smmu.invalidate_page(domain.number, iova)


def _iova_pages(vm: GuestMemory, iova: int, nbytes: int) -> int:
    """Pages of [iova, iova+nbytes). Raises Refused(EINVAL)."""
    limit = 1 << IOVA_BITS
    if (iova | nbytes) & PAGE_MASK or not 0 < nbytes <= limit or iova > limit - nbytes:
        why = f"{nbytes:#x} bytes from IOVA {iova:#x} are not pages of the domain's space"
        raise Refused(Errno.EINVAL, "iova_range", why, vm=vm.handle)
    return nbytes >> PAGE_SHIFT


def _no_blocks(ipa: int) -> None:
    raise HypBug("a domain has no blocks to split")
