# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's calls about DMA: paged domains, streams, and the events of its devices (facts §10).

A stream that EL2 knows is in the identity domain until the host attaches it to a
domain of its own making; a domain's number is its VMID in the SMMU. What a
stream follows is its STE, and nothing else says so. Streams that EL2 does not
know are nobody's.
"""

from __future__ import annotations

from pkvm.arm64.smmu import STE2, stage2_ste
from pkvm.arm64.stage2 import PAGE_MASK, PAGE_SHIFT
from pkvm.hyp.abi import MAX_DOMAINS, SMMU_EVENT_WORDS, SMMU_EVENTS_A_CALL, HostSmmuEvents
from pkvm.hyp.errors import Errno, Refused
from pkvm.hyp.host_dma import Domain
from pkvm.hyp.mem_protect import MemProtect
from pkvm.hyp.smmu import SmmuDriver


class Iommu:
    """The calls. With EL2's lock held; every method raises Refused and has then changed nothing.
    ENOENT for a domain or a stream that is not there is common to all."""

    def __init__(self, mem: MemProtect, smmu: SmmuDriver) -> None:
        self._mem = mem
        self._smmu = smmu

    def alloc_domain(self, number: int, root_pa: int) -> None:
        """Make a domain, with its root on the pages at `root_pa` (PGD_INFO bytes, aligned to that),
        which the host gives for it.

        Raises Refused: EINVAL for a number that cannot be, EEXIST for one in use, ENOMEM for pages
        that the host cannot give.
        """
        mem = self._mem
        if not 0 < number <= MAX_DOMAINS:
            why = f"a domain is a number from 1 to {MAX_DOMAINS}, not {number:#x}"
            raise Refused(Errno.EINVAL, "domain", why)
        if number in mem.domains:
            raise Refused(Errno.EEXIST, "domain", f"there is a domain {number} already")
        if root_pa % mem.pgd_bytes:
            why = f"the root is not aligned to its {mem.pgd_bytes} bytes"
            raise Refused(Errno.ENOMEM, "alignment", why, pa=root_pa)
        npages = mem.pgd_bytes >> PAGE_SHIFT
        try:
            mem.host_donate_hyp(root_pa >> PAGE_SHIFT, npages)
        except Refused as refused:
            raise Refused(Errno.ENOMEM, refused.check, refused.why, pa=root_pa) from refused
        memcache = mem.new_memcache()
        mem.domains[number] = Domain(
            number, mem.new_domain_stage2(root_pa, number, memcache), memcache
        )

    def free_domain(self, number: int) -> int:
        """End a domain: what it maps is unpinned, and the host's pages come back, each linked to
        the next by its first word, else zero. Returns the first one's PA. Raises Refused(EBUSY)
        while a stream is attached."""
        mem = self._mem
        domain = self._domain(number)
        for device in mem.devices.devices:
            if self._domain_of(device.stream) == number:
                why = f"stream {device.stream:#x} is attached"
                raise Refused(Errno.EBUSY, "attached", why)
        mem.host_unmap_dma(domain, 0, 1 << mem.geometry.ipa_bits)
        self._smmu.invalidate_all(number)
        del mem.domains[number]
        domain.stage2.destroy()
        return domain.memcache.drain()[0]

    def topup(self, number: int, head_pa: int, nr: int) -> int:
        """Give pages for a domain's tables, as TOPUP_MEMCACHE does."""
        return self._domain(number).memcache.topup(head_pa, nr)

    def attach(self, number: int, stream: int) -> None:
        """Have a stream follow a domain, from the identity domain. Raises Refused(EBUSY) if it
        is anywhere else, or blocked."""
        domain = self._domain(number)
        identity = self._mem.host.identity
        if identity is None or self._smmu.ste(self._known(stream)) != identity.ste:
            why = f"stream {stream:#x} is not in the identity domain"
            raise Refused(Errno.EBUSY, "attached", why)
        self._smmu.configure(stream, stage2_ste(domain.stage2.vttbr, domain.stage2.vtcr))

    def detach(self, number: int, stream: int) -> None:
        """Put a stream of this domain back into the identity domain. Raises Refused(EINVAL) if it
        is not there."""
        self._domain(number)
        identity = self._mem.host.identity
        if self._domain_of(self._known(stream)) != number or identity is None:
            raise Refused(Errno.EINVAL, "attached", f"stream {stream:#x} is not in this domain")
        self._smmu.configure(stream, identity.ste)

    def map(self, number: int, iova: int, pa: int, nbytes: int, prot: int) -> None:
        """`MemProtect.host_map_dma`."""
        self._mem.host_map_dma(self._domain(number), iova, pa, nbytes, prot)

    def unmap(self, number: int, iova: int, nbytes: int) -> int:
        """`MemProtect.host_unmap_dma`."""
        return self._mem.host_unmap_dma(self._domain(number), iova, nbytes)

    def take_events(self, page_pa: int) -> int:
        """Write the events of the host's devices since the last time into the page at `page_pa`,
        which is shared with EL2 (`HostSmmuEvents`). Returns how many. Raises Refused: EINVAL for an
        address that is not a page's, EPERM for a page that is not shared."""
        mem = self._mem
        if page_pa & PAGE_MASK:
            why = "the address is not that of a page"
            raise Refused(Errno.EINVAL, "alignment", why, pa=page_pa)
        mem.pin_shared(page_pa)
        first = (page_pa - mem.memory.ram_base) >> 3
        words = mem.memory.words
        count = 0
        for record in self._smmu.take_events(SMMU_EVENTS_A_CALL):
            at = first + (HostSmmuEvents.RECORDS >> 3) + count * SMMU_EVENT_WORDS
            words[at] = record.event
            words[at + 1] = record.stream
            words[at + 2] = int(record.is_read)
            words[at + 3] = record.ipa
            count += 1
        words[first + (HostSmmuEvents.OVERFLOWS >> 3)] = self._smmu.overflows
        mem.unpin_shared(page_pa)
        return count

    def _domain(self, number: int) -> Domain:
        domain = self._mem.domains.get(number)
        if domain is None or domain.vm:
            raise Refused(Errno.ENOENT, "domain", f"there is no domain {number:#x}")
        return domain

    def _known(self, stream: int) -> int:
        device = self._mem.devices.of_stream(stream)
        if device is None:
            raise Refused(Errno.ENOENT, "stream", f"there is no stream {stream:#x}")
        if self._mem.devices.owner(device):
            raise Refused(Errno.EPERM, "device", f"stream {stream:#x} is a VM's")
        return stream

    def _domain_of(self, stream: int) -> int:
        """The number of the domain that a known stream follows: 0 is the identity domain."""
        return STE2["S2VMID"].get(self._smmu.ste(stream)[2])
