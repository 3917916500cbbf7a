# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages that the host maps for a device's DMA, and pins by it (facts §10, mode B; §3.8).

A page in a paged domain stays what it is, the host's own, and can be nothing
else while a domain maps it: its state is HOST_PINNED, its refcount the number
of mappings. So a page that is donated or lent cannot be mapped, and a mapped
one neither donated nor lent. References go only after the SMMU has forgotten
the translations.
"""

from __future__ import annotations

import numpy as np

from pkvm.arm64.stage2 import (
    ADDRESS_MASK,
    AF,
    LAST_LEVEL,
    MEMATTR_DEVICE,
    MEMATTR_NORMAL,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    S2AP_R,
    S2AP_W,
    SH_INNER,
    TABLE_OR_PAGE,
    VALID,
    XN_NONE,
)
from pkvm.events import Transition
from pkvm.hyp.abi import DmaProt
from pkvm.hyp.bulk import Entries, clear_leaves, leaves, missing_tables, one_run, write
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.memcache import Memcache
from pkvm.hyp.ownership import Ownership
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.vmemmap import HOST_OWNED, HOST_PINNED, MAX_REFCOUNT

_ACCESS = int(DmaProt.READ | DmaProt.WRITE)
_ALL = _ACCESS | int(DmaProt.CACHE | DmaProt.NOEXEC | DmaProt.MMIO)


class Domain:
    """An address space for DMA: its tree, and where the pages for it come from. `number` is its
    VMID in the SMMU, `vm` the handle of the VM that made it; 0: the host did."""

    def __init__(self, number: int, stage2: Stage2, memcache: Memcache, vm: int = 0) -> None:
        self.number = number
        self.vm = vm
        self.stage2 = stage2
        self.memcache = memcache


class HostDma(Ownership):
    """Mappings of paged domains. `iova`, `pa` and `nbytes` are the host's numbers, in bytes."""

    def host_map_dma(self, domain: Domain, iova: int, pa: int, nbytes: int, prot: int) -> None:
        """Let the domain's devices at RAM [pa, pa+nbytes), pages of the host's own, from `iova` on;
        or with DmaProt.MMIO at the registers of one DMA-capable device, which taints it for ever.

        Raises Refused: EINVAL (not pages, beyond the address space, bits of `prot`), EPERM (not the
        host's own RAM; no such device), EEXIST (something is mapped there), EBUSY (a page is mapped
        too often), ENOMEM with `pages_needed`.
        """
        if prot & ~_ALL or not prot & _ACCESS:
            raise Refused(Errno.EINVAL, "prot", f"{prot:#x} is no permission for DMA")
        nr = self._dma_pages(iova, nbytes)
        if pa & PAGE_MASK:
            raise Refused(Errno.EINVAL, "alignment", "the address is not that of a page", pa=pa)
        with self.lock:
            device = None
            first = 0
            if prot & DmaProt.MMIO:
                device = self.devices.at(pa, nbytes)
                if device is None or self.devices.owner(device):
                    why = "the host has no such device"
                    raise Refused(Errno.EPERM, "device", why, pa=pa)
            else:
                first = self._ram_pages(pa >> PAGE_SHIFT, nr)
                self._check_pinnable(first, nr)
            run = one_run(iova >> PAGE_SHIFT, nr)
            if leaves(domain.stage2, iova >> PAGE_SHIFT, nr).frames.size:
                raise Refused(Errno.EEXIST, "iova", "something is mapped there", ipa=iova)
            missing = missing_tables(domain.stage2, [(LAST_LEVEL, run)])
            missing -= domain.memcache.available
            if missing > 0:
                why = f"{missing} more table pages are needed"
                raise Refused(Errno.ENOMEM, "memcache", why, pages_needed=missing)
            if device is not None:
                self.devices.taint(device)
            else:
                self.vmemmap.refcounts[first : first + nr] += np.uint16(1)
                self.vmemmap.states[first : first + nr] = HOST_PINNED
            entry = np.array([pa | dma_attributes(prot)], np.uint64)
            write(domain.stage2, run, entry, PAGE_SIZE)
            if device is None:
                self._record(Transition("host_map_dma", pa, nr, 0, iova))

    def host_unmap_dma(self, domain: Domain, iova: int, nbytes: int) -> int:
        """Take mappings away; the devices reach nothing there when this returns. Returns the bytes
        that were mapped. Raises Refused(EINVAL) as `host_map_dma`."""
        nr = self._dma_pages(iova, nbytes)
        with self.lock:
            stage2 = domain.stage2
            found = leaves(stage2, iova >> PAGE_SHIFT, nr)
            if not found.frames.size:
                return 0
            clear_leaves(stage2, found)
            if self.host.smmu is None:
                raise HypBug("a domain exists without an SMMU")
            if found.frames.size == 1:
                self.host.smmu.invalidate_page(domain.number, int(found.frames[0]) << PAGE_SHIFT)
            else:
                self.host.smmu.invalidate_all(domain.number)
            self._unpin(found.frames.tolist(), found.entries)
            return int(found.frames.size) << PAGE_SHIFT

    def _unpin(self, frames: list[int], entries: Entries) -> None:
        """Drop a reference of each page of RAM that these leaves mapped."""
        pas = (entries & np.uint64(ADDRESS_MASK)).tolist()
        refcount = self.vmemmap.refcount
        for frame, pa in zip(frames, pas, strict=True):
            if not self.memory.is_ram(pa):
                continue
            page = self._page_of(pa >> PAGE_SHIFT)
            if self._state[page] != HOST_PINNED or not refcount[page]:
                raise HypBug(f"PA {pa:#x} was mapped for DMA, but not pinned")
            refcount[page] -= 1
            if not refcount[page]:
                self._state[page] = HOST_OWNED
            self._record(Transition("host_unmap_dma", pa, 1, 0, frame << PAGE_SHIFT))

    def _dma_pages(self, iova: int, nbytes: int) -> int:
        """Pages of [iova, iova+nbytes). Raises Refused(EINVAL)."""
        limit = self._frame_limit << PAGE_SHIFT
        if (iova | nbytes) & PAGE_MASK or not 0 < nbytes <= limit or iova > limit - nbytes:
            why = f"{nbytes:#x} bytes from there are not pages of the domain's space"
            raise Refused(Errno.EINVAL, "iova_range", why, ipa=iova)
        return nbytes >> PAGE_SHIFT

    def _check_pinnable(self, first: int, nr: int) -> None:
        """Refuse pages that are not the host's own (EPERM), or mapped too often (EBUSY)."""
        states = self.vmemmap.states[first : first + nr]
        wrong = (states != HOST_OWNED) & (states != HOST_PINNED)
        if wrong.any():
            raise self._wrong_state(first + int(np.argmax(wrong)), HOST_OWNED)
        if (self.vmemmap.refcounts[first : first + nr] == MAX_REFCOUNT).any():
            raise Refused(Errno.EBUSY, "refcount", "a page is mapped for DMA too often")


def dma_attributes(prot: int) -> int:
    """Descriptor bits of a page with `prot`; nobody executes there."""
    attributes = VALID | TABLE_OR_PAGE | SH_INNER | AF | XN_NONE
    attributes |= MEMATTR_DEVICE if prot & DmaProt.MMIO else MEMATTR_NORMAL
    if prot & DmaProt.READ:
        attributes |= S2AP_R
    if prot & DmaProt.WRITE:
        attributes |= S2AP_W
    return attributes
