# SPDX-License-Identifier: GPL-2.0-or-later
"""EL2's memory side as one object: who owns which page, and every way that may change (facts §3).

`MemProtect` ties the pairs of those who trust each other not: host and EL2
(`host_hyp`), host and secure world (`host_ffa`), host and guests (`host_guest`,
`guest_attributes`), guest and host (`guest_host`, `relinquish`), either and its
devices (`host_dma`, `guest_dma`), the end of a VM (`reclaim`) and the end of a
page before it (`force_reclaim`). Every transition checks everything, then
changes everything; a refused one raises `Refused` and has changed nothing.

EL2's memory is the carve-out, given at boot: the ownership records, then the
pool of table pages for the host's and the DMA masters' stage-2. Guests' tables
are paid by the host (`memcache`). The guest firmware's region is EL2's too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pkvm.arm64.smmu import BYPASS_STE
from pkvm.arm64.stage2 import (
    ANNOTATION_HYP,
    BLOCK_2M,
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Geometry,
)
from pkvm.events import Recorder, Tlbi
from pkvm.hyp.bulk import one_run
from pkvm.hyp.devices import DeviceTable
from pkvm.hyp.errors import Errno, HypBug, Refused
from pkvm.hyp.force_reclaim import ForceReclaim
from pkvm.hyp.guest_attributes import GuestAttributes
from pkvm.hyp.guest_dma import GuestDma
from pkvm.hyp.guest_host import GuestHost
from pkvm.hyp.host_dma import Domain, HostDma
from pkvm.hyp.host_ffa import HostFfa
from pkvm.hyp.host_guest import HostGuest
from pkvm.hyp.host_hyp import HostHyp
from pkvm.hyp.host_memory import BusMaster, HostMemory, pool_pages
from pkvm.hyp.memcache import Memcache
from pkvm.hyp.memory_policy import RFC_MEMORY, MemoryPolicy
from pkvm.hyp.ownership import GuestMemory
from pkvm.hyp.pgtable import Stage2
from pkvm.hyp.pool import PagePool
from pkvm.hyp.reclaim import Reclaim
from pkvm.hyp.relinquish import Relinquish
from pkvm.hyp.smmu import SmmuDriver
from pkvm.hyp.vmemmap import HYP_OWNED, Vmemmap, vmemmap_bytes
from pkvm.machine.memory import PhysicalMemory
from pkvm.machine.smmu import DmaDevice, Smmu
from pkvm.machine.stage2 import Access

__all__ = ["GuestMemory", "MemProtect", "carveout_bytes"]

Range = tuple[int, int]
"""PA of the first byte, number of bytes; both page-aligned."""


def carveout_bytes(ram_bytes: int, ipa_bits: int = 40) -> int:
    """Bytes that EL2 needs of a machine with `ram_bytes` of RAM, in whole 2 MiB."""
    pages = pool_pages(ram_bytes, Geometry(ipa_bits))
    records = -(-vmemmap_bytes(ram_bytes) // PAGE_SIZE) * PAGE_SIZE
    return -(-(records + pages * PAGE_SIZE) // BLOCK_2M) * BLOCK_2M


class MemProtect(
    HostHyp,
    HostGuest,
    HostFfa,
    HostDma,
    GuestDma,
    GuestAttributes,
    GuestHost,
    Relinquish,
    Reclaim,
    ForceReclaim,
):
    """EL2's ownership of memory.

    `host_bus` is the host CPU's way to memory; `smmu` stands before the devices, of which EL2 is
    told as `devices`: None if there are none. `guest_tlbi(vmid)` is TLBI and DSB for a VM on the
    CPU, `invalidate_code(pa, nbytes)` what the engine needs after EL2 wrote where guest code may
    have been. With `protected` False the bus and the devices bypass stage 2, and the host keeps
    its reach; states are kept all the same, since VMs need them.

    The constructor zeroes the carve-out and lays it out; then `initialise`, then `finalise`.
    Raises ValueError if the carve-out or the firmware region is not page-aligned RAM, if they
    overlap, or if the carve-out is smaller than `carveout_bytes` says.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        *,
        host_bus: BusMaster,
        smmu: Smmu | None,
        devices: Sequence[DmaDevice] = (),
        guest_tlbi: Callable[[int], None],
        invalidate_code: Callable[[int, int], None],
        recorder: Recorder,
        carveout: Range,
        firmware: Range | None = None,
        protected: bool = True,
        ipa_bits: int = 40,
        parange: int = 2,
        policy: MemoryPolicy = RFC_MEMORY,
    ) -> None:
        for name, region in (("carve-out", carveout), ("firmware", firmware)):
            if region is not None:
                base, nbytes = region
                if (base | nbytes) & PAGE_MASK or nbytes <= 0 or not memory.is_ram(base, nbytes):
                    raise ValueError(f"the {name} at {base:#x} (+{nbytes:#x}) is not pages of RAM")
        if firmware and firmware[0] < sum(carveout) and carveout[0] < sum(firmware):
            raise ValueError("the firmware region overlaps the carve-out")
        records = -(-vmemmap_bytes(memory.ram_bytes) // PAGE_SIZE) * PAGE_SIZE
        least = records + pool_pages(memory.ram_bytes, Geometry(ipa_bits)) * PAGE_SIZE
        if carveout[1] < least:
            raise ValueError(f"EL2 needs {least:#x} bytes of carve-out, not {carveout[1]:#x}")
        memory.zero(*carveout)
        self.carveout = carveout
        self.firmware = firmware
        self.protected = protected
        self.geometry = Geometry(ipa_bits)
        self.vtcr = self.geometry.vtcr(parange)
        """VTCR_EL2 of the host's stage-2 and of every guest's."""
        vmemmap = Vmemmap(memory, carveout[0])
        self.pool = PagePool(memory, vmemmap, carveout[0] + records, carveout[1] - records)
        driver = None if smmu is None else SmmuDriver(memory, self.pool, smmu, recorder)
        host = HostMemory(
            memory,
            vmemmap,
            self.pool,
            vtcr=self.vtcr,
            host_bus=host_bus,
            smmu=driver,
            recorder=recorder,
            enforced=protected,
        )
        super().__init__(
            memory,
            vmemmap,
            host,
            ipa_bits=ipa_bits,
            parange=parange,
            invalidate_code=invalidate_code,
            recorder=recorder,
            policy=policy,
            devices=DeviceTable(memory, self.pool, devices),
        )
        self.smmu = driver
        self.domains: dict[int, Domain] = {}
        """Address spaces for DMA that the host and guests made, by number."""
        self._records_bytes = records
        self._guest_tlbi = guest_tlbi

    def initialise(self) -> None:
        """Take the carve-out and the firmware region from the host, map the rest for DMA."""
        with self.lock:
            memory = self.memory
            regions = sorted(region for region in (self.carveout, self.firmware) if region)
            mapped = memory.ram_base
            for base, nbytes in regions:
                self._take_for_hyp(base, nbytes)
                self._map_for_dma(mapped, base)
                mapped = base + nbytes
            self._map_for_dma(mapped, memory.ram_end)
            if self.smmu is not None:
                self._start_smmu(self.smmu)
            page = (self.carveout[0] - memory.ram_base) >> PAGE_SHIFT
            in_use = self._records_bytes >> PAGE_SHIFT
            self.vmemmap.refcounts[page : page + in_use] = 1
            if self.firmware is not None:
                page = (self.firmware[0] - memory.ram_base) >> PAGE_SHIFT
                self.vmemmap.refcounts[page : page + (self.firmware[1] >> PAGE_SHIFT)] = 1

    def finalise(self) -> None:
        """De-privilege the host: from here on it goes through stage-2."""
        self.host.attach(self.host_abort)

    def host_abort(self, ipa: int, access: Access, fsc: int) -> bool:
        """The host CPU's fault at `ipa`; True if it may try again. The host bus calls this."""
        with self.lock:
            return self.host.abort(ipa, access, fsc)

    def write_shared(self, pa: int, data: bytes) -> None:
        """Write into a page that the host shares with EL2, which has it pinned."""
        self.memory.write(pa, data)
        self._invalidate_code(pa, len(data))

    @property
    def pgd_bytes(self) -> int:
        """Bytes of a guest's stage-2 root, which is also its alignment."""
        return self.geometry.root_bytes

    def new_memcache(self) -> Memcache:
        """An empty memcache, for a new VM."""
        return Memcache(self.memory, self.vmemmap, self)

    def new_guest_stage2(self, root_pa: int, vmid: int, memcache: Memcache) -> Stage2:
        """An empty stage-2 for a guest, on `pgd_bytes` at `root_pa` that EL2 already owns.

        Zeroes them. `Stage2.destroy` puts them into the memcache with the other tables, and
        `Memcache.drain` gives all to the host. Raises Refused: EINVAL if not aligned to their
        size, EPERM if a page is not EL2's, EBUSY if one is in use.
        """
        tlbi, record = self._guest_tlbi, self._record

        def invalidate(ipa: int) -> None:
            tlbi(vmid)
            record(Tlbi(vmid, ipa))

        return self._new_stage2(root_pa, vmid, memcache, invalidate)

    def new_domain_stage2(self, root_pa: int, number: int, memcache: Memcache) -> Stage2:
        """As `new_guest_stage2`, for a domain of that number."""

        def invalidate(ipa: int) -> None:
            raise HypBug("a domain has no blocks to split")

        return self._new_stage2(root_pa, number, memcache, invalidate)

    def _new_stage2(
        self, root_pa: int, vmid: int, memcache: Memcache, invalidate: Callable[[int], None]
    ) -> Stage2:
        npages = self.geometry.root_tables
        if root_pa % self.pgd_bytes:
            why = f"the root is not aligned to its {self.pgd_bytes} bytes"
            raise Refused(Errno.EINVAL, "alignment", why, pa=root_pa)
        with self.lock:
            page = self._ram_pages(root_pa >> PAGE_SHIFT, npages)
            self._check_states(page, npages, HYP_OWNED)
            if self.vmemmap.refcounts[page : page + npages].any():
                raise Refused(Errno.EBUSY, "refcount", "EL2 uses the page", pa=root_pa)
            self.memory.zero(root_pa, self.pgd_bytes)
            self.vmemmap.refcounts[page : page + npages] = 1
        return Stage2(
            self.memory,
            self.vmemmap,
            memcache,
            root=root_pa,
            vmid=vmid,
            vtcr=self.vtcr,
            invalidate=invalidate,
        )

    def _map_for_dma(self, pa: int, end: int) -> None:
        if self.protected and self.host.identity is not None:
            self.host.identity.map(pa, end)

    def _start_smmu(self, smmu: SmmuDriver) -> None:
        """Turn the SMMU on, let the known devices reach what the host does, and keep its registers
        from the host."""
        smmu.start()
        identity = self.host.identity
        ste = BYPASS_STE if identity is None or not self.protected else identity.ste
        for device in self.devices.devices:
            smmu.configure(device.stream, ste)
        if self.protected:
            self.host.withhold_device(smmu.window.base, smmu.window.size)

    def _take_for_hyp(self, base: int, nbytes: int) -> None:
        """Make [base, base+nbytes) EL2's before anyone else runs."""
        page = (base - self.memory.ram_base) >> PAGE_SHIFT
        npages = nbytes >> PAGE_SHIFT
        if self.protected:
            self.host.withhold(one_run(base >> PAGE_SHIFT, npages), ANNOTATION_HYP)
        self.vmemmap.states[page : page + npages] = HYP_OWNED
